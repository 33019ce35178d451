//! Virtqueues: from what the guest wrote to host memory, through one gate.
//!
//! [`QueueSetup`] collects what the driver writes to the registers. At DRIVER_OK it is validated once and becomes
//! an [`ActiveQueue`], whose configuration nothing changes any more. [`ActiveQueue::pop`] is the only place where
//! a descriptor chain becomes host memory: the result is a whole valid [`Chain`], or [`Malformed`].
//!
//! `VIRTIO_F_INDIRECT_DESC` is not offered, so an indirect descriptor is malformed.

mod active;
mod buffers;
mod chain;
mod setup;
#[cfg(test)]
mod tests;

pub use active::{ActiveQueue, Token};
pub use buffers::{Reader, ShortBuffer, Writer};
pub use chain::Chain;
pub use setup::{QueueSetup, SetupError, validate};

/// The guest broke a rule of the ring, of a chain, or of a device's request format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The available index runs ahead by more than the queue size, or went backwards.
    #[error("available index jumped from {next} by more than the queue size {size}")]
    AvailableIndex {
        /// The device's position.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// The head, or a next field, is not an index into the descriptor table.
    #[error("descriptor index {index} in a queue of {size}")]
    Index {
        /// What the guest wrote.
        index: u16,
        /// Queue size.
        size: u16,
    },
    /// The device still works on a chain with this head.
    #[error("head {head} is in flight already")]
    InFlight {
        /// Head of the chain.
        head: u16,
    },
    /// More descriptors than the queue has: a loop.
    #[error("chain from head {head} has more than {size} descriptors: it loops")]
    Loop {
        /// Head of the chain.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// `VIRTIO_F_INDIRECT_DESC` was not offered.
    #[error("descriptor {index} is indirect, which was not negotiated")]
    Indirect {
        /// Index of the descriptor.
        index: u16,
    },
    /// A buffer without bytes.
    #[error("descriptor {index} has length 0")]
    Empty {
        /// Index of the descriptor.
        index: u16,
    },
    /// A buffer that is not guest RAM from its first to its last byte.
    #[error("descriptor {index}: {length:#x} bytes at {address:#x} are not within RAM")]
    OutsideMemory {
        /// Index of the descriptor.
        index: u16,
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A buffer that overlaps the queue's own tables.
    #[error("descriptor {index}: {length:#x} bytes at {address:#x} overlap the queue's own rings")]
    InsideRing {
        /// Index of the descriptor.
        index: u16,
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A device-readable buffer after a device-writable one (VIRTIO 1.2, 2.7.4.2).
    #[error("descriptor {index} is readable and comes after a writable one")]
    Order {
        /// Index of the descriptor.
        index: u16,
    },
    /// A chain of 4 GiB or more (VIRTIO 1.2, 2.7.5.2).
    #[error("chain from head {head} has 4 GiB or more in total")]
    TooLarge {
        /// Head of the chain.
        head: u16,
    },
    /// The rings are validated RAM, so this cannot happen; it is still an error, not a panic.
    #[error("ring access failed: {0}")]
    Ring(String),
    /// A request that lacks the parts its device needs to answer it.
    #[error("request refused: {0}")]
    Request(&'static str),
}

impl From<ShortBuffer> for Malformed {
    fn from(_: ShortBuffer) -> Malformed {
        Malformed::Request("a buffer is shorter than the structure it must hold")
    }
}
