//! The virtio-mmio transport, version 2 (VIRTIO 1.2, 4.2).
//!
//! ```text
//! vCPU threads ── read, write ──> MmioTransport { registers, behind a lock }
//!                                    │ DRIVER_OK: queues validated and moved     │ status 0: reset, waits for the answer
//!                                    ▼                                           ▼
//! kick eventfds ────────────────> worker thread { owns the device } ── interrupt eventfd ──> guest
//! ```
//!
//! Accesses: control registers answer to aligned 4-byte accesses only; any other access to them, or past the end
//! of the window, reads as zeros and writes nothing. The configuration space takes every width and alignment;
//! it reads as zeros past its end and ignores writes.

mod registers;
#[cfg(test)]
mod tests;
mod transport;
mod worker;

pub use transport::MmioTransport;
