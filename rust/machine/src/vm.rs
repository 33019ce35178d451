//! One virtual machine of KVM: memory slots, interrupt controllers, event descriptors, vCPUs.

use crate::backend::Backend;
use crate::error::CallError;
use crate::kick::KickSignal;
use crate::memory;
use crate::vcpu::Vcpu;
use crate::x86::cpuid;
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Three pages that VT-x without unrestricted guest mode needs, just below the BIOS area at the end of 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why a machine could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM refused a call.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Regions overlap.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// More vCPUs than the machine was made for.
    #[error("vCPU {index} of a machine with {count}")]
    NoSuchVcpu {
        /// What was asked for.
        index: u8,
        /// What [`Vm::new`] was told.
        count: u8,
    },
}

/// A virtual machine. vCPUs keep it alive.
pub struct Vm {
    inner: Arc<VmInner>,
    cpuid: CpuId,
    vcpus: u8,
    fix_ups: bool,
}

/// What must outlive every vCPU: KVM reads and writes guest memory through its host addresses.
pub(crate) struct VmInner {
    fd: VmFd,
    memory: Mutex<Option<GuestMemoryMmap>>,
}

impl VmInner {
    pub(crate) fn memory(&self) -> Option<GuestMemoryMmap> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Vm {
    /// An empty machine for `vcpus` vCPUs.
    ///
    /// # Errors
    /// [`VmError::Call`] if KVM refuses.
    pub fn new(backend: &Backend, vcpus: u8) -> Result<Self, VmError> {
        let fd = loop {
            match backend.kvm().create_vm() {
                // A signal that came meanwhile, not a refusal.
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(CallError::of("KVM_CREATE_VM"))?,
            }
        };
        fd.set_tss_address(TSS_ADDRESS).map_err(CallError::of("KVM_SET_TSS_ADDR"))?;
        Ok(Self {
            inner: Arc::new(VmInner { fd, memory: Mutex::new(None) }),
            cpuid: backend.cpuid()?,
            vcpus,
            fix_ups: backend.needs_fix_ups(),
        })
    }

    /// Adds memory to the guest.
    ///
    /// Do this before [`Vm::create_interrupt_controllers`]: afterwards, software KVM waits 5 to 11 ms in the first call.
    ///
    /// # Errors
    /// [`VmError`] if a region overlaps another or KVM refuses it.
    pub fn add_memory(&self, added: &GuestMemoryMmap) -> Result<(), VmError> {
        let mut guard = self.inner.memory.lock().unwrap_or_else(PoisonError::into_inner);
        for region in added.iter() {
            let present = guard.as_ref().map_or(0, GuestMemoryBackend::num_regions);
            let memory = memory::insert(guard.as_ref(), region)?;
            let slot = kvm_userspace_memory_region {
                slot: u32::try_from(present).unwrap_or(u32::MAX),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping that this machine keeps until its last vCPU is gone.
            unsafe { self.inner.fd.set_user_memory_region(slot) }
                .map_err(CallError::of("KVM_SET_USER_MEMORY_REGION"))?;
            *guard = Some(memory);
        }
        Ok(())
    }

    /// All memory added so far; `None` if there is none.
    pub fn memory(&self) -> Option<GuestMemoryMmap> {
        self.inner.memory()
    }

    /// Local APICs, IOAPIC, PICs and PIT, all inside KVM. Before the first vCPU.
    ///
    /// # Errors
    /// [`VmError::Call`] if KVM refuses.
    pub fn create_interrupt_controllers(&self) -> Result<(), VmError> {
        self.inner.fd.create_irq_chip().map_err(CallError::of("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.inner.fd.create_pit2(pit).map_err(CallError::of("KVM_CREATE_PIT2"))?;
        Ok(())
    }

    /// A descriptor that raises interrupt line `line` (edge) whenever it is written.
    ///
    /// # Errors
    /// [`VmError::Call`] if the host has no more descriptors or KVM refuses.
    pub fn interrupt(&self, line: u32) -> Result<EventFd, VmError> {
        let event = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(CallError::of_io("eventfd"))?;
        self.inner.fd.register_irqfd(&event, line).map_err(CallError::of("KVM_IRQFD"))?;
        Ok(event)
    }

    /// Signals `event` whenever the guest writes the 32-bit `value` to MMIO `address`, without an exit.
    ///
    /// # Errors
    /// [`VmError::Call`] if KVM refuses.
    pub fn notify_on_write(&self, address: u64, value: u32, event: &EventFd) -> Result<(), VmError> {
        self.inner
            .fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(CallError::of("KVM_IOEVENTFD"))?;
        Ok(())
    }

    /// Creates vCPU `index`, in the state of a PC after power-on, with the CPUID of this machine.
    ///
    /// # Errors
    /// [`VmError::NoSuchVcpu`], or [`VmError::Call`] if KVM refuses.
    pub fn create_vcpu(&self, index: u8, signal: KickSignal) -> Result<Vcpu, VmError> {
        if index >= self.vcpus {
            return Err(VmError::NoSuchVcpu { index, count: self.vcpus });
        }
        let fd = self.inner.fd.create_vcpu(index.into()).map_err(CallError::of("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.cpuid, index, self.vcpus).map_err(CallError::of("KVM_SET_CPUID2"))?;
        fd.set_cpuid2(&cpuid).map_err(CallError::of("KVM_SET_CPUID2"))?;
        Ok(Vcpu::new(fd, index, self.fix_ups, self.inner.fd.run_size(), signal, Arc::clone(&self.inner))?)
    }
}
