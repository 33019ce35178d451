//! The interrupt line of one device and the status register behind it (VIRTIO 1.2, 4.2.2, InterruptStatus).

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Bit of InterruptStatus: the device put buffers on a used ring.
pub const USED_BUFFER: u32 = 1;
/// Bit of InterruptStatus: the configuration (or DEVICE_NEEDS_RESET) changed.
pub const CONFIGURATION: u32 = 2;

/// Outside every lock of the transport: a slow disk never blocks a vCPU that acknowledges an interrupt.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// `event` is written once per interrupt; with KVM it is an edge-triggered irqfd.
    pub fn new(event: EventFd) -> Interrupt {
        Interrupt { status: AtomicU32::new(0), event }
    }

    /// Sets `bits` of the status register and raises the line.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // The only possible error is a full counter, and then the line is raised already.
        let _: io::Result<()> = self.event.write(1);
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK: bits that are not set stay so.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// After a device reset nothing is pending.
    pub fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
    }
}
