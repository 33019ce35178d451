//! Instructions that the CPL0 emulator of software KVM refuses, done here on its behalf.
//!
//! The ring3 kernel needs none of them; other guests that run at CPL0 do.

use crate::error::CallError;
use kvm_ioctls::VcpuFd;

/// Vector of the breakpoint exception.
const BREAKPOINT: u8 = 3;
/// Alignment-check flag, which STAC sets and CLAC clears.
const FLAG_AC: u64 = 1 << 18;

/// What to do instead of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FixUp {
    /// INT3: raise #BP, with RIP behind the instruction.
    Breakpoint,
    /// FWAIT: skip this many bytes.
    Skip(u64),
    /// CLAC: clear the flag.
    ClearAc,
    /// STAC: set the flag.
    SetAc,
}

fn find(instruction: &[u8]) -> Option<FixUp> {
    match instruction {
        [0xcc, ..] => Some(FixUp::Breakpoint),
        [0x9b, ..] => Some(FixUp::Skip(1)),
        [0x0f, 0x01, 0xca, ..] => Some(FixUp::ClearAc),
        [0x0f, 0x01, 0xcb, ..] => Some(FixUp::SetAc),
        _ => None,
    }
}

/// Does the instruction that starts with these bytes, at the vCPU's RIP. Returns whether it is one of ours.
///
/// # Errors
/// [`CallError`] if KVM refuses the new state.
pub(crate) fn apply(vcpu: &VcpuFd, instruction: &[u8]) -> Result<bool, CallError> {
    let Some(fix_up) = find(instruction) else {
        return Ok(false);
    };
    let mut regs = vcpu.get_regs().map_err(CallError::of("KVM_GET_REGS"))?;
    let length = match fix_up {
        FixUp::Breakpoint => 1,
        FixUp::Skip(length) => length,
        FixUp::ClearAc => {
            regs.rflags &= !FLAG_AC;
            3
        }
        FixUp::SetAc => {
            regs.rflags |= FLAG_AC;
            3
        }
    };
    regs.rip = regs.rip.wrapping_add(length);
    vcpu.set_regs(&regs).map_err(CallError::of("KVM_SET_REGS"))?;
    if fix_up == FixUp::Breakpoint {
        let mut events = vcpu.get_vcpu_events().map_err(CallError::of("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.pending = 0;
        events.exception.nr = BREAKPOINT;
        events.exception.has_error_code = 0;
        vcpu.set_vcpu_events(&events).map_err(CallError::of("KVM_SET_VCPU_EVENTS"))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_knows_the_refused_instructions_and_nothing_else() {
        assert_eq!(find(&[0xcc, 0x90]), Some(FixUp::Breakpoint));
        assert_eq!(find(&[0x9b]), Some(FixUp::Skip(1)));
        assert_eq!(find(&[0x0f, 0x01, 0xca]), Some(FixUp::ClearAc));
        assert_eq!(find(&[0x0f, 0x01, 0xcb, 0x0f]), Some(FixUp::SetAc));
        for other in [&[][..], &[0x0f], &[0x0f, 0x01], &[0x0f, 0x01, 0xc1], &[0x90, 0xcc]] {
            assert_eq!(find(other), None);
        }
    }
}
