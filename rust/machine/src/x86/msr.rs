//! Model-specific registers that a guest expects to find set at its entry.

use crate::error::CallError;
use crate::vcpu::Vcpu;
use kvm_bindings::{Msrs, kvm_msr_entry};

/// IA32_MTRR_DEF_TYPE.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs enabled, default type write-back. Without it Linux takes all memory for uncached and gives up on PAT.
const WRITE_BACK: u64 = (1 << 11) | 6;
/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations.
const FAST_STRINGS: u64 = 1;

const BOOT: [(u32, u64); 2] = [(MTRR_DEFAULT_TYPE, WRITE_BACK), (MISC_ENABLE, FAST_STRINGS)];

/// Sets the boot MSRs of one vCPU.
///
/// # Errors
/// [`CallError`] whose `call` names the register that KVM refused.
pub(crate) fn set_boot(vcpu: &Vcpu) -> Result<(), CallError> {
    let entries = BOOT.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let refused = |call, errno| CallError { call, errno: vmm_sys_util::errno::Error::new(errno) };
    let msrs = Msrs::from_entries(&entries).map_err(|_| refused("KVM_SET_MSRS", libc::E2BIG))?;
    match vcpu.fd().set_msrs(&msrs).map_err(CallError::of("KVM_SET_MSRS"))? {
        0 => Err(refused("KVM_SET_MSRS of IA32_MTRR_DEF_TYPE", libc::EINVAL)),
        1 => Err(refused("KVM_SET_MSRS of IA32_MISC_ENABLE", libc::EINVAL)),
        _ => Ok(()),
    }
}
