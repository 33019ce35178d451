//! One stream: the host's socket, what waits for it, and the credit of both directions.

use super::WINDOW;
use super::handle::Completion;
use super::packet::{HOST_CID, Header, Operation, TYPE_STREAM, shutdown};
use crate::queue::{Reader, ShortBuffer, Writer};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Most payload bytes in one packet to the guest.
const MAX_PAYLOAD: usize = 64 * 1024;
/// A buffer that grew larger than this is freed when it is empty.
const KEEP: usize = 16 * 1024;

/// Ports of a connection: the guest's, the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub guest: u32,
    pub host: u32,
}

pub(super) enum Phase {
    /// The guest was asked.
    Connecting(Completion),
    Open,
    /// The guest is done with it; only the rest of its bytes waits for the host to read it.
    Lingering,
}

/// What came out of reading the host's socket.
pub(super) enum Received {
    /// This many bytes are in the guest's buffer.
    Payload(u32),
    /// Nothing now.
    Nothing,
    /// The host will send no more.
    End,
    /// The guest's buffer has no room beyond the header.
    NoRoom,
}

pub(super) struct Connection {
    pub ports: Ports,
    pub phase: Phase,
    pub deadline: Option<Instant>,
    stream: UnixStream,

    // Host to guest.
    pub readable: bool,
    /// Is in the queue of connections that may send.
    pub queued: bool,
    /// Packets sent since it came to the front of that queue.
    pub burst: u32,
    pub host_ended: bool,
    /// The host closed its end altogether.
    pub hung_up: bool,
    pub credit_requested: bool,
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,

    // Guest to host.
    waiting: VecDeque<u8>,
    /// The host reads no more: bytes are dropped.
    discard: bool,
    pub credit_queued: bool,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    announced: u32,

    /// Shutdown flags the guest sent.
    pub guest_ended: u32,
    /// Shutdown flags the guest was sent.
    pub told: u32,
}

impl Connection {
    /// `stream` must be non-blocking.
    pub fn new(ports: Ports, phase: Phase, stream: UnixStream) -> Connection {
        Connection {
            ports,
            phase,
            deadline: None,
            stream,
            readable: false,
            queued: false,
            burst: 0,
            host_ended: false,
            hung_up: false,
            credit_requested: false,
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            waiting: VecDeque::new(),
            discard: false,
            credit_queued: false,
            received: 0,
            forwarded: 0,
            announced: 0,
            guest_ended: 0,
            told: 0,
        }
    }

    /// Every packet of the guest carries its credit.
    pub fn learn_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buffer;
        self.peer_forwarded = header.forwarded;
        self.credit_requested = false;
    }

    /// Bytes the guest has room for. A guest that claims to have taken more than it got has none.
    pub fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// Whether the socket may have bytes the guest would still take, credit aside.
    pub fn wants_to_send(&self) -> bool {
        matches!(self.phase, Phase::Open)
            && self.readable
            && !self.host_ended
            && self.guest_ended & shutdown::RECEIVE == 0
    }

    /// A packet to the guest, with the credit as it is now.
    pub fn header(&mut self, operation: Operation, length: u32, flags: u32, guest_cid: u64) -> Header {
        self.announced = self.forwarded;
        Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            length,
            kind: TYPE_STREAM,
            operation: Some(operation),
            flags,
            buffer: WINDOW,
            forwarded: self.forwarded,
        }
    }

    /// Looks whether the socket has neither bytes nor its end, without taking any.
    pub fn has_nothing(&mut self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        if recv(&self.stream, &mut [0u8; 1], flags).err() == Some(rustix::io::Errno::WOULDBLOCK) {
            self.readable = false;
        }
        !self.readable
    }

    /// Moves bytes from the socket into the guest's buffer, within the guest's credit, which is not 0.
    pub fn receive(&mut self, into: &mut Writer<'_>) -> Received {
        let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        let limit = into.remaining().min(credit).min(MAX_PAYLOAD);
        if limit == 0 {
            return Received::NoRoom;
        }
        match into.receive(&self.stream, limit) {
            Ok(0) => {
                self.host_ended = true;
                Received::End
            }
            Ok(count) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(count);
                Received::Payload(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Received::Nothing
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Received::Nothing,
            Err(_) => {
                // The host closed without reading everything.
                self.host_ended = true;
                self.hung_up = true;
                Received::End
            }
        }
    }

    /// Whether the guest keeps to the credit it was given.
    pub fn accepts(&self, length: u32) -> bool {
        let used = self.received.wrapping_sub(self.forwarded);
        used.checked_add(length).is_some_and(|total| total <= WINDOW)
    }

    /// Takes a payload that [`Connection::accepts`]. False once the host reads no more.
    pub fn deliver(&mut self, mut payload: Reader<'_>, length: u32) -> Result<bool, ShortBuffer> {
        self.received = self.received.wrapping_add(length);
        if !self.discard && self.waiting.is_empty() {
            match payload.send(&self.stream) {
                Ok(count) => self.forward(count),
                Err(error) => self.failed(error.kind()),
            }
        }
        if self.discard {
            self.forward(payload.remaining());
            return Ok(false);
        }
        if payload.remaining() > 0 {
            let mut rest = vec![0; payload.remaining()];
            payload.read_exact(&mut rest)?;
            self.waiting.extend(rest);
        }
        Ok(true)
    }

    /// Writes what waits, as much as the socket takes. False once the host reads no more.
    pub fn flush(&mut self) -> bool {
        while !self.discard && !self.waiting.is_empty() {
            let (bytes, _) = self.waiting.as_slices();
            match send(&self.stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    self.waiting.drain(..count.min(self.waiting.len()));
                    self.forward(count);
                }
                Err(error) if error == rustix::io::Errno::INTR => {}
                Err(error) => {
                    self.failed(io::Error::from(error).kind());
                    break;
                }
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > KEEP {
            self.waiting = VecDeque::new();
        }
        !self.discard
    }

    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    fn failed(&mut self, kind: io::ErrorKind) {
        if kind != io::ErrorKind::WouldBlock && kind != io::ErrorKind::Interrupted {
            self.discard = true;
            self.forward(self.waiting.len());
            self.waiting = VecDeque::new();
        }
    }

    /// All bytes of the guest have left.
    pub fn is_flushed(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether the guest should be told of its credit: it believes half of the window to be used, and is wrong.
    pub fn owes_credit(&self) -> bool {
        let believed = self.received.wrapping_sub(self.announced);
        !self.credit_queued && believed >= WINDOW / 2 && self.forwarded != self.announced
    }

    /// Passes the guest's half-closes on, in order behind its bytes.
    pub fn pass_shutdown(&self) {
        if self.guest_ended & shutdown::SEND != 0 && self.is_flushed() {
            // It fails only if the host closed first.
            let _: io::Result<()> = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_ended & shutdown::RECEIVE != 0 {
            let _: io::Result<()> = self.stream.shutdown(Shutdown::Read);
        }
    }
}
