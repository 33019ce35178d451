//! All streams of the device: the table, whose turn it is to send, and what to answer to a packet.

use super::connection::{Connection, Phase, Ports, Received};
use super::deadlines::Deadlines;
use super::handle::{Completion, ConnectError, ConnectRequest};
use super::packet::{HEADER, HOST_CID, Header, Operation, TYPE_STREAM, shutdown};
use super::{CLOSE_PATIENCE, CONNECT_PATIENCE, GuestConnect, MAX_STREAMS};
use crate::queue::{Malformed, Reader, Writer};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Replies that may wait for receive buffers. At this many the device stops taking packets from the guest,
/// until the guest takes replies (VIRTIO 1.2, 5.10.6.1).
const MAX_REPLIES: usize = 256;
/// Packets a stream sends before the next one has its turn.
const BURST: u32 = 16;
/// Host ports for streams that the host opens.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;
/// Tokens and timer keys below this are the device's own.
const FIRST_ID: u64 = 16;

enum Outgoing {
    /// Belongs to no connection: a reset.
    Reply(Header),
    /// Written when it is sent, with the credit of that moment; dropped if the connection is gone.
    Packet { id: u64, operation: Operation },
}

pub(super) struct Streams {
    guest_cid: u64,
    on_guest_connect: GuestConnect,
    pub epoll: Epoll,
    pub deadlines: Deadlines,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    outgoing: VecDeque<Outgoing>,
    /// Connections that may have bytes for the guest and credit for them.
    ready: VecDeque<u64>,
    next_id: u64,
    next_port: u32,
}

impl Streams {
    pub fn new(guest_cid: u64, on_guest_connect: GuestConnect) -> io::Result<Streams> {
        let streams = Streams {
            guest_cid,
            on_guest_connect,
            epoll: Epoll::new()?,
            deadlines: Deadlines::new()?,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            outgoing: VecDeque::new(),
            ready: VecDeque::new(),
            next_id: FIRST_ID,
            next_port: FIRST_PORT,
        };
        Ok(streams)
    }

    pub fn watch(&self, descriptor: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, token))
    }

    /// Closes every stream.
    pub fn clear(&mut self) {
        self.outgoing.clear();
        self.ready.clear();
        self.by_ports.clear();
        self.connections.clear();
        self.deadlines.clear();
    }

    pub fn wants_to_send(&self) -> bool {
        !self.outgoing.is_empty() || !self.ready.is_empty()
    }

    /// Like [`Streams::wants_to_send`], but looks into the sockets: a guest is not asked for buffers for nothing.
    pub fn really_wants_to_send(&mut self) -> bool {
        while self.outgoing.is_empty()
            && let Some(id) = self.ready.front()
        {
            if let Some(connection) = self.connections.get_mut(id) {
                if !connection.has_nothing() {
                    return true;
                }
                connection.queued = false;
            }
            self.ready.pop_front();
        }
        !self.outgoing.is_empty()
    }

    pub fn is_full_of_replies(&self) -> bool {
        self.outgoing.len() >= MAX_REPLIES
    }

    // ---- the host's side ----

    pub fn connect(&mut self, request: ConnectRequest) {
        let ConnectRequest { port, stream, completion } = request;
        let Some(host) = self.free_port(port) else {
            return completion.finish(Err(ConnectError::TooMany));
        };
        let ports = Ports { guest: port, host };
        match self.insert(ports, Phase::Connecting(completion), stream) {
            Ok(id) => {
                self.set_deadline(id, CONNECT_PATIENCE);
                self.push(id, Operation::Request);
            }
            Err((Phase::Connecting(completion), error)) => completion.finish(Err(error)),
            Err(_) => {}
        }
    }

    fn free_port(&mut self, guest: u32) -> Option<u32> {
        // One more than there can be connections is enough to find a free one.
        for _ in 0..=MAX_STREAMS {
            let host = self.next_port;
            self.next_port = if host >= LAST_PORT { FIRST_PORT } else { host.saturating_add(1) };
            if !self.by_ports.contains_key(&Ports { guest, host }) {
                return Some(host);
            }
        }
        None
    }

    fn insert(&mut self, ports: Ports, phase: Phase, stream: UnixStream) -> Result<u64, (Phase, ConnectError)> {
        if self.connections.len() >= MAX_STREAMS {
            return Err((phase, ConnectError::TooMany));
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1).max(FIRST_ID);
        // Edge-triggered: a stream that waits for credit or for buffers costs no system call.
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.watch(stream.as_raw_fd(), events, id).is_err() {
            return Err((phase, ConnectError::Host));
        }
        self.connections.insert(id, Connection::new(ports, phase, stream));
        self.by_ports.insert(ports, id);
        Ok(id)
    }

    /// Something happened to the host's socket.
    pub fn event(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            connection.readable = true;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hung_up = true;
        }
        if events.contains(EventSet::OUT) || connection.hung_up {
            connection.flush();
        }
        self.settle(id);
    }

    /// Times are up.
    pub fn expire(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.deadline = None;
            let ports = connection.ports;
            let phase = std::mem::replace(&mut connection.phase, Phase::Open);
            if let Phase::Connecting(completion) = phase {
                completion.finish(Err(ConnectError::TimedOut));
            }
            self.reset(ports);
            self.retire(id);
        }
    }

    fn set_deadline(&mut self, id: u64, patience: Duration) {
        let when = Instant::now().checked_add(patience);
        if let (Some(connection), Some(when)) = (self.connections.get_mut(&id), when) {
            if let Some(before) = connection.deadline.replace(when) {
                self.deadlines.remove(before, id);
            }
            self.deadlines.insert(when, id);
        }
    }

    fn clear_deadline(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && let Some(when) = connection.deadline.take()
        {
            self.deadlines.remove(when, id);
        }
    }

    // ---- what follows from a connection's state ----

    /// After anything changed: passes ends on, tells of credit, and gives the connection its turn to send.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if matches!(connection.phase, Phase::Lingering) {
            if connection.is_flushed() {
                self.connections.remove(&id);
            }
            return;
        }
        connection.pass_shutdown();
        if !matches!(connection.phase, Phase::Open) {
            return;
        }
        let mut tell = 0;
        if connection.host_ended {
            tell |= shutdown::SEND;
        }
        if !connection.flush() || (connection.hung_up && connection.host_ended) {
            tell |= shutdown::RECEIVE;
        }
        let news = tell & !connection.told != 0;
        connection.told |= tell;
        // A hang-up after the guest's own half-close may be no more than the host's: then the guest closes when it likes.
        let host_closed = connection.hung_up && connection.guest_ended & shutdown::SEND == 0;
        let closing = host_closed && connection.deadline.is_none();
        if connection.owes_credit() {
            connection.credit_queued = true;
            self.push(id, Operation::CreditUpdate);
        }
        if news {
            self.push(id, Operation::Shutdown);
        }
        if closing {
            self.set_deadline(id, CLOSE_PATIENCE);
        }
        self.give_turn(id);
    }

    fn give_turn(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if !connection.wants_to_send() || connection.queued {
            return;
        }
        if connection.credit() == 0 {
            if !connection.credit_requested {
                connection.credit_requested = true;
                self.push(id, Operation::CreditRequest);
            }
            return;
        }
        connection.queued = true;
        connection.burst = 0;
        self.ready.push_back(id);
    }

    fn push(&mut self, id: u64, operation: Operation) {
        self.outgoing.push_back(Outgoing::Packet { id, operation });
    }

    fn reset(&mut self, ports: Ports) {
        self.reset_as(HOST_CID, ports);
    }

    fn reset_as(&mut self, source_cid: u64, ports: Ports) {
        self.outgoing.push_back(Outgoing::Reply(Header {
            source_cid,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            length: 0,
            kind: TYPE_STREAM,
            operation: Some(Operation::Reset),
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }));
    }

    /// The guest's side is over. Bytes it sent before still go to the host, which then sees the end.
    fn retire(&mut self, id: u64) {
        self.clear_deadline(id);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        self.by_ports.remove(&connection.ports);
        if let Phase::Connecting(completion) = std::mem::replace(&mut connection.phase, Phase::Lingering) {
            completion.finish(Err(ConnectError::Refused));
        }
        connection.flush();
        self.settle(id);
    }

    // ---- packets from the guest ----

    /// Takes one packet.
    pub fn receive(&mut self, packet: &mut Reader<'_>) -> Result<(), Malformed> {
        let mut bytes = [0; HEADER];
        packet.read_exact(&mut bytes).map_err(|_| Malformed::Request("vsock packet shorter than its header"))?;
        let header = Header::decode(&bytes);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let payload =
            packet.take(length).map_err(|_| Malformed::Request("vsock packet shorter than its length field"))?;
        if header.source_cid != self.guest_cid {
            // There is nobody at that address to answer to.
            return Ok(());
        }
        let ports = Ports { guest: header.source_port, host: header.destination_port };
        if header.destination_cid != HOST_CID || header.kind != TYPE_STREAM {
            if header.operation != Some(Operation::Reset) {
                self.reset_as(header.destination_cid, ports);
            }
            return Ok(());
        }
        match self.by_ports.get(&ports).copied() {
            Some(id) => self.receive_known(id, ports, &header, payload)?,
            None => self.receive_unknown(ports, &header),
        }
        Ok(())
    }

    fn receive_unknown(&mut self, ports: Ports, header: &Header) {
        match header.operation {
            Some(Operation::Reset) => {}
            Some(Operation::Request) => {
                if !self.accept(ports, header) {
                    self.reset(ports);
                }
            }
            _ => self.reset(ports),
        }
    }

    fn accept(&mut self, ports: Ports, header: &Header) -> bool {
        if self.connections.len() >= MAX_STREAMS {
            return false;
        }
        let Some(stream) = (self.on_guest_connect)(ports.host) else {
            return false;
        };
        if stream.set_nonblocking(true).is_err() {
            return false;
        }
        let Ok(id) = self.insert(ports, Phase::Open, stream) else {
            return false;
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.learn_credit(header);
        }
        self.push(id, Operation::Response);
        true
    }

    fn receive_known(&mut self, id: u64, ports: Ports, header: &Header, payload: Reader<'_>) -> Result<(), Malformed> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        connection.learn_credit(header);
        let open = matches!(connection.phase, Phase::Open);
        match header.operation {
            Some(Operation::Reset) => self.retire(id),
            Some(Operation::Response) if !open => self.opened(id),
            Some(Operation::Payload)
                if open && connection.guest_ended & shutdown::SEND == 0 && connection.accepts(header.length) =>
            {
                connection.deliver(payload, header.length)?;
                self.settle(id);
            }
            Some(Operation::Shutdown) if open => {
                connection.guest_ended |= header.flags & shutdown::BOTH;
                if connection.guest_ended == shutdown::BOTH {
                    self.reset(ports);
                    self.retire(id);
                } else {
                    self.settle(id);
                }
            }
            Some(Operation::CreditUpdate) if open => self.settle(id),
            Some(Operation::CreditRequest) if open => {
                if !connection.credit_queued {
                    connection.credit_queued = true;
                    self.push(id, Operation::CreditUpdate);
                }
                self.settle(id);
            }
            // Unknown, out of turn, more than the credit, or after the guest's end.
            _ => {
                self.reset(ports);
                self.retire(id);
            }
        }
        Ok(())
    }

    fn opened(&mut self, id: u64) {
        self.clear_deadline(id);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if let Phase::Connecting(completion) = std::mem::replace(&mut connection.phase, Phase::Open) {
            Completion::finish(completion, Ok(()));
        }
        self.settle(id);
    }

    // ---- packets to the guest ----

    /// Writes one packet into a receive buffer: its length, or `None` if there is nothing to send after all.
    pub fn send(&mut self, mut buffer: Writer<'_>) -> Result<Option<u32>, Malformed> {
        let mut place =
            buffer.take(HEADER).map_err(|_| Malformed::Request("vsock receive buffer shorter than a header"))?;
        let guest_cid = self.guest_cid;
        loop {
            let (header, length) = match self.outgoing.pop_front() {
                Some(Outgoing::Reply(header)) => (header, 0),
                Some(Outgoing::Packet { id, operation }) => {
                    let Some(connection) = self.connections.get_mut(&id) else {
                        continue;
                    };
                    if operation == Operation::CreditUpdate {
                        connection.credit_queued = false;
                    }
                    let flags = if operation == Operation::Shutdown { connection.told } else { 0 };
                    (connection.header(operation, 0, flags, guest_cid), 0)
                }
                None => match self.send_payload(&mut buffer)? {
                    Some(found) => found,
                    None if self.wants_to_send() => continue,
                    None => return Ok(None),
                },
            };
            place.write_all(&header.encode())?;
            return Ok(Some(u32::try_from(HEADER).unwrap_or(0).saturating_add(length)));
        }
    }

    /// A payload of the connection whose turn it is. `None` if it had nothing; then its turn is over.
    fn send_payload(&mut self, buffer: &mut Writer<'_>) -> Result<Option<(Header, u32)>, Malformed> {
        let Some(&id) = self.ready.front() else {
            return Ok(None);
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            self.ready.pop_front();
            return Ok(None);
        };
        if connection.wants_to_send() && connection.credit() > 0 {
            match connection.receive(buffer) {
                Received::Payload(length) => {
                    let header = connection.header(Operation::Payload, length, 0, self.guest_cid);
                    connection.burst = connection.burst.saturating_add(1);
                    if connection.burst >= BURST {
                        connection.burst = 0;
                        self.ready.rotate_left(1);
                    }
                    if self.connections.get(&id).is_some_and(|connection| connection.deadline.is_some()) {
                        // The guest takes the rest of it: patience starts again.
                        self.set_deadline(id, CLOSE_PATIENCE);
                    }
                    return Ok(Some((header, length)));
                }
                Received::NoRoom => {
                    return Err(Malformed::Request("vsock receive buffer has no room for payload"));
                }
                Received::Nothing | Received::End => {}
            }
        }
        connection.queued = false;
        self.ready.pop_front();
        self.settle(id);
        Ok(None)
    }
}
