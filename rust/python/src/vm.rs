//! The low-level machine, in this process.

use crate::enter::enter;
use crate::error::{ToPython, config, other};
use crate::exits;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use microvm_machine::{Exit, KickSignal, Kicker, memory};
use microvm_sandbox::Interrupted;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Longest time in guest code between two looks for signals.
const SLICE: Duration = Duration::from_millis(100);

/// General registers in the order of `microvm.vm.Regs`: rax rbx rcx rdx rsi rdi rsp rbp r8…r15 rip rflags.
type Regs = [u64; 18];
/// (base, limit, selector, type, present, dpl, db, s, l, g, avl).
type Segment = (u64, u32, u16, u8, u8, u8, u8, u8, u8, u8, u8);
/// (cs ds es fs gs ss tr ldt), (gdt idt), (cr0 cr2 cr3 cr4 cr8 efer apic_base).
type Sregs = ([Segment; 8], [(u64, u16); 2], [u64; 7]);

/// Which process made a machine: KVM serves no other, and a child of `fork` does not have the guest's memory.
#[derive(Clone, Copy)]
struct Owner(u32);

impl Owner {
    fn check(self, py: Python<'_>) -> PyResult<()> {
        if self.0 == std::process::id() {
            return Ok(());
        }
        let words =
            format!("this machine belongs to process {}; hint: make machines after the fork, in the child", self.0);
        Err(other(py, &words))
    }
}

/// A machine without devices.
#[pyclass(frozen, module = "microvm._microvm")]
pub struct Vm {
    vm: Mutex<microvm_machine::Vm>,
    memory: GuestMemoryMmap,
    size: u64,
    signal: KickSignal,
    owner: Owner,
}

impl Vm {
    fn outside(&self, py: Python<'_>, address: u64, length: usize) -> PyErr {
        let allowed = format!("within the {} bytes of guest memory", self.size);
        config(py, "address", &format!("{address:#x} with {length} bytes"), &allowed)
    }
}

#[pymethods]
impl Vm {
    #[new]
    fn new(py: Python<'_>, memory: u64, cpus: u8, kick_signal: Option<i32>) -> PyResult<Self> {
        let signal = kick_signal.map_or_else(KickSignal::install_default, KickSignal::install);
        let signal = signal.map_err(|error| other(py, &error.to_string()))?;
        let backend = enter(py, |_| microvm_machine::Backend::detect())?;
        let ram = memory::ram(memory).map_err(|error| config(py, "memory", &memory.to_string(), &error.to_string()))?;
        let vm = enter(py, |_| {
            let vm = microvm_machine::Vm::new(&backend, cpus)?;
            vm.add_memory(&ram)?;
            Ok::<_, microvm_machine::VmError>(vm)
        })?;
        Ok(Self { vm: Mutex::new(vm), memory: ram, size: memory, signal, owner: Owner(std::process::id()) })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    fn read<'py>(&self, py: Python<'py>, address: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.owner.check(py)?;
        // Before the bytes are allocated, which a wrong length should not cause.
        if u64::try_from(length).is_ok_and(|length| length > self.size) {
            return Err(self.outside(py, address, length));
        }
        PyBytes::new_with(py, length, |bytes| {
            self.memory.read_slice(bytes, GuestAddress(address)).map_err(|_| self.outside(py, address, length))
        })
    }

    fn write(&self, py: Python<'_>, address: u64, data: &[u8]) -> PyResult<()> {
        self.owner.check(py)?;
        if !self.memory.check_range(address, data.len()) {
            return Err(self.outside(py, address, data.len()));
        }
        self.memory.write_slice(data, GuestAddress(address)).map_err(|_| self.outside(py, address, data.len()))
    }

    fn vcpu(&self, py: Python<'_>, index: u8) -> PyResult<Vcpu> {
        self.owner.check(py)?;
        let vm = self.vm.lock().unwrap_or_else(PoisonError::into_inner);
        let vcpu = vm.create_vcpu(index, self.signal).map_err(|error| error.to_python(py))?;
        Ok(Vcpu { kicker: vcpu.kicker(), vcpu: Mutex::new(vcpu), owner: self.owner })
    }
}

/// Whether all of a range is guest memory, so that a write happens whole or not at all.
trait CheckRange {
    fn check_range(&self, address: u64, length: usize) -> bool;
}

impl CheckRange for GuestMemoryMmap {
    fn check_range(&self, address: u64, length: usize) -> bool {
        vm_memory::GuestMemoryBackend::check_range(self, GuestAddress(address), length)
    }
}

/// One virtual CPU.
#[pyclass(frozen, module = "microvm._microvm")]
pub struct Vcpu {
    vcpu: Mutex<microvm_machine::Vcpu>,
    kicker: Kicker,
    owner: Owner,
}

impl Vcpu {
    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, microvm_machine::Vcpu>> {
        self.owner.check(py)?;
        match self.vcpu.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(error)) => Ok(error.into_inner()),
            Err(TryLockError::WouldBlock) => Err(other(py, "this vCPU runs in another thread; hint: kick() it first")),
        }
    }
}

#[pymethods]
impl Vcpu {
    fn run(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        let limit = match timeout {
            None => None,
            Some(seconds) => Some(
                Duration::try_from_secs_f64(seconds)
                    .map_err(|error| config(py, "timeout", &seconds.to_string(), &error.to_string()))?,
            ),
        };
        self.owner.check(py)?;
        let exit = enter(py, |check| {
            let mut vcpu = match self.vcpu.try_lock() {
                Ok(guard) => guard,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok::<_, RunError>(None),
            };
            let begun = Instant::now();
            loop {
                let left = limit.map_or(SLICE, |limit| limit.saturating_sub(begun.elapsed()).min(SLICE));
                let exit = vcpu.run(Some(left)).map_err(RunError::Vcpu)?;
                let over = limit.is_some_and(|limit| begun.elapsed() >= limit);
                if matches!(exit, Exit::Interrupted | Exit::Timeout) {
                    check().map_err(RunError::Interrupted)?;
                }
                if over || !matches!(exit, Exit::Timeout) {
                    return Ok(Some(exit));
                }
            }
        })?;
        match exit {
            Some(exit) => exits::to_python(py, exit),
            None => Err(other(py, "this vCPU runs in another thread; hint: one thread at a time")),
        }
    }

    fn answer(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        self.lock(py)?.answer(data).map_err(|error| error.to_python(py))
    }

    fn kick(&self, py: Python<'_>) -> PyResult<()> {
        self.owner.check(py)?;
        self.kicker.kick();
        Ok(())
    }

    fn regs(&self, py: Python<'_>) -> PyResult<Regs> {
        let regs = self.lock(py)?.regs().map_err(|error| error.to_python(py))?;
        let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } =
            regs;
        Ok([rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags])
    }

    fn set_regs(&self, py: Python<'_>, regs: Regs) -> PyResult<()> {
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags] = regs;
        let regs =
            kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags };
        self.lock(py)?.set_regs(&regs).map_err(|error| error.to_python(py))
    }

    fn sregs(&self, py: Python<'_>) -> PyResult<Sregs> {
        let sregs = self.lock(py)?.sregs().map_err(|error| error.to_python(py))?;
        let segments =
            [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr, sregs.ldt].map(segment_to_python);
        let tables = [sregs.gdt, sregs.idt].map(|table| (table.base, table.limit));
        let control = [sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer, sregs.apic_base];
        Ok((segments, tables, control))
    }

    fn set_sregs(
        &self,
        py: Python<'_>,
        segments: [Segment; 8],
        tables: [(u64, u16); 2],
        control: [u64; 7],
    ) -> PyResult<()> {
        let vcpu = self.lock(py)?;
        let now = vcpu.sregs().map_err(|error| error.to_python(py))?;
        let [cs, ds, es, fs, gs, ss, tr, ldt] = segments.map(segment_from_python);
        let [gdt, idt] = tables.map(|(base, limit)| kvm_dtable { base, limit, ..Default::default() });
        let [cr0, cr2, cr3, cr4, cr8, efer, apic_base] = control;
        let sregs =
            kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, ..now };
        vcpu.set_sregs(&sregs).map_err(|error| error.to_python(py))
    }

    fn translate(&self, py: Python<'_>, address: u64) -> PyResult<Option<u64>> {
        self.lock(py)?.translate(address).map_err(|error| error.to_python(py))
    }
}

fn segment_to_python(segment: kvm_segment) -> Segment {
    (
        segment.base,
        segment.limit,
        segment.selector,
        segment.type_,
        segment.present,
        segment.dpl,
        segment.db,
        segment.s,
        segment.l,
        segment.g,
        segment.avl,
    )
}

fn segment_from_python(segment: Segment) -> kvm_segment {
    let (base, limit, selector, type_, present, dpl, db, s, l, g, avl) = segment;
    let unusable = u8::from(present == 0);
    kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, padding: 0 }
}

enum RunError {
    Vcpu(microvm_machine::VcpuError),
    Interrupted(Interrupted),
}

impl ToPython for RunError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Vcpu(error) => error.to_python(py),
            // Without an exception of its own only when the interpreter shuts down.
            Self::Interrupted(error) => other(py, &error.to_string()),
        }
    }
}
