//! Packets that break rules.

use super::*;

#[test]
fn test_malformed_packets_are_errors() {
    let short = |length| {
        let mut bench = Bench::new();
        bench.tx.add(&[(TX_BUFFER, length, false)]).unwrap();
        bench.process(1)
    };
    assert!(short(1).is_err() && short(43).is_err());
    for length in [1, 5, 64 * 1024, u32::MAX] {
        let mut bench = Bench::new();
        bench.open();
        let packet = Header { length, ..header(Operation::Payload, GUEST) };
        let result = bench.send(packet, if length == 5 { b"1234" } else { b"" });
        assert!(matches!(result, Err(Malformed::Request(_))), "{length}");
    }
    // Receive buffers that cannot hold a header, or nothing beyond it.
    for size in [1, 43, 44] {
        let mut bench = Bench::with_receive_buffers(4, size);
        bench.send_ok(Operation::Request, GUEST);
        bench.refill();
        let mut result = bench.process(0);
        if let Ok(host) = bench.accepted.try_recv() {
            (&host).write_all(b"x").unwrap();
            result = result.and_then(|()| bench.device.process_events().map(|_| ()));
        }
        assert!(matches!(result, Err(Malformed::Request(_))), "{size}");
    }
}

#[test]
fn test_header_in_pieces_is_understood() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    let packet = Header { length: 6, ..header(Operation::Payload, GUEST) };
    bench.memory.write_slice(&packet.encode(), GuestAddress(TX_BUFFER)).unwrap();
    bench.memory.write_slice(b"pieces", GuestAddress(TX_BUFFER + 44)).unwrap();
    bench.tx.add(&[(TX_BUFFER, 10, false), (TX_BUFFER + 10, 37, false), (TX_BUFFER + 47, 3, false)]).unwrap();
    bench.process(1).unwrap();
    assert_eq!(drain(&mut host).0, b"pieces");
}

#[test]
fn test_strange_addresses_and_types_are_reset_or_dropped() {
    let good = header(Operation::Request, GUEST);
    let cases = [
        (Header { source_cid: CID + 1, ..good }, 0),
        (Header { source_cid: HOST_CID, ..good }, 0),
        (Header { source_cid: u64::MAX, ..good }, 0),
        (Header { destination_cid: CID, ..good }, 1),
        (Header { destination_cid: 0, ..good }, 1),
        (Header { destination_cid: u64::MAX, ..good }, 1),
        (Header { kind: 2, ..good }, 1),
        (Header { kind: 0, ..good }, 1),
        (Header { operation: None, ..good }, 1),
        (header(Operation::Payload, GUEST), 1),
        (header(Operation::Response, GUEST), 1),
        (header(Operation::Shutdown, GUEST), 1),
        (header(Operation::CreditRequest, GUEST), 1),
        (header(Operation::Reset, GUEST), 0),
        (Header { kind: 9, ..header(Operation::Reset, GUEST) }, 0),
    ];
    for (packet, resets) in cases {
        let mut bench = Bench::new();
        bench.send(packet, &[]).unwrap();
        assert_eq!(bench.operations(), vec![Operation::Reset; resets], "{packet:?}");
        bench.open();
    }
}

#[test]
fn test_rules_of_a_stream_broken_reset_it() {
    let break_rule: [&dyn Fn(&mut Bench); 4] = [
        &|bench| bench.send_ok(Operation::Request, GUEST),
        &|bench| bench.send_ok(Operation::Response, GUEST),
        &|bench| {
            let unknown = Header { operation: None, ..header(Operation::Payload, GUEST) };
            bench.send(unknown, &[]).unwrap();
        },
        &|bench| {
            let end = Header { flags: shutdown::SEND, ..header(Operation::Shutdown, GUEST) };
            bench.send(end, &[]).unwrap();
            bench.payload(b"after the end");
        },
    ];
    for act in break_rule {
        let mut bench = Bench::new();
        let mut host = bench.open();
        act(&mut bench);
        assert!(bench.operations().contains(&Operation::Reset));
        assert_eq!(drain(&mut host), (vec![], true));
    }
}

#[test]
fn test_more_than_the_window_is_reset_and_what_came_before_is_delivered() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    let chunk = vec![7; 64 * 1024];
    let mut sent = 0;
    // The host reads nothing: what its socket takes plus the window.
    while !bench.operations().contains(&Operation::Reset) {
        bench.payload(&chunk);
        sent += chunk.len();
        assert!(sent < 4 << 20);
    }
    assert!(sent > WINDOW as usize);
    let mut received = Vec::new();
    loop {
        let (bytes, end) = drain(&mut host);
        received.extend(bytes);
        if end {
            break;
        }
        bench.events();
    }
    assert_eq!(received.len(), sent - chunk.len());
}
