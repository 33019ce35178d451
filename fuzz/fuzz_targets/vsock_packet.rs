//! Packets of a guest, one after the other, into a whole socket device with a host that accepts, writes and leaves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_virtio::device::{Device, Progress};
use microvm_virtio::testing::{BUFFERS, Ring, activate, guest_memory, interrupt};
use microvm_virtio::vsock::Vsock;
use microvm_virtio::vsock::packet::{HEADER, Header};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 3;
const PAYLOAD: u64 = BUFFERS + 64;
const RECEIVE: u64 = 2 << 20;

fuzz_target!(|bytes: &[u8]| {
    let memory = guest_memory();
    let hosts: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let accepted = Arc::clone(&hosts);
    let accept = move |port: u32| {
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        accepted.lock().ok()?.push(ours);
        (port % 4 != 3).then_some(theirs)
    };
    let Ok((mut device, handle)) = Vsock::new(CID, Box::new(accept)) else {
        return;
    };
    let mut receive = Ring::new(&memory, 0x1000, 64);
    let mut transmit = Ring::new(&memory, 0x4000, 128);
    let event = Ring::new(&memory, 0x8000, 8);
    let (line, _) = interrupt();
    let queues = activate(&[&receive, &transmit, &event], true, &line);
    if device.activate(memory.clone(), queues, 1).is_err() {
        return;
    }
    let _client = handle.connect(1024, Box::new(|_| {}));

    // Each packet: what the host does, and a header whose addresses are right most of the time.
    for packet in bytes.chunks(1 + HEADER - 16) {
        let Some((&act, fields)) = packet.split_first() else {
            return;
        };
        let mut header = [0u8; HEADER];
        for (slot, byte) in header.iter_mut().skip(16).zip(fields) {
            *slot = *byte;
        }
        let mut decoded = Header::decode(&header);
        decoded.source_cid = if act & 0x40 == 0 { CID } else { u64::from(act) };
        decoded.destination_cid = if act & 0x80 == 0 { 2 } else { u64::from(act) };
        if act & 0x20 == 0 {
            // Few ports and short payloads, so that packets meet the streams that others opened.
            decoded.kind = 1;
            decoded.source_port %= 4;
            decoded.destination_port %= 4;
            decoded.length %= 4096;
        }

        receive.take_used();
        while let Some(slot) = receive.add(&[(RECEIVE, 4140, true)]) {
            let _ = slot;
        }
        transmit.take_used();
        if memory.write_slice(&decoded.encode(), GuestAddress(BUFFERS)).is_err()
            || transmit.add(&[(BUFFERS, 44, false), (PAYLOAD, 4096, false)]).is_none()
        {
            return;
        }
        if let Ok(mut hosts) = hosts.lock() {
            match act & 3 {
                1 => {
                    for mut host in hosts.iter() {
                        let _ = host.write(&[act; 5000]);
                    }
                }
                2 => hosts.clear(),
                _ => {}
            }
        }
        for queue in [1, 0] {
            let mut turns = 0;
            loop {
                match device.process(queue) {
                    Ok(Progress::Done) => break,
                    Ok(Progress::More) => turns += 1,
                    Err(_) => return device.reset(),
                }
                assert!(turns < 1000, "the device never comes to rest");
            }
        }
        if device.process_events().is_err() {
            return device.reset();
        }
    }
});
