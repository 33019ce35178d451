//! The gate from descriptor tables to host memory: any table, rings and flags give a chain within RAM, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_virtio::device::{Device, Progress};
use microvm_virtio::queue::Chain;
use microvm_virtio::rng::Rng;
use microvm_virtio::testing::{Ring, activate, guest_memory, interrupt};
use vm_memory::{Bytes, GuestAddress};

const BASE: u64 = 0x1000;

fuzz_target!(|bytes: &[u8]| {
    let Some((&[size, event_idx], image)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let memory = guest_memory();
    let ring = Ring::new(&memory, BASE, 1 << (size % 6));
    // The rings are whatever the input says.
    let room = usize::try_from(ring.used - BASE).unwrap_or(0);
    let image = image.get(..image.len().min(room)).unwrap_or_default();
    if memory.write_slice(image, GuestAddress(BASE)).is_err() {
        return;
    }

    let (line, _) = interrupt();
    let Some(mut queue) = activate(&[&ring], event_idx & 1 != 0, &line).pop() else {
        return;
    };
    let mut popped = 0;
    while let Ok(Some(chain)) = queue.pop(&memory) {
        let Chain { mut readable, mut writable, token, descriptors } = chain;
        assert!((1..=ring.size).contains(&descriptors));
        assert!(readable.remaining() + writable.remaining() >= usize::from(descriptors));
        // All of RAM is 5 MiB; a chain may name some of it many times.
        if readable.remaining() + writable.remaining() < 1 << 20 {
            let mut copy = vec![0; readable.remaining()];
            assert!(readable.read_exact(&mut copy).is_ok());
            let ones = vec![1; writable.remaining()];
            assert!(writable.write_all(&ones).is_ok());
        }
        if queue.complete(&memory, token, 0).is_err() || queue.notify(&memory).is_err() {
            break;
        }
        popped += 1;
        assert!(popped <= usize::from(u16::MAX), "the available index does not move");
    }

    // A whole device over the same memory: it ends, within its budget, or fails.
    let mut device = Rng::new();
    let queues = activate(&[&ring], event_idx & 1 != 0, &line);
    if device.activate(memory, queues, 0).is_ok() {
        let mut turns = 0;
        while let Ok(Progress::More) = device.process(0) {
            turns += 1;
            assert!(turns < 1000, "a bounded ring never ends");
        }
    }
});
