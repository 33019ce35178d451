//! Guests of a few instructions, and the KVM to run them on.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests fail by panicking"
)]

use microvm_machine::{Backend, Files, KickSignal, KvmError, Machine, MachineEnd, Origin, Vcpu, Vm, memory};
use microvm_protocol::spec::MachineSpec;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use vm_memory::{Bytes, GuestAddress};

/// Where real-mode guests are put and start.
pub const CODE: u64 = 0x1000;
/// Where 64-bit guests are put and start: where kernels usually lie.
pub const KERNEL: u64 = 0x10_0000;

/// The host's KVM, or `None`, said aloud, where there is none. One that is there and cannot be used is a failure.
pub fn backend() -> Option<Backend> {
    match Backend::detect() {
        Ok(backend) => Some(backend),
        Err(error @ KvmError::Missing(_)) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A vCPU in real mode at [`CODE`], on a machine with 64 KiB of memory and no interrupt controllers.
pub fn real_mode(backend: &Backend, code: &[u8]) -> Vcpu {
    let vm = Vm::new(backend, 1).unwrap();
    let memory = memory::ram(0x1_0000).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    vm.add_memory(&memory).unwrap();
    let vcpu = vm.create_vcpu(0, KickSignal::install_default().unwrap()).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x8000, 2);
    vcpu.set_regs(&regs).unwrap();
    vcpu
}

/// An ELF kernel that consists of `code`, in 64-bit mode at [`KERNEL`].
pub fn kernel(code: &[u8]) -> File {
    const HEADERS: u64 = 64 + 56;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes()); // executable, x86-64
    }
    elf.extend(1u32.to_le_bytes());
    for word in [KERNEL, 64, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1u32, 7] {
        elf.extend(word.to_le_bytes()); // PT_LOAD, rwx
    }
    let length = code.len() as u64;
    for word in [HEADERS, KERNEL, KERNEL, length, length, 8] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file.rewind().unwrap();
    file
}

/// A machine of 64 MiB and one vCPU.
pub fn spec() -> MachineSpec {
    MachineSpec {
        vcpus: 1,
        memory: 64 << 20,
        initrd: false,
        command_line: String::new(),
        drives: Vec::new(),
        console: false,
        profile_us: None,
    }
}

/// Assembles and starts a machine whose kernel is `code`.
pub fn start(
    backend: &Backend,
    spec: &MachineSpec,
    code: &[u8],
    console: Option<OwnedFd>,
) -> (Machine, Receiver<MachineEnd>) {
    let files = Files { kernel: kernel(code), initrd: None, console };
    let mut machine = Machine::assemble(backend, spec, Vec::new(), Origin::Boot(files)).unwrap();
    let (ends, ended) = channel();
    machine.start(Box::new(move |end| ends.send(end).unwrap())).unwrap();
    (machine, ended)
}
