//! One virtual CPU: its registers, and `run` until something happens.

use crate::error::CallError;
use crate::exit::{Exit, InternalError};
use crate::fixups;
use crate::kick::{KickError, KickSignal, Kicker, Ticker};
use crate::run_page::RunPage;
use crate::vm::VmInner;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// After the time given to `run`, the thread is signalled this often, in case a signal came too early.
const REPEAT: Duration = Duration::from_millis(10);

/// What can go wrong with a vCPU, apart from what the guest does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused a call.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The kick signal cannot be used.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// An answer that nobody asked for, or of the wrong length.
    #[error(
        "answer of {found} bytes to a read of {expected} bytes; hint: answer each IoIn and MmioRead at most once, before the next run"
    )]
    Answer {
        /// Bytes the guest reads; 0 if it reads nothing now.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

/// A read that waits for its answer, with its length in bytes.
#[derive(Debug, Clone, Copy)]
enum Pending {
    Io(usize),
    Mmio(usize),
}

/// A virtual CPU. Belongs to one thread at a time; other threads reach it through [`Vcpu::kicker`].
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    fix_ups: bool,
    kicker: Kicker,
    pending: Option<Pending>,
    /// Keeps guest memory mapped for as long as KVM may touch it.
    vm: Arc<VmInner>,
}

impl Vcpu {
    pub(crate) fn new(
        fd: VcpuFd,
        index: u8,
        fix_ups: bool,
        run_size: usize,
        signal: KickSignal,
        vm: Arc<VmInner>,
    ) -> Result<Self, CallError> {
        let page = RunPage::map(&fd, run_size)?;
        let kicker = Kicker::new(index, signal, page);
        Ok(Self { fd, index, fix_ups, kicker, pending: None, vm })
    }

    /// Number of this vCPU, which is also its local APIC's.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Handle that gets this vCPU out of `run` from another thread.
    pub fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    /// Runs guest code until something happens, at most for `timeout`.
    ///
    /// [`Exit::IoIn`] and [`Exit::MmioRead`] want an [`Vcpu::answer`]. A timeout of zero runs no guest code, but
    /// completes the access before.
    ///
    /// # Errors
    /// [`VcpuError::Call`] if KVM or the timer refuses; in a child of `fork` KVM always does.
    pub fn run(&mut self, timeout: Option<Duration>) -> Result<Exit, VcpuError> {
        let limit = timeout.map(|timeout| (Instant::now(), timeout));
        let _ticker = match timeout {
            Some(Duration::ZERO) => {
                self.kicker.page().set_immediate_exit(true);
                None
            }
            Some(timeout) => Some(Ticker::start(self.kicker.signal(), timeout, REPEAT)?),
            None => None,
        };
        loop {
            self.pending = None;
            self.kicker.enter();
            let result = self.fd.run();
            let errno = result.as_ref().err().map(|error| error.errno());
            let kicked = self.kicker.leave(errno == Some(libc::EINTR));
            let exit = match result {
                Ok(exit) => owned(exit, &self.kicker, &mut self.pending),
                // A vCPU that waited for its start signal got it.
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) if error.errno() == libc::EINTR => {
                    let over = limit.is_some_and(|(start, timeout)| start.elapsed() >= timeout);
                    return Ok(if over && !kicked { Exit::Timeout } else { Exit::Interrupted });
                }
                Err(errno) => {
                    return Err(CallError { call: "KVM_RUN", errno }.into());
                }
            };
            let Exit::InternalError(_) = exit else {
                return Ok(exit);
            };
            let error = self.internal_error();
            let fixed = match error.instruction() {
                Some(instruction) if self.fix_ups => fixups::apply(&self.fd, &instruction)?,
                _ => false,
            };
            if !fixed {
                return Ok(Exit::InternalError(error));
            }
            // A guest made of such instructions is hardly ever inside KVM_RUN when the timer's signal comes.
            if limit.is_some_and(|(start, timeout)| start.elapsed() >= timeout) {
                self.kicker.page().set_immediate_exit(true);
            }
        }
    }

    /// Gives the guest what its last read returns.
    ///
    /// # Errors
    /// [`VcpuError::Answer`] unless the last exit was a read of exactly this many bytes.
    pub fn answer(&mut self, data: &[u8]) -> Result<(), VcpuError> {
        let expected = match self.pending {
            Some(Pending::Io(length) | Pending::Mmio(length)) => length,
            None => 0,
        };
        if expected != data.len() || expected == 0 {
            return Err(VcpuError::Answer { expected, found: data.len() });
        }
        match self.pending.take() {
            Some(Pending::Io(_)) => self.kicker.page().answer_io(data),
            Some(Pending::Mmio(_)) => self.kicker.page().answer_mmio(data),
            None => {}
        }
        Ok(())
    }

    /// General registers.
    ///
    /// # Errors
    /// [`CallError`] if KVM refuses.
    pub fn regs(&self) -> Result<kvm_regs, CallError> {
        self.fd.get_regs().map_err(CallError::of("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// [`CallError`] if KVM refuses.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), CallError> {
        self.fd.set_regs(regs).map_err(CallError::of("KVM_SET_REGS"))
    }

    /// Segments, tables and control registers.
    ///
    /// # Errors
    /// [`CallError`] if KVM refuses.
    pub fn sregs(&self) -> Result<kvm_sregs, CallError> {
        self.fd.get_sregs().map_err(CallError::of("KVM_GET_SREGS"))
    }

    /// Sets segments, tables and control registers.
    ///
    /// # Errors
    /// [`CallError`] if KVM finds them inconsistent.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), CallError> {
        self.fd.set_sregs(sregs).map_err(CallError::of("KVM_SET_SREGS"))
    }

    /// Guest physical address of a virtual one, as the vCPU's page tables are now; `None` if it is not mapped.
    ///
    /// # Errors
    /// [`CallError`] if KVM refuses.
    pub fn translate(&self, address: u64) -> Result<Option<u64>, CallError> {
        let translation = self.fd.translate_gva(address).map_err(CallError::of("KVM_TRANSLATE"))?;
        Ok((translation.valid != 0).then_some(translation.physical_address))
    }

    /// Reads guest memory at a virtual address, as far as it is mapped and backed by memory.
    pub fn read_virtual(&self, address: u64, length: usize) -> Vec<u8> {
        let memory = self.vm.memory();
        let bytes = (0u64..).take(length).map_while(|offset| {
            let physical = self.translate(address.checked_add(offset)?).ok()??;
            memory.as_ref()?.read_obj::<u8>(GuestAddress(physical)).ok()
        });
        bytes.collect()
    }

    /// Frequency of the guest's time stamp counter in kHz.
    ///
    /// # Errors
    /// [`CallError`] if the host's counter is not stable.
    pub fn tsc_khz(&self) -> Result<u32, CallError> {
        self.fd.get_tsc_khz().map_err(CallError::of("KVM_GET_TSC_KHZ"))
    }

    /// Whether only another vCPU can wake this one, as of the last exit: it sleeps in HLT with interrupts off, or was
    /// never started.
    pub(crate) fn sleeps_for_good(&self) -> bool {
        !self.kicker.page().interrupts_enabled()
            && self.fd.get_mp_state().is_ok_and(|state| {
                matches!(state.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED)
            })
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    fn internal_error(&mut self) -> InternalError {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so this is the union's live member; all its fields are
        // integers.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
        InternalError { suberror: internal.suberror, data: internal.data.iter().copied().take(count).collect() }
    }
}

/// Takes an exit's data out of `kvm_run`; reads are answered with ones until somebody knows better.
fn owned(exit: VcpuExit<'_>, kicker: &Kicker, pending: &mut Option<Pending>) -> Exit {
    match exit {
        VcpuExit::IoIn(port, data) => {
            data.fill(0xff);
            *pending = Some(Pending::Io(data.len()));
            let io = kicker.page().io();
            Exit::IoIn { port, size: io.size, count: io.count }
        }
        VcpuExit::IoOut(port, data) => Exit::IoOut { port, size: kicker.page().io().size, data: data.to_vec() },
        VcpuExit::MmioRead(address, data) => {
            data.fill(0xff);
            *pending = Some(Pending::Mmio(data.len()));
            Exit::MmioRead { address, size: u8::try_from(data.len()).unwrap_or(u8::MAX) }
        }
        VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data: data.to_vec() },
        VcpuExit::Hlt => Exit::Halt,
        VcpuExit::Shutdown => Exit::Shutdown,
        VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent { kind },
        VcpuExit::Debug(debug) => Exit::Debug { address: debug.pc, exception: debug.exception },
        VcpuExit::InternalError => Exit::InternalError(InternalError { suberror: 0, data: Vec::new() }),
        VcpuExit::FailEntry(reason, cpu) => Exit::FailEntry { reason, cpu },
        VcpuExit::MemoryFault { flags, gpa, size } => Exit::MemoryFault { flags, address: gpa, size },
        VcpuExit::Intr => Exit::Interrupted,
        other => Exit::Unexpected { what: format!("{other:?}") },
    }
}
