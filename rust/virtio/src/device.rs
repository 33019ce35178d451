//! What the transport asks of a device.

use crate::queue::{ActiveQueue, Malformed};
use std::io;
use std::os::fd::BorrowedFd;
use vm_memory::GuestMemoryMmap;

/// Whether a device has done all it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It waits for a kick, or for its own events.
    Done,
    /// Its budget is used up and there is more: call again, after looking at other work.
    More,
}

impl Progress {
    /// More if either is.
    #[must_use]
    pub fn or(self, other: Progress) -> Progress {
        if self == Progress::More { self } else { other }
    }
}

/// A virtio device. Lives on its own worker thread, which makes every call but those before
/// [`crate::mmio::MmioTransport::spawn`] returns; so it needs no lock.
pub trait Device: Send {
    /// Device type (VIRTIO 1.2, section 5).
    fn device_id(&self) -> u32;

    /// Greatest size of each queue, a power of two each. The driver must enable them all.
    fn queue_limits(&self) -> &'static [u16];

    /// Features of the device type; the transport adds its own (VERSION_1, EVENT_IDX).
    fn features(&self) -> u64;

    /// The device configuration space. Read once, when the transport is made, so that a vCPU reading it
    /// never waits for the worker. Guest writes to it are ignored.
    fn config_space(&self) -> Vec<u8>;

    /// The driver is ready. Queues are validated and moved in, one for each of [`Device::queue_limits`];
    /// `features` are those negotiated.
    ///
    /// # Errors
    /// If the host refuses something; the device then needs a reset.
    fn activate(&mut self, memory: GuestMemoryMmap, queues: Vec<ActiveQueue>, features: u64) -> io::Result<()>;

    /// The driver kicked `queue`, or the last call said [`Progress::More`]. Handles a bounded number of chains.
    ///
    /// # Errors
    /// [`Malformed`] if the guest broke a rule; the device is then reset and needs a reset by the driver.
    fn process(&mut self, queue: usize) -> Result<Progress, Malformed>;

    /// Back to the state before [`Device::activate`]: drops queues and memory, closes what belongs to the guest.
    fn reset(&mut self);

    /// A descriptor that is readable when [`Device::process_events`] has work (an epoll instance, for instance).
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Handles a bounded amount of the device's own events. Called whether the device is active or not.
    ///
    /// # Errors
    /// As [`Device::process`].
    fn process_events(&mut self) -> Result<Progress, Malformed> {
        Ok(Progress::Done)
    }
}
