//! Queue configuration as the driver writes it, and its one validation.

use super::ActiveQueue;
use crate::interrupt::Interrupt;
use std::sync::Arc;
use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Registers of one queue before DRIVER_OK. Everything in it is the guest's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// Greatest size the device offers.
    pub limit: u16,
    /// QueueNum.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc: the descriptor table.
    pub descriptors: u64,
    /// QueueDriver: the available ring.
    pub available: u64,
    /// QueueDevice: the used ring.
    pub used: u64,
}

/// Why a queue cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The driver left it out.
    #[error("queue {queue} is not ready: the driver must enable every queue before DRIVER_OK")]
    NotReady {
        /// Queue index.
        queue: usize,
    },
    /// QueueNum.
    #[error("queue {queue} has size {size}: a power of two, 1 to {limit}")]
    Size {
        /// Queue index.
        queue: usize,
        /// What the driver asked for.
        size: u32,
        /// Greatest size offered.
        limit: u16,
    },
    /// An address is 0, not aligned, or the part is not within RAM.
    #[error("queue {queue}: {part} at {address:#x} is misaligned or not within RAM")]
    Address {
        /// Queue index.
        queue: usize,
        /// Which part.
        part: &'static str,
        /// Guest physical address.
        address: u64,
    },
    /// Two parts, of one queue or of two, share bytes.
    #[error("queue {queue}: {part} at {address:#x} overlaps another ring")]
    Overlap {
        /// Queue index.
        queue: usize,
        /// Which part.
        part: &'static str,
        /// Guest physical address.
        address: u64,
    },
}

/// First byte and one past the last.
pub(super) type Range = (u64, u64);

impl QueueSetup {
    /// The state after reset.
    pub fn new(limit: u16) -> QueueSetup {
        QueueSetup { limit, size: 0, ready: false, descriptors: 0, available: 0, used: 0 }
    }

    /// Back to the state after reset.
    pub fn reset(&mut self) {
        *self = QueueSetup::new(self.limit);
    }

    /// The three parts with their sizes and alignments (VIRTIO 1.2, 2.7).
    fn parts(&self, size: u16) -> [(&'static str, u64, u64, u64); 3] {
        let size = u64::from(size);
        [
            ("descriptor table", self.descriptors, size.saturating_mul(16), 16),
            ("available ring", self.available, size.saturating_mul(2).saturating_add(6), 2),
            ("used ring", self.used, size.saturating_mul(8).saturating_add(6), 4),
        ]
    }
}

/// Validates all queues of a device at once and makes them active.
///
/// # Errors
/// [`SetupError`] for the first queue that breaks a rule; then none becomes active.
pub fn validate(
    setups: &[QueueSetup],
    memory: &GuestMemoryMmap,
    event_idx: bool,
    interrupt: &Arc<Interrupt>,
) -> Result<Vec<ActiveQueue>, SetupError> {
    let mut taken: Vec<Range> = Vec::new();
    let mut active = Vec::new();
    for (queue, setup) in setups.iter().enumerate() {
        if !setup.ready {
            return Err(SetupError::NotReady { queue });
        }
        let bad_size = SetupError::Size { queue, size: setup.size, limit: setup.limit };
        let size = match u16::try_from(setup.size) {
            Ok(size) if size.is_power_of_two() && size <= setup.limit => size,
            _ => return Err(bad_size),
        };
        let first = taken.len();
        for (part, address, length, alignment) in setup.parts(size) {
            let bad = SetupError::Address { queue, part, address };
            let Some(end) = address.checked_add(length) else {
                return Err(bad);
            };
            let bytes = usize::try_from(length).unwrap_or(usize::MAX);
            if address == 0
                || address.checked_rem(alignment) != Some(0)
                || !memory.check_range(GuestAddress(address), bytes, Permissions::ReadWrite)
            {
                return Err(bad);
            }
            if taken.iter().any(|&(start, stop)| address < stop && start < end) {
                return Err(SetupError::Overlap { queue, part, address });
            }
            taken.push((address, end));
        }
        // The conversion checks size and alignments once more, so that no value is ignored silently.
        let state = QueueState {
            max_size: setup.limit,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size,
            ready: true,
            desc_table: setup.descriptors,
            avail_ring: setup.available,
            used_ring: setup.used,
        };
        let checked = Queue::try_from(state).map_err(|_| bad_size)?;
        let rings = taken.get(first..).unwrap_or_default().to_vec();
        active.push(ActiveQueue::new(checked, rings, Arc::clone(interrupt)));
    }
    Ok(active)
}
