//! A second mapping of a vCPU's `kvm_run`, usable from any thread.

use crate::error::CallError;
use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as kvm_io};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

/// Offset of the `io` and `mmio` descriptions: both lie in the same union.
const UNION: usize = offset_of!(kvm_run, __bindgen_anon_1);
/// Offset of `mmio.data`: behind the address.
const MMIO_DATA: usize = UNION + 8;

/// The mapping. Lives as long as somebody may kick the vCPU.
#[derive(Debug)]
pub(crate) struct RunPage {
    address: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is shared memory that is only accessed through atomics, volatile reads and `write`,
// the latter two by the vCPU's own thread alone.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps `kvm_run` of `vcpu`; `size` is KVM_GET_VCPU_MMAP_SIZE.
    pub(crate) fn map(vcpu: &impl AsRawFd, size: usize) -> Result<Self, CallError> {
        let refused = |errno| CallError { call: "mmap of kvm_run", errno: vmm_sys_util::errno::Error::new(errno) };
        if size < size_of::<kvm_run>() {
            return Err(refused(libc::EINVAL));
        }
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let flags = (rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses touches no existing memory.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, flags.0, flags.1, fd, 0) }
            .map_err(|error| refused(error.raw_os_error()))?;
        match NonNull::new(address.cast()) {
            Some(address) => Ok(Self { address, size }),
            None => Err(refused(libc::ENOMEM)),
        }
    }

    /// While set, KVM_RUN returns EINTR before it enters the guest.
    pub(crate) fn set_immediate_exit(&self, value: bool) {
        // SAFETY: the field lies in the mapping, which lives as long as `self`; the kernel reads it as one byte.
        let flag = unsafe { AtomicU8::from_ptr(self.address.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        flag.store(value.into(), Ordering::SeqCst);
    }

    /// Description of the last KVM_EXIT_IO.
    pub(crate) fn io(&self) -> kvm_io {
        // SAFETY: inside the mapping (checked in `map`); plain integers, for which every bit pattern is valid.
        unsafe { self.address.as_ptr().add(UNION).cast::<kvm_io>().read_volatile() }
    }

    /// Answers the last read of a port.
    pub(crate) fn answer_io(&self, data: &[u8]) {
        if let Ok(offset) = usize::try_from(self.io().data_offset) {
            self.write(offset, data);
        }
    }

    /// Answers the last read of MMIO; at most 8 bytes.
    pub(crate) fn answer_mmio(&self, data: &[u8]) {
        self.write(MMIO_DATA, data.get(..8).unwrap_or(data));
    }

    /// Whether the guest takes interrupts, as of the last exit.
    pub(crate) fn interrupts_enabled(&self) -> bool {
        // SAFETY: inside the mapping (checked in `map`).
        unsafe { self.address.as_ptr().add(offset_of!(kvm_run, if_flag)).read_volatile() != 0 }
    }

    fn write(&self, offset: usize, data: &[u8]) {
        if offset.checked_add(data.len()).is_some_and(|end| end <= self.size) {
            // SAFETY: the destination lies in the mapping, checked on the line above; the vCPU is not running,
            // because its only user is the thread that calls this.
            unsafe {
                std::ptr::copy_nonoverlapping(data.as_ptr(), self.address.as_ptr().add(offset), data.len());
            }
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody holds a reference into it any more.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.size) };
    }
}
