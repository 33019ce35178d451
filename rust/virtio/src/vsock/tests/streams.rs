//! Opening, closing, credit, fairness, interrupts.

use super::*;

#[test]
fn test_new_reserved_cid_is_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(Vsock::new(cid, Box::new(|_| None)).is_err());
    }
}

#[test]
fn test_guest_connects_and_bytes_go_both_ways() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    bench.payload(b"from the guest");
    assert_eq!(drain(&mut host), (b"from the guest".to_vec(), false));
    host.write_all(b"from the host").unwrap();
    let packets = bench.exchange();
    assert_eq!(packets.len(), 1);
    let (sent, payload) = &packets[0];
    assert_eq!(payload, b"from the host");
    assert_eq!((sent.source_cid, sent.destination_cid), (HOST_CID, CID));
    assert_eq!((sent.source_port, sent.destination_port), (5, 1000));
    assert_eq!((sent.forwarded, sent.buffer), (14, WINDOW));
}

#[test]
fn test_guest_connects_to_a_refused_port_is_reset() {
    let mut bench = Bench::new();
    bench.send_ok(Operation::Request, (1000, 100));
    assert_eq!(bench.operations(), [Operation::Reset]);
}

#[test]
fn test_host_connects_and_early_bytes_follow() {
    let mut bench = Bench::new();
    let (mut host, outcome) = host_connect(&mut bench);
    host.write_all(b"early").unwrap();
    let request = bench.exchange()[0].0;
    assert_eq!(request.operation, Some(Operation::Request));
    assert_eq!(request.destination_port, 1024);
    assert!(outcome.try_recv().is_err());
    bench.send_ok(Operation::Response, (1024, request.source_port));
    assert_eq!(outcome.try_recv(), Ok(Ok(())));
    let packets = bench.exchange();
    assert_eq!(packets[0].1, b"early");
}

#[test]
fn test_host_connect_every_failure_is_told_once() {
    let mut bench = Bench::new();
    // The guest refuses.
    let (mut host, outcome) = host_connect(&mut bench);
    let port = bench.exchange()[0].0.source_port;
    bench.send_ok(Operation::Reset, (1024, port));
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::Refused)));
    assert_eq!(drain(&mut host), (vec![], true));
    // The guest does not answer.
    let (_host, outcome) = host_connect(&mut bench);
    bench.exchange();
    bench.device.streams.expire(17);
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::TimedOut)));
    assert_eq!(bench.operations(), [Operation::Reset]);
    // A reset comes between.
    let (_host, outcome) = host_connect(&mut bench);
    bench.exchange();
    bench.device.reset();
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::Reset)));
    // There is no driver.
    let (_host, outcome) = host_connect(&mut bench);
    bench.events();
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::NotReady)));
    // The device goes while a request waits, and before one is made.
    let (_host, outcome) = host_connect(&mut bench);
    let handle = bench.handle.clone();
    drop(bench);
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::Reset)));
    let result = handle.connect(1, Box::new(|_| panic!("must not be called")));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn test_reset_closes_every_stream_and_the_device_works_again() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    bench.payload(b"x");
    bench.restart();
    assert_eq!(drain(&mut host), (b"x".to_vec(), true));
    let mut host = bench.open();
    bench.payload(b"again");
    assert_eq!(drain(&mut host).0, b"again");
}

#[test]
fn test_guest_half_closes_host_sees_the_end_behind_all_bytes() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    let total = 6 * 64 * 1024;
    for _ in 0..6 {
        bench.payload(&vec![1; 64 * 1024]);
    }
    let end = Header { flags: shutdown::SEND, ..header(Operation::Shutdown, GUEST) };
    bench.send(end, &[]).unwrap();
    let mut received = 0;
    loop {
        let (bytes, end) = drain(&mut host);
        received += bytes.len();
        if end {
            break;
        }
        bench.events();
    }
    assert_eq!(received, total);
    // The other direction is still open.
    bench.exchange();
    host.write_all(b"still").unwrap();
    assert_eq!(bench.exchange()[0].1, b"still");
}

#[test]
fn test_guest_closes_with_bytes_waiting_host_gets_them_all() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    for _ in 0..6 {
        bench.payload(&vec![1; 64 * 1024]);
    }
    let end = Header { flags: shutdown::BOTH, ..header(Operation::Shutdown, GUEST) };
    bench.send(end, &[]).unwrap();
    // The guest is free to use its port again at once.
    assert!(bench.operations().contains(&Operation::Reset));
    let _second = bench.open();
    let mut received = 0;
    loop {
        let (bytes, end) = drain(&mut host);
        received += bytes.len();
        if end {
            break;
        }
        bench.events();
    }
    assert_eq!(received, 6 * 64 * 1024);
}

#[test]
fn test_host_half_closes_guest_is_told_and_may_go_on() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    host.write_all(b"last").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = bench.exchange();
    assert_eq!(packets[0].1, b"last");
    let end = packets[1].0;
    assert_eq!((end.operation, end.flags), (Some(Operation::Shutdown), shutdown::SEND));
    bench.payload(b"answer");
    assert_eq!(drain(&mut host).0, b"answer");
    assert!(bench.exchange().is_empty());
}

#[test]
fn test_host_closes_guest_is_told_both_and_reset_when_it_does_not_answer() {
    let mut bench = Bench::new();
    let host = bench.open();
    drop(host);
    let packets = bench.exchange();
    let end = packets.last().unwrap().0;
    assert_eq!((end.operation, end.flags), (Some(Operation::Shutdown), shutdown::BOTH));
    // Bytes that come nevertheless go nowhere.
    bench.payload(b"to nobody");
    assert!(bench.exchange().is_empty());
    bench.device.streams.expire(16);
    assert_eq!(bench.operations(), [Operation::Reset]);
    bench.open();
}

#[test]
fn test_host_gone_while_the_guest_has_no_credit_ends_by_the_deadline() {
    let mut bench = Bench::new();
    bench.send(Header { buffer: 0, ..header(Operation::Request, GUEST) }, &[]).unwrap();
    bench.exchange();
    let host = bench.accepted.try_recv().unwrap();
    (&host).write_all(b"cannot be delivered").unwrap();
    drop(host);
    assert_eq!(bench.operations(), [Operation::CreditRequest]);
    bench.device.streams.expire(16);
    assert_eq!(bench.operations(), [Operation::Reset]);
}

#[test]
fn test_credit_odd_values_stop_the_stream_and_no_more() {
    // (buffer, forwarded): a window of 0, one that shrank, a counter ahead of what was sent, one that wrapped.
    for (buffer, forwarded) in [(0, 0), (3, 0), (10, 6), (u32::MAX, 6), (5, u32::MAX)] {
        let mut bench = Bench::new();
        let mut host = bench.open();
        host.write_all(b"12345").unwrap();
        assert_eq!(bench.exchange()[0].1.len(), 5);
        let odd = Header { buffer, forwarded, ..header(Operation::CreditUpdate, GUEST) };
        bench.send(odd, &[]).unwrap();
        host.write_all(b"6").unwrap();
        bench.exchange();
        // With honest credit it goes on.
        let honest = Header { forwarded: 5, ..header(Operation::CreditUpdate, GUEST) };
        bench.send(honest, &[]).unwrap();
        bench.exchange();
        bench.payload(b"alive");
        assert_eq!(drain(&mut host).0, b"alive", "{buffer} {forwarded}");
    }
}

#[test]
fn test_credit_request_is_answered() {
    let mut bench = Bench::new();
    let _host = bench.open();
    bench.payload(b"123");
    bench.send_ok(Operation::CreditRequest, GUEST);
    let packets = bench.exchange();
    let (answer, _) = packets[0];
    assert_eq!(answer.operation, Some(Operation::CreditUpdate));
    assert_eq!((answer.forwarded, answer.buffer), (3, WINDOW));
}

#[test]
fn test_connect_flood_ends_at_the_limit_and_streams_still_work() {
    let mut bench = Bench::new();
    let mut hosts = Vec::new();
    let mut answers = Vec::new();
    for guest in 0..MAX_STREAMS as u32 + 50 {
        bench.send_ok(Operation::Request, (guest, 5));
        answers.extend(bench.operations());
        hosts.extend(bench.accepted.try_recv());
    }
    let resets = answers.iter().filter(|&&answer| answer == Operation::Reset).count();
    assert_eq!((hosts.len(), resets), (MAX_STREAMS, 50));
    let (_host, outcome) = host_connect(&mut bench);
    bench.events();
    assert_eq!(outcome.try_recv(), Ok(Err(ConnectError::TooMany)));
    bench.payload(b"");
    let packet = Header { length: 2, ..header(Operation::Payload, (500, 5)) };
    bench.send(packet, b"ok").unwrap();
    assert_eq!(drain(&mut hosts[500]).0, b"ok");
}

#[test]
fn test_reply_storm_without_receive_buffers_stops_taking_packets_then_goes_on() {
    let mut bench = Bench::new();
    let mut sent = 0;
    let mut stuck = 0;
    bench.memory.write_slice(&header(Operation::Payload, (9, 9)).encode(), GuestAddress(TX_BUFFER)).unwrap();
    while stuck < 20 {
        bench.tx.take_used();
        match bench.tx.add(&[(TX_BUFFER, 44, false)]) {
            Some(_) => sent += 1,
            None => stuck += 1,
        }
        bench.process(1).unwrap();
        if stuck > 0 {
            // The timer gives used buffers back.
            std::thread::sleep(Duration::from_millis(2));
            bench.events();
        }
    }
    assert!((256..400).contains(&sent), "{sent}");
    assert_eq!(bench.operations(), vec![Operation::Reset; sent]);
    bench.open();
}

#[test]
fn test_starved_stream_does_not_stop_the_others() {
    let mut bench = Bench::new();
    let no_credit = Header { buffer: 0, ..header(Operation::Request, (1, 5)) };
    bench.send(no_credit, &[]).unwrap();
    bench.exchange();
    let mut starved = bench.accepted.try_recv().unwrap();
    let mut host = bench.open();
    starved.write_all(&[1; 1000]).unwrap();
    host.write_all(b"through").unwrap();
    let payloads: Vec<_> = bench.exchange().into_iter().filter(|(_, payload)| !payload.is_empty()).collect();
    assert_eq!(payloads.len(), 1);
    assert_eq!(payloads[0].1, b"through");
}

#[test]
fn test_busy_streams_take_turns() {
    let mut bench = Bench::with_receive_buffers(8, 300);
    let mut hosts = Vec::new();
    for guest in 1..=2 {
        bench.send_ok(Operation::Request, (guest, 5));
        bench.exchange();
        hosts.push(bench.accepted.try_recv().unwrap());
    }
    for host in &mut hosts {
        host.write_all(&[0; 100_000]).unwrap();
    }
    let order: Vec<u32> = bench.exchange().iter().map(|(header, _)| header.destination_port).collect();
    assert!(order.len() > 400);
    // Neither waits for more than a burst of the other while both have bytes.
    let longest = order[..400].chunk_by(|a, b| a == b).map(<[u32]>::len).max();
    assert!(longest <= Some(16), "{longest:?}");
}

#[test]
fn test_interrupts_one_for_an_answer_and_its_used_buffers() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    while bench.line.read().is_ok() {}
    // The driver wants to hear of every used entry.
    let (rx_used, tx_used) = used_indices(&bench);
    bench.rx.set_used_event(rx_used);
    bench.tx.set_used_event(tx_used);
    bench.payload(b"question");
    assert_eq!(bench.line.read().unwrap_or(0), 0, "used transmit buffers wait");
    host.write_all(b"answer").unwrap();
    bench.refill();
    bench.events();
    assert_eq!(bench.line.read().unwrap_or(0), 1, "one interrupt for both queues");
    assert_eq!(bench.tx.take_used().len(), 1);
    // Alone, they wait for the timer.
    let (_, tx_used) = used_indices(&bench);
    bench.tx.set_used_event(tx_used);
    bench.payload(b"statement");
    assert_eq!(bench.line.read().unwrap_or(0), 0);
    std::thread::sleep(USED_PATIENCE * 2);
    bench.events();
    assert_eq!(bench.line.read().unwrap_or(0), 1);
}

#[test]
fn test_used_buffers_come_at_once_when_the_driver_polls() {
    let mut bench = Bench::new();
    let _host = bench.open();
    bench.tx.take_used();
    // With EVENT_IDX, an event far away means that no interrupt is wanted.
    let (_, tx_used) = used_indices(&bench);
    bench.tx.set_used_event(tx_used.wrapping_sub(100));
    bench.payload(b"x");
    assert_eq!(bench.tx.take_used().len(), 1);
}

fn used_indices(bench: &Bench) -> (u16, u16) {
    let index = |ring: &Ring| bench.memory.read_obj::<u16>(GuestAddress(ring.used + 2)).unwrap();
    (index(&bench.rx), index(&bench.tx))
}

#[test]
fn test_packet_behind_waiting_bytes_does_not_overtake_them() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    let mut expected = Vec::new();
    for byte in 0..7 {
        bench.payload(&[byte; 64 * 1024]);
        expected.extend([byte; 64 * 1024]);
    }
    // The socket has room again, but the device has not heard of it.
    let (mut received, _) = drain(&mut host);
    bench.payload(b"last");
    expected.extend(b"last");
    while received.len() < expected.len() {
        bench.events();
        received.extend(drain(&mut host).0);
    }
    assert!(received == expected);
}

#[test]
fn test_one_way_stream_is_told_of_its_credit_in_time() {
    let mut bench = Bench::new();
    let mut host = bench.open();
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let mut updates = 0;
    while sent < 8 * WINDOW {
        assert!(sent - forwarded + 64 * 1024 <= WINDOW, "the guest would wait for ever");
        bench.payload(&[0; 64 * 1024]);
        sent += 64 * 1024;
        drain(&mut host);
        for (packet, _) in bench.exchange() {
            assert_eq!(packet.operation, Some(Operation::CreditUpdate));
            forwarded = packet.forwarded;
            updates += 1;
        }
    }
    // And not more often than needed: once for half a window.
    assert!(updates <= 16, "{updates}");
}

#[test]
fn test_receive_queue_kicks_are_wanted_only_when_buffers_are_missing() {
    let mut bench = Bench::with_receive_buffers(1, 4140);
    let mut host = bench.open();
    bench.refill();
    let offered_before = bench.rx.available_event();
    host.write_all(&[1; 4096]).unwrap();
    bench.events();
    assert_eq!(bench.rx.available_event(), offered_before, "one buffer was there, none is missing");
    host.write_all(&[2; 4096]).unwrap();
    bench.events();
    // It found none, and asks for a kick with the very next buffer.
    let next = used_indices(&bench).0;
    assert_eq!(bench.rx.available_event(), next);
    bench.take();
    bench.refill();
    bench.process(0).unwrap();
    assert_eq!(bench.take()[0].1, [2; 4096]);
}
