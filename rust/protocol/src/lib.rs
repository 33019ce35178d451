//! Frames of the two links of a microvm.
//!
//! * [`control`]: client ↔ `microvm-vmm`, one frame per `SOCK_SEQPACKET` message, descriptors beside it.
//! * [`agent`]: client ↔ guest agent, over one vsock stream per command.
//! * [`spec`]: what a machine is made of; sent in [`control::Request::Start`].
//! * [`frame`]: encoding, version and length limits of both.
//!
//! This crate does no I/O, so every decoder can be fuzzed as a function of bytes.

pub mod agent;
pub mod control;
pub mod frame;
pub mod spec;
