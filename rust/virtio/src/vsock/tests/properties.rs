//! Laws for any schedule and any packets.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    HostWrites(usize),
    HostReads(usize),
    GuestSends(usize),
    GuestConsumes(usize),
    GuestRefills,
    Kick(usize),
    Events,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1usize..200_000).prop_map(Step::HostWrites),
        2 => (1usize..200_000).prop_map(Step::HostReads),
        3 => (1usize..60_000).prop_map(Step::GuestSends),
        2 => (1usize..20_000).prop_map(Step::GuestConsumes),
        2 => Just(Step::GuestRefills),
        1 => (0usize..2).prop_map(Step::Kick),
        2 => Just(Step::Events),
    ]
}

/// A guest's end of a stream that keeps to the rules, and checks that the device does.
#[derive(Default)]
struct GuestEnd {
    port: u32,
    window: u32,
    received: Vec<u8>,
    consumed: u32,
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
}

impl GuestEnd {
    fn header(&self, operation: Operation) -> Header {
        Header { buffer: self.window, forwarded: self.consumed, ..header(operation, (1000, self.port)) }
    }

    fn credit(&self) -> usize {
        (self.peer_buffer - self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }

    fn take(&mut self, bench: &mut Bench) {
        for (packet, payload) in bench.take() {
            self.peer_buffer = packet.buffer;
            self.peer_forwarded = packet.forwarded;
            self.received.extend(payload);
            // The device never sends more than there is room for.
            assert!(self.received.len() as u32 - self.consumed <= self.window);
            match packet.operation.unwrap() {
                Operation::CreditRequest => {
                    let answer = self.header(Operation::CreditUpdate);
                    bench.send(answer, &[]).unwrap();
                }
                Operation::Response | Operation::Payload | Operation::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn send(&mut self, bench: &mut Bench, bytes: &[u8]) {
        let packet = Header { length: bytes.len() as u32, ..self.header(Operation::Payload) };
        bench.send(packet, bytes).unwrap();
        self.sent += bytes.len() as u32;
    }

    fn consume(&mut self, bench: &mut Bench, count: usize) {
        let left = self.received.len() - self.consumed as usize;
        self.consumed += count.min(left) as u32;
        let news = self.header(Operation::CreditUpdate);
        bench.send(news, &[]).unwrap();
    }
}

fn pattern(start: usize, count: usize) -> Vec<u8> {
    (start..start + count).map(|i| (i % 251) as u8 ^ (i >> 10) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the schedule, window and buffers are: every byte arrives once, in order, within the credit.
    #[test]
    fn prop_stream_bytes_arrive_intact_under_any_schedule(
        steps in proptest::collection::vec(step(), 1..60),
        window in 1u32..50_000,
        count in 1u64..16,
        size in 45u32..6000,
        port in 5u32..=SMALL_PORT,
    ) {
        let mut bench = Bench::with_receive_buffers(count, size);
        let mut guest = GuestEnd { window, port, ..GuestEnd::default() };
        bench.send(guest.header(Operation::Request), &[]).unwrap();
        let mut host = bench.accepted.try_recv().unwrap();
        let (mut host_sent, mut host_received, mut guest_sent) = (0usize, Vec::<u8>::new(), 0usize);
        let closing = [Step::GuestRefills, Step::Events, Step::HostReads(1 << 20), Step::GuestConsumes(1 << 20)];
        let mut idle = 0;
        let mut schedule = steps.into_iter();
        // The steps, then everything in turn until nothing moves.
        while idle < 40 {
            let before = (guest.received.len(), host_received.len(), guest.consumed);
            let step = match schedule.next() {
                Some(step) => step,
                None => {
                    idle += 1;
                    closing[idle % closing.len()].clone()
                }
            };
            match step {
                Step::HostWrites(count) => match host.write(&pattern(host_sent, count)) {
                    Ok(written) => host_sent += written,
                    Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
                },
                Step::HostReads(count) => {
                    let mut bytes = vec![0; count];
                    match host.read(&mut bytes) {
                        Ok(read) => host_received.extend(&bytes[..read]),
                        Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                Step::GuestSends(count) => {
                    let count = count.min(guest.credit());
                    if count > 0 {
                        guest.send(&mut bench, &pattern(guest_sent, count));
                        guest_sent += count;
                    }
                }
                Step::GuestConsumes(count) => guest.consume(&mut bench, count),
                Step::GuestRefills => {
                    bench.refill();
                    bench.process(0).unwrap();
                }
                Step::Kick(queue) => bench.process(queue).unwrap(),
                Step::Events => bench.events(),
            }
            guest.take(&mut bench);
            if before != (guest.received.len(), host_received.len(), guest.consumed) {
                idle = 0;
            }
        }
        prop_assert!(guest.received == pattern(0, host_sent), "{} of {}", guest.received.len(), host_sent);
        prop_assert!(host_received == pattern(0, guest_sent), "{} of {}", host_received.len(), guest_sent);
    }

    /// Any packets at all: errors or answers, never a panic, and the device works after a reset.
    #[test]
    fn prop_any_packets_are_survived(
        packets in proptest::collection::vec((0u64..9, 0u64..9, 0u32..3, 0u32..3, 0u32..40, 0u16..3, 0u16..9, 0u32..4, any::<u32>(), any::<u32>()), 0..40),
    ) {
        let mut bench = Bench::new();
        for (source, destination, guest, host, length, kind, operation, flags, buffer, forwarded) in packets {
            let mut bytes = Vec::new();
            bytes.extend(if source > 2 { CID } else { source }.to_le_bytes());
            bytes.extend(if destination > 1 { HOST_CID } else { destination }.to_le_bytes());
            bytes.extend(guest.to_le_bytes());
            bytes.extend(host.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(kind.max(1).to_le_bytes());
            bytes.extend(operation.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(buffer.to_le_bytes());
            bytes.extend(forwarded.to_le_bytes());
            let packet = Header::decode(bytes.as_slice().try_into().unwrap());
            if bench.send(packet, &[0; 32]).is_err() {
                bench.restart();
            }
            bench.exchange();
        }
        bench.restart();
        bench.open();
    }

    /// What is decoded encodes to the same bytes, unless the operation is unknown.
    #[test]
    fn prop_header_round_trip(bytes in any::<[u8; 32]>(), rest in any::<[u8; 12]>()) {
        let all: [u8; HEADER] = [bytes.as_slice(), &rest].concat().try_into().unwrap();
        let header = Header::decode(&all);
        if header.operation.is_some() {
            prop_assert_eq!(header.encode(), all);
        } else {
            prop_assert_eq!(Header::decode(&header.encode()), header);
        }
    }
}
