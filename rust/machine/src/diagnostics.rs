//! What a machine says about its end.

use crate::vcpu::Vcpu;
use kvm_bindings::{kvm_regs, kvm_sregs};
use microvm_protocol::control::EndReason;
use std::fmt;

/// Bytes of code shown from RIP on.
const CODE: usize = 16;
/// RIP after a reset.
const RESET_VECTOR: u64 = 0xfff0;

/// How and why a machine ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineEnd {
    /// The kind of end.
    pub reason: EndReason,
    /// For a person: what happened and, where the guest is at fault, the state of its vCPU.
    pub message: String,
}

impl MachineEnd {
    /// The guest did what no guest may do; `vcpu` is the one that did it.
    pub(crate) fn fault(what: &str, vcpu: &Vcpu) -> Self {
        Self { reason: EndReason::GuestFault, message: format!("{what}\n{}", CpuState::of(vcpu)) }
    }

    /// The guest met an exception it could not take, nor the two that came of it.
    pub(crate) fn triple_fault(vcpu: &Vcpu) -> Self {
        const WHAT: &str = "the guest caused a triple fault";
        let regs = vcpu.regs();
        // SVM does not keep the state of a triple fault: KVM resets the vCPU.
        if regs.is_ok_and(|regs| regs.rip == RESET_VECTOR) {
            let message = format!("{WHAT}; this processor does not say where");
            return Self { reason: EndReason::GuestFault, message };
        }
        Self::fault(WHAT, vcpu)
    }

    /// The guest reset the machine.
    pub(crate) fn reset(how: &str) -> Self {
        Self { reason: EndReason::Reset, message: how.into() }
    }

    /// The host refused something.
    pub(crate) fn host(error: &dyn fmt::Display) -> Self {
        Self { reason: EndReason::Host, message: error.to_string() }
    }
}

/// Registers and code of a vCPU, as far as they can be read.
#[derive(Debug, Clone)]
pub struct CpuState {
    index: u8,
    regs: Option<kvm_regs>,
    sregs: Option<kvm_sregs>,
    code: Vec<u8>,
}

impl CpuState {
    /// The state of a vCPU that is not running now.
    pub fn of(vcpu: &Vcpu) -> Self {
        let regs = vcpu.regs().ok();
        let sregs = vcpu.sregs().ok();
        let code = match (&regs, &sregs) {
            (Some(regs), Some(sregs)) => {
                // In 64-bit code the base of CS is 0.
                let base = if sregs.cs.l == 0 { sregs.cs.base } else { 0 };
                vcpu.read_virtual(base.wrapping_add(regs.rip), CODE)
            }
            _ => Vec::new(),
        };
        Self { index: vcpu.index(), regs, sregs, code }
    }
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(r) = &self.regs else {
            return write!(f, "vCPU {}: registers cannot be read", self.index);
        };
        writeln!(f, "vCPU {}: rip {:016x} rflags {:08x} rsp {:016x}", self.index, r.rip, r.rflags, r.rsp)?;
        writeln!(f, "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx)?;
        writeln!(f, "rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}", r.rsi, r.rdi, r.rbp, r.r8)?;
        writeln!(f, "r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}", r.r9, r.r10, r.r11, r.r12)?;
        writeln!(f, "r13 {:016x} r14 {:016x} r15 {:016x}", r.r13, r.r14, r.r15)?;
        if let Some(s) = &self.sregs {
            writeln!(f, "cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}", s.cr0, s.cr2, s.cr3, s.cr4, s.efer)?;
            writeln!(
                f,
                "cs {:x} (cpl {}) ss {:x} fs base {:x} gs base {:x} gdt {:x} idt {:x} tr {:x}",
                s.cs.selector, s.cs.dpl, s.ss.selector, s.fs.base, s.gs.base, s.gdt.base, s.idt.base, s.tr.selector
            )?;
        }
        f.write_str("code at rip:")?;
        if self.code.is_empty() {
            f.write_str(" not mapped")?;
        }
        self.code.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}
