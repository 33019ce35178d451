//! A KVM machine, from the bare ioctls to a running guest.
//!
//! * [`backend`]: hardware or software KVM, decided once; everything that differs between the two.
//! * [`memory`], [`vm`], [`vcpu`], [`exit`], [`kick`]: the low-level machine, usable piece by piece.
//! * [`bus`], [`legacy`]: ports and MMIO windows, and the few PC devices a guest expects.
//! * [`x86`], [`boot`]: CPUID, MSRs and tables; kernel, initrd and boot parameters in guest memory.
//! * [`machine`]: the recipe that puts all of it together; [`diagnostics`], [`profile`]: what it can say afterwards.
//! * [`fixups`]: instructions that software KVM's emulator refuses.

pub mod backend;
pub mod boot;
pub mod bus;
pub mod diagnostics;
pub mod error;
pub mod exit;
pub mod fixups;
pub mod kick;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod profile;
mod run_loop;
mod run_page;
pub mod vcpu;
pub mod vm;
pub mod x86;

pub use backend::{Backend, Kind, KvmError};
pub use diagnostics::MachineEnd;
pub use error::CallError;
pub use exit::Exit;
pub use kick::{KickError, KickSignal, Kicker};
pub use machine::{Files, Machine, MachineError, NewDevice, Origin};
pub use vcpu::{Vcpu, VcpuError};
pub use vm::{Vm, VmError};
