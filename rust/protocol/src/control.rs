//! Control link: client ↔ `microvm-vmm`, over an inherited `SOCK_SEQPACKET` socketpair.
//!
//! One message is one frame ([`crate::frame::encode`]), descriptors travel beside it. The client sends
//! [`Request::Start`] first. The VMM ends when the client closes its end.

use crate::spec::MachineSpec;
use serde::{Deserialize, Serialize};

/// Descriptor number of the control socket in the VMM process.
pub const CONTROL_FD: i32 = 3;

/// Most bytes of console output kept for diagnostics.
pub const CONSOLE_TAIL: usize = 16 * 1024;

/// Client to VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Assemble the machine and run it. Descriptors: see [`MachineSpec`].
    Start(MachineSpec),
    /// Open a stream to a vsock port of the guest. Answered by [`Event::Connected`] or [`Event::ConnectFailed`].
    /// Before the agent is ready the request waits.
    Connect {
        /// Chosen by the client, repeated in the answer.
        id: u32,
        /// Guest port.
        port: u32,
    },
    /// Stop the machine at once. Answered by [`Event::Ended`].
    Kill,
}

/// VMM to client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The vCPUs run.
    Started,
    /// The agent said [`crate::agent::FromAgent::Hello`].
    Ready {
        /// Guest kernel release.
        kernel: String,
        /// Microseconds from the start of the VMM process to [`Event::Started`].
        started_us: u64,
        /// Microseconds from the start of the VMM process to the agent's first words.
        ready_us: u64,
    },
    /// A stream is open; its descriptor comes beside the frame.
    Connected {
        /// From the request.
        id: u32,
    },
    /// No stream.
    ConnectFailed {
        /// From the request.
        id: u32,
        /// One line for a person.
        reason: String,
    },
    /// The machine ended or never began. Last message; the VMM exits.
    Ended(EndReport),
}

/// How and why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndReport {
    /// The kind of end.
    pub reason: EndReason,
    /// One paragraph for a person: which field, limit or instruction, with registers where there are any.
    pub message: String,
    /// The last bytes of the serial console, at most [`CONSOLE_TAIL`].
    #[serde(with = "serde_bytes")]
    pub console: Vec<u8>,
    /// RIP samples, most frequent first, if the spec asked for them: (address, count).
    pub profile: Vec<(u64, u32)>,
}

/// The kinds of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// The client asked for it, or the agent said goodbye.
    Stopped,
    /// The guest reset itself without a goodbye (kernel panic, reboot).
    Reset,
    /// Triple fault, KVM internal error, failed entry: see the message.
    GuestFault,
    /// The spec or a file given with it was refused (kernel, initrd, memory…).
    Config,
    /// `/dev/kvm` is missing or not usable.
    Kvm,
    /// The host refused something: out of memory, descriptors, disk.
    Host,
}
