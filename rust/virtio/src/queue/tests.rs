//! Checklist items "Chain", "Indirect" and "Ring": whole and valid, or malformed.
#![expect(clippy::arithmetic_side_effects, reason = "tests")]

use super::*;
use crate::device::Progress;
use crate::interrupt::Interrupt;
use crate::testing::{BUFFERS, END, HIGH, HOLE, INDIRECT, NEXT, Ring, WRITE, activate, guest_memory, interrupt};
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// A descriptor as it is in the table: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

struct Bench {
    memory: GuestMemoryMmap,
    ring: Ring,
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
    line: EventFd,
}

impl Bench {
    fn new(event_idx: bool) -> Bench {
        let memory = guest_memory();
        let ring = Ring::new(&memory, 0x1000, 8);
        let (interrupt, line) = interrupt();
        let queue = activate(&[&ring], event_idx, &interrupt).remove(0);
        Bench { memory, ring, queue, interrupt, line }
    }

    fn pop(&mut self) -> Result<Option<Chain<'_>>, Malformed> {
        self.queue.pop(&self.memory)
    }

    fn complete(&mut self, token: Token) {
        self.queue.complete(&self.memory, token, 0).unwrap();
    }
}

/// Writes the descriptors at 0, 1, 2..., offers head 0 and returns what the gate says.
fn verdict(descriptors: &[Raw]) -> Result<(usize, usize), Malformed> {
    let mut bench = Bench::new(false);
    for (&(address, length, flags, next), index) in descriptors.iter().zip(0..) {
        bench.ring.write_descriptor(index, address, length, flags, next);
    }
    bench.ring.offer(0);
    let chain = bench.pop()?.expect("a chain was offered");
    Ok((chain.readable.remaining(), chain.writable.remaining()))
}

#[test]
fn test_pop_correct_chains_are_whole() {
    let chains: [&[Raw]; 4] = [
        &[(BUFFERS, 16, 0, 0)],
        &[(BUFFERS, 16, NEXT, 1), (BUFFERS, 100, NEXT | WRITE, 2), (BUFFERS, 1, WRITE, 0)],
        // Two regions that touch: one buffer, two slices.
        &[((2 << 20) - 10, 20, WRITE, 0)],
        // The last bytes of RAM.
        &[(END - 4, 4, 0, 0)],
    ];
    let sizes = chains.map(|chain| verdict(chain).unwrap());
    assert_eq!(sizes, [(16, 0), (16, 101), (0, 20), (4, 0)]);
}

#[test]
fn test_pop_hostile_chain_is_malformed() {
    let b = BUFFERS;
    let hostile: &[(&str, &[Raw])] = &[
        ("self loop", &[(b, 1, NEXT, 0)]),
        ("2-cycle", &[(b, 1, NEXT, 1), (b, 1, NEXT, 0)]),
        ("next beyond the queue", &[(b, 1, NEXT, 8)]),
        ("next far beyond", &[(b, 1, NEXT, 0xffff)]),
        ("beyond RAM", &[(END, 1, 0, 0)]),
        ("in a hole", &[(HOLE, 1, 0, 0)]),
        ("into a hole", &[(HOLE - 1, 2, WRITE, 0)]),
        ("over a hole", &[(HOLE - 1, 0x40_0002, 0, 0)]),
        ("into RAM from a hole", &[(HIGH - 1, 2, 0, 0)]),
        ("inside the descriptor table", &[(0x1000, 16, WRITE, 0)]),
        ("last byte of the used ring", &[(0x1000 + 8 * 16 + 24 + 69, 1, WRITE, 0)]),
        ("over all rings", &[(0xfff, 0x1000, WRITE, 0)]),
        ("length 0", &[(b, 0, 0, 0)]),
        ("address and length 0", &[(0, 0, 0, 0)]),
        ("length of 4 GiB", &[(b, u32::MAX, 0, 0)]),
        ("wraps around", &[(u64::MAX, 2, 0, 0)]),
        ("ends at 2^64", &[(u64::MAX - 1, 2, 0, 0)]),
        ("readable after writable", &[(b, 1, WRITE | NEXT, 1), (b, 1, 0, 0)]),
        ("indirect", &[(b, 16, INDIRECT, 0)]),
        ("indirect with next", &[(b, 16, INDIRECT | NEXT, 1), (b, 16, 0, 0)]),
        ("indirect and writable", &[(b, 16, INDIRECT | WRITE, 0)]),
        ("indirect of length 0", &[(b, 0, INDIRECT, 0)]),
        ("indirect later", &[(b, 1, NEXT, 1), (b, 16, INDIRECT, 0)]),
    ];
    for (what, chain) in hostile {
        assert!(verdict(chain).is_err(), "{what} was accepted");
    }
}

#[test]
fn test_pop_sum_over_4_gib_is_malformed() {
    let big = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 30), 1 << 30)]).unwrap();
    let mut ring = Ring::new(&big, 0x1000, 8);
    let (interrupt, _) = interrupt();
    let mut queue = activate(&[&ring], false, &interrupt).remove(0);
    ring.add(&[(1 << 30, 1 << 30, true); 5]).unwrap();
    assert!(matches!(queue.pop(&big), Err(Malformed::TooLarge { head: _ })));
}

#[test]
fn test_pop_head_beyond_the_queue_is_malformed() {
    for head in [8, 0xffff] {
        let mut bench = Bench::new(false);
        bench.ring.offer(head);
        assert_eq!(bench.pop().unwrap_err(), Malformed::Index { index: head, size: 8 });
    }
}

#[test]
fn test_pop_head_in_flight_is_malformed_until_completed() {
    let mut bench = Bench::new(false);
    bench.ring.write_descriptor(0, BUFFERS, 1, 0, 0);
    bench.ring.offer(0);
    let first = bench.pop().unwrap().unwrap().token;
    bench.complete(first);
    bench.ring.offer(0);
    let _second = bench.pop().unwrap().unwrap().token;
    bench.ring.offer(0);
    assert_eq!(bench.pop().unwrap_err(), Malformed::InFlight { head: 0 });
}

#[test]
fn test_pop_available_index_out_of_step_is_malformed() {
    for index in [9, 0x8000, 0xffff] {
        let mut bench = Bench::new(false);
        bench.ring.set_available_index(index);
        assert_eq!(bench.pop().unwrap_err(), Malformed::AvailableIndex { next: 0, size: 8 });
    }
}

#[test]
fn test_pop_after_65536_chains_index_wraps() {
    let mut bench = Bench::new(true);
    for _ in 0..70_000u32 {
        bench.ring.add(&[(BUFFERS, 1, false)]).unwrap();
        let token = bench.pop().unwrap().unwrap().token;
        bench.complete(token);
        assert_eq!(bench.ring.take_used().len(), 1);
    }
    assert!(bench.pop().unwrap().is_none());
}

#[test]
fn test_chain_descriptor_changed_after_pop_has_no_effect() {
    let mut bench = Bench::new(false);
    bench.memory.write_slice(b"truth", GuestAddress(BUFFERS)).unwrap();
    bench.ring.write_descriptor(0, BUFFERS, 5, 0, 0);
    bench.ring.offer(0);
    let mut chain = bench.queue.pop(&bench.memory).unwrap().unwrap();
    bench.ring.write_descriptor(0, HOLE, u32::MAX, WRITE, 7);
    let mut bytes = [0; 5];
    chain.readable.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"truth");
}

#[test]
fn test_give_back_same_chain_comes_again() {
    let mut bench = Bench::new(false);
    let head = bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
    let token = bench.pop().unwrap().unwrap().token;
    bench.queue.give_back(token).unwrap();
    assert_eq!(bench.pop().unwrap().unwrap().token.head(), head);
}

#[test]
fn test_give_back_not_the_last_is_refused() {
    let mut bench = Bench::new(false);
    for _ in 0..2 {
        bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
    }
    let first = bench.pop().unwrap().unwrap().token;
    let _second = bench.pop().unwrap().unwrap().token;
    assert!(bench.queue.give_back(first).is_err());
}

#[test]
fn test_drain_endless_producer_stops_at_the_budget() {
    let mut bench = Bench::new(true);
    let Bench { memory, ring, queue, .. } = &mut bench;
    ring.add(&[(BUFFERS, 1, true)]).unwrap();
    let mut handled = 0;
    let progress = queue.drain(memory, 100, |queue, chain| {
        handled += 1;
        queue.complete(memory, chain.token, 1)?;
        ring.take_used();
        ring.add(&[(BUFFERS, 1, true)]).unwrap();
        Ok(())
    });
    assert_eq!((progress, handled), (Ok(Progress::More), 100));
}

#[test]
fn test_drain_done_asks_for_the_next_kick_and_interrupts_once() {
    let mut bench = Bench::new(true);
    for _ in 0..3 {
        bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
    }
    let Bench { memory, queue, .. } = &mut bench;
    let progress = queue.drain(memory, 100, |queue, chain| queue.complete(memory, chain.token, 1));
    assert_eq!(progress, Ok(Progress::Done));
    assert_eq!(bench.ring.available_event(), 3);
    assert_eq!((bench.line.read().unwrap(), bench.interrupt.status()), (1, 1));
}

#[test]
fn test_notify_event_idx_interrupts_only_past_the_event() {
    let mut bench = Bench::new(true);
    bench.ring.set_used_event(2);
    let mut interrupts = Vec::new();
    for _ in 0..5 {
        bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
        let token = bench.pop().unwrap().unwrap().token;
        bench.complete(token);
        bench.queue.notify(&bench.memory).unwrap();
        interrupts.push(bench.line.read().is_ok());
    }
    assert_eq!(interrupts, [false, false, true, false, false]);
}

#[test]
fn test_notify_without_event_idx_follows_the_flag() {
    let mut bench = Bench::new(false);
    let mut interrupts = Vec::new();
    for flags in [0, 1, 0xfffe] {
        bench.ring.set_flags(flags);
        bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
        let token = bench.pop().unwrap().unwrap().token;
        bench.complete(token);
        bench.queue.notify(&bench.memory).unwrap();
        interrupts.push(bench.line.read().is_ok());
    }
    assert_eq!(interrupts, [true, false, true]);
}

#[test]
fn test_guest_rewrites_the_used_ring_device_does_not_care() {
    let mut bench = Bench::new(true);
    for round in 0..20 {
        bench.ring.add(&[(BUFFERS, 1, true)]).unwrap();
        let token = bench.pop().unwrap().unwrap().token;
        bench.complete(token);
        assert_eq!(bench.ring.take_used().len(), 1, "round {round}");
        let junk = [0xa5u8; 64];
        bench.memory.write_slice(&junk, GuestAddress(bench.ring.used + 4)).unwrap();
    }
}

#[test]
fn test_validate_hostile_setups_are_refused() {
    let memory = guest_memory();
    let (interrupt, _) = interrupt();
    let good = Ring::new(&memory, 0x1000, 8).setup(8);
    let bad = [
        QueueSetup { ready: false, ..good },
        QueueSetup { size: 0, ..good },
        QueueSetup { size: 3, ..good },
        QueueSetup { size: 16, ..good },
        QueueSetup { size: 0x1_0008, ..good },
        QueueSetup { descriptors: 0, ..good },
        QueueSetup { descriptors: 0x1008, ..good },
        QueueSetup { available: good.available + 1, ..good },
        QueueSetup { used: good.used + 2, ..good },
        QueueSetup { descriptors: HOLE, ..good },
        QueueSetup { available: HOLE - 4, ..good },
        QueueSetup { used: END, ..good },
        QueueSetup { used: !3, ..good },
        QueueSetup { available: good.descriptors, ..good },
        QueueSetup { used: good.available & !3, ..good },
    ];
    for setup in bad {
        assert!(validate(&[setup], &memory, true, &interrupt).is_err(), "{setup:?}");
    }
    assert!(validate(&[good], &memory, true, &interrupt).is_ok());
    // Two queues in the same place.
    assert!(matches!(validate(&[good, good], &memory, true, &interrupt), Err(SetupError::Overlap { queue: 1, .. })));
}

/// Numbers that are likely to be near something.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..0x3000,
        (HOLE - 64)..(HOLE + 64),
        (HIGH - 64)..(HIGH + 64),
        (END - 64)..(END + 64),
        BUFFERS..(BUFFERS + 4096),
        any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..200, Just(4096), any::<u32>()]
}

proptest! {
    /// Whatever the tables hold, a chain is within RAM and outside the rings, or malformed.
    #[test]
    fn prop_arbitrary_tables_yield_a_valid_chain_or_malformed(
        descriptors in proptest::collection::vec((address(), length(), 0u16..8, 0u16..10), 8),
        heads in proptest::collection::vec(0u16..10, 1..8),
    ) {
        let mut bench = Bench::new(true);
        for (&(address, length, flags, next), index) in descriptors.iter().zip(0..) {
            bench.ring.write_descriptor(index, address, length, flags, next);
        }
        for head in heads {
            bench.ring.offer(head);
        }
        let rings = bench.ring.descriptors..bench.ring.used + 6 + 64;
        while let Ok(Some(mut chain)) = bench.queue.pop(&bench.memory) {
            // The model: follow the chain again, with the rules written out the plain way.
            let mut index = chain.token.head();
            let (mut read, mut write) = (0usize, 0usize);
            for _ in 0..chain.descriptors {
                let (address, length, flags, next) = descriptors[usize::from(index)];
                let end = address.checked_add(u64::from(length)).unwrap();
                prop_assert!(length > 0 && flags & INDIRECT == 0);
                prop_assert!(end <= HOLE || (address >= HIGH && end <= END));
                // Between the parts there is at most padding.
                prop_assert!(end <= rings.start || address >= rings.end || length <= 3);
                if flags & WRITE == 0 {
                    prop_assert_eq!(write, 0);
                    read += length as usize;
                } else {
                    write += length as usize;
                }
                index = next;
            }
            prop_assert_eq!((chain.readable.remaining(), chain.writable.remaining()), (read, write));
            // And every byte can be touched.
            let mut bytes = vec![0; read];
            chain.readable.read_exact(&mut bytes).unwrap();
            let zeros = vec![0; write];
            chain.writable.write_all(&zeros).unwrap();
            // The writes may have changed nothing in the rings.
            let token = chain.token;
            bench.complete(token);
        }
    }

    /// However buffers are cut, bytes come out as they went in, and files see the same ones.
    #[test]
    fn prop_buffers_keep_bytes_in_order_through_any_cuts(
        cuts in proptest::collection::vec(1u32..700, 1..8),
        takes in proptest::collection::vec(1usize..500, 1..20),
        seed in any::<u8>(),
    ) {
        use std::io::Write;
        let mut bench = Bench::new(true);
        let total: u32 = cuts.iter().sum();
        let bytes: Vec<u8> = (0..total).map(|i| seed.wrapping_add((i % 251) as u8)).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let mut place = (2 << 20) - u64::from(total / 2);
        let mut buffers = Vec::new();
        for cut in cuts {
            buffers.push((place, cut, true));
            place += u64::from(cut);
        }

        bench.ring.add(&buffers).unwrap();
        let mut chain = bench.queue.pop(&bench.memory).unwrap().unwrap();
        let mut offset = 0u64;
        for take in takes.iter().cycle() {
            let take = (*take).min(chain.writable.remaining());
            chain.writable.read_from_file(&file, offset, take).unwrap();
            offset += take as u64;
            if chain.writable.remaining() == 0 {
                break;
            }
        }
        let token = chain.token;
        bench.complete(token);
        bench.ring.take_used();

        for buffer in &mut buffers {
            buffer.2 = false;
        }
        bench.ring.add(&buffers).unwrap();
        let mut chain = bench.queue.pop(&bench.memory).unwrap().unwrap();
        let copy = tempfile::tempfile().unwrap();
        let mut out = Vec::new();
        for (turn, take) in takes.iter().cycle().enumerate() {
            let take = (*take).min(chain.readable.remaining());
            let mut part = chain.readable.take(take).unwrap();
            if turn % 2 == 0 {
                part.write_to_file(&copy, out.len() as u64, take).unwrap();
                let mut back = vec![0; take];
                std::os::unix::fs::FileExt::read_exact_at(&copy, &mut back, out.len() as u64).unwrap();
                out.extend(back);
            } else {
                let mut back = vec![0; take];
                part.read_exact(&mut back).unwrap();
                out.extend(back);
            }
            if chain.readable.remaining() == 0 {
                break;
            }
        }
        prop_assert_eq!(out, bytes);
    }
}
