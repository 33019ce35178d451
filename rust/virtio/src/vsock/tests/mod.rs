//! Checklist items "vsock", and the law of a stream: every byte, once, in order, within the credit.
#![expect(clippy::arithmetic_side_effects, reason = "tests")]

mod hostile;
mod properties;
mod streams;

use super::packet::{HEADER, HOST_CID, Header, Operation, TYPE_STREAM, shutdown};
use super::*;
use crate::testing::{BUFFERS, Ring, activate, guest_memory, interrupt};
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::io::{ErrorKind, Read, Write};
use std::sync::mpsc::{Receiver as Channel, channel};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 7;
const TX_BUFFER: u64 = BUFFERS;
const RX_BUFFERS: u64 = 2 << 20;
const RX_STRIDE: u64 = 8192;

struct Bench {
    memory: GuestMemoryMmap,
    rx: Ring,
    tx: Ring,
    event: Ring,
    device: Vsock,
    handle: VsockHandle,
    line: EventFd,
    /// Host ends of streams the guest opened.
    accepted: Channel<UnixStream>,
    /// Receive buffers offered: head and address.
    offered: Vec<(u16, u64)>,
    rx_free: Vec<u64>,
    rx_size: u32,
}

type Packet = (Header, Vec<u8>);

impl Bench {
    fn new() -> Bench {
        Bench::with_receive_buffers(16, 4096 + 44)
    }

    /// The guest listens on no port; the host accepts on ports below 100.
    fn with_receive_buffers(count: u64, size: u32) -> Bench {
        let memory = guest_memory();
        let (sender, accepted) = channel();
        let (device, handle) = Vsock::new(
            CID,
            Box::new(move |port| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                if port == SMALL_PORT {
                    set_socket_send_buffer_size(&theirs, 1).unwrap();
                }
                sender.send(ours).unwrap();
                (port < 100).then_some(theirs)
            }),
        )
        .unwrap();
        let mut bench = Bench {
            rx: Ring::new(&memory, 0x1000, 64),
            tx: Ring::new(&memory, 0x4000, 16),
            event: Ring::new(&memory, 0x8000, 8),
            memory,
            device,
            handle,
            line: crate::testing::event(),
            accepted,
            offered: Vec::new(),
            rx_free: (0..count).map(|slot| RX_BUFFERS + slot * RX_STRIDE).collect(),
            rx_size: size,
        };
        bench.activate();
        bench
    }

    fn activate(&mut self) {
        let (interrupt, line) = interrupt();
        self.line = line;
        let queues = activate(&[&self.rx, &self.tx, &self.event], true, &interrupt);
        self.device.activate(self.memory.clone(), queues, 1).unwrap();
    }

    fn restart(&mut self) {
        self.device.reset();
        self.rx_free.extend(self.offered.drain(..).map(|(_, address)| address));
        self.memory.write_slice(&[0; 0x8000], GuestAddress(0x1000)).unwrap();
        self.rx = Ring::new(&self.memory, 0x1000, 64);
        self.tx = Ring::new(&self.memory, 0x4000, 16);
        self.activate();
    }

    fn refill(&mut self) {
        while let Some(address) = self.rx_free.pop() {
            let head = self.rx.add(&[(address, self.rx_size, true)]).unwrap();
            self.offered.push((head, address));
        }
    }

    fn process(&mut self, queue: usize) -> Result<(), Malformed> {
        while self.device.process(queue)? == Progress::More {}
        Ok(())
    }

    fn events(&mut self) {
        while self.device.process_events().unwrap() == Progress::More {}
    }

    /// What the device sent since the last call; gives the buffers back afterwards.
    fn take(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        for (head, length) in self.rx.take_used() {
            let slot = self.offered.iter().position(|&(offered, _)| offered == head).unwrap();
            let (_, address) = self.offered.swap_remove(slot);
            self.rx_free.push(address);
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let payload = bytes.split_off(HEADER);
            let header = Header::decode(bytes.as_slice().try_into().unwrap());
            assert_eq!(header.length as usize, payload.len());
            packets.push((header, payload));
        }
        packets
    }

    /// Events, packets, buffers, until nothing comes any more.
    fn exchange(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            self.refill();
            self.process(0).unwrap();
            self.events();
            let new = self.take();
            if new.is_empty() {
                return packets;
            }
            packets.extend(new);
        }
    }

    fn operations(&mut self) -> Vec<Operation> {
        self.exchange().iter().map(|(header, _)| header.operation.unwrap()).collect()
    }

    /// The guest sends one packet.
    fn send(&mut self, header: Header, payload: &[u8]) -> Result<(), Malformed> {
        self.memory.write_slice(&header.encode(), GuestAddress(TX_BUFFER)).unwrap();
        self.memory.write_slice(payload, GuestAddress(TX_BUFFER + 64)).unwrap();
        let mut chain = vec![(TX_BUFFER, 44, false)];
        if !payload.is_empty() {
            chain.push((TX_BUFFER + 64, payload.len() as u32, false));
        }
        self.tx.take_used();
        self.tx.add(&chain).expect("the device gives transmit buffers back in time");
        self.process(1)
    }

    fn send_ok(&mut self, operation: Operation, ports: (u32, u32)) {
        self.send(header(operation, ports), &[]).unwrap();
    }

    /// A stream that the guest opened from port 1000 to host port 5.
    fn open(&mut self) -> UnixStream {
        self.send_ok(Operation::Request, GUEST);
        assert_eq!(self.operations(), [Operation::Response]);
        self.accepted.try_recv().unwrap()
    }

    fn payload(&mut self, bytes: &[u8]) {
        let packet = Header { length: bytes.len() as u32, ..header(Operation::Payload, GUEST) };
        self.send(packet, bytes).unwrap();
    }
}

/// The host's socket for this port takes a few KiB only, so that most bytes wait in the device.
const SMALL_PORT: u32 = 6;

/// Guest port, host port.
const GUEST: (u32, u32) = (1000, 5);

fn header(operation: Operation, (guest, host): (u32, u32)) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: guest,
        destination_port: host,
        length: 0,
        kind: TYPE_STREAM,
        operation: Some(operation),
        flags: 0,
        buffer: 256 * 1024,
        forwarded: 0,
    }
}

/// What is in the host's socket, and whether its end was reached.
fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => (bytes, false),
        Err(error) => panic!("{error}"),
    }
}

type Outcome = Channel<Result<(), ConnectError>>;

fn host_connect(bench: &mut Bench) -> (UnixStream, Outcome) {
    let (sender, outcome) = channel();
    let stream = bench.handle.connect(1024, Box::new(move |result| sender.send(result).unwrap())).unwrap();
    stream.set_nonblocking(true).unwrap();
    (stream, outcome)
}
