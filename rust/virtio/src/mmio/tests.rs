//! Checklist items "Configuration and status" and "MMIO", and the worker's promises.
#![expect(clippy::arithmetic_side_effects, reason = "tests")]

use super::MmioTransport;
use crate::device::{Device, Progress};
use crate::queue::{ActiveQueue, Malformed};
use crate::rng::Rng;
use crate::testing::{
    BUFFERS, EVENT_IDX, HOLE, Ring, VERSION_1, event, guest_memory, read_register, start, write_register,
};
use proptest::prelude::*;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 64;

struct Bench {
    memory: GuestMemoryMmap,
    transport: Arc<MmioTransport>,
    line: EventFd,
}

impl Bench {
    fn new(device: Box<dyn Device>) -> Bench {
        let memory = guest_memory();
        let line = event();
        let copy = line.try_clone().unwrap();
        let transport = MmioTransport::spawn("test", device, memory.clone(), copy).unwrap();
        Bench { memory, transport, line }
    }

    fn rng() -> Bench {
        Bench::new(Box::new(Rng::new()))
    }

    fn ring(&self) -> Ring {
        Ring::new(&self.memory, 0x1000, 8)
    }

    fn status(&self) -> u32 {
        read_register(&self.transport, STATUS)
    }

    fn write(&self, offset: u64, value: u32) {
        write_register(&self.transport, offset, value);
    }

    /// The law of every hostile test: after a reset the device works.
    fn works(&self) -> bool {
        let mut ring = self.ring();
        clear(&self.memory, &ring);
        let status = start(&self.transport, &[&ring], VERSION_1 | EVENT_IDX);
        ring.add(&[(BUFFERS, 64, true)]).unwrap();
        self.write(0x50, 0);
        let used = eventually(|| ring.take_used().first().copied());
        status == 0xf && used.is_some_and(|(_, written)| written == 64)
    }
}

fn clear(memory: &GuestMemoryMmap, ring: &Ring) {
    use vm_memory::{Bytes, GuestAddress};
    memory.write_slice(&[0; 0x1000], GuestAddress(ring.descriptors)).unwrap();
}

fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        if let Some(found) = look() {
            return Some(found);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    None
}

fn becomes_true(mut look: impl FnMut() -> bool) -> bool {
    eventually(|| look().then_some(())).is_some()
}

/// A device that does what a test tells it to.
#[derive(Default)]
struct Told {
    fail: Arc<AtomicBool>,
    panic: Arc<AtomicBool>,
    slow: Arc<AtomicBool>,
    resets: Arc<AtomicU32>,
}

impl Device for Told {
    fn device_id(&self) -> u32 {
        99
    }
    fn queue_limits(&self) -> &'static [u16] {
        &[8, 16]
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn config_space(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6, 7]
    }
    fn activate(&mut self, _: GuestMemoryMmap, _: Vec<ActiveQueue>, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn process(&mut self, _: usize) -> Result<Progress, Malformed> {
        if self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(300));
        }
        assert!(!self.panic.load(Ordering::SeqCst), "told to");
        if self.fail.load(Ordering::SeqCst) {
            return Err(Malformed::Request("told to"));
        }
        Ok(Progress::Done)
    }
    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

fn two_rings(bench: &Bench) -> [Ring; 2] {
    [Ring::new(&bench.memory, 0x1000, 8), Ring::new(&bench.memory, 0x3000, 16)]
}

#[test]
fn test_registers_identify_the_device() {
    let bench = Bench::new(Box::<Told>::default());
    let read = |offset| read_register(&bench.transport, offset);
    assert_eq!([read(0), read(4), read(8)], [0x7472_6976, 2, 99]);
    assert_eq!(read(0x10), 0b101 | 1 << 29);
    bench.write(0x14, 1);
    assert_eq!(read(0x10), 1);
    for select in [2, u32::MAX] {
        bench.write(0x14, select);
        assert_eq!(read(0x10), 0);
    }
    // No shared memory: length -1. No queue reset. No such queue: limit 0.
    assert_eq!([read(0xb0), read(0xb4), read(0xc0)], [u32::MAX, u32::MAX, 0]);
    let limits = [0, 1, 2, u32::MAX].map(|queue| {
        bench.write(0x30, queue);
        read(0x34)
    });
    assert_eq!(limits, [8, 16, 0, 0]);
}

#[test]
fn test_read_odd_widths_are_zeros_in_registers_and_bytes_in_configuration() {
    let bench = Bench::new(Box::<Told>::default());
    let read = |offset, width| {
        let mut bytes = vec![0xee; width];
        bench.transport.read(offset, &mut bytes);
        bytes
    };
    for (offset, width) in
        [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfe, 4), (0xfc, 8), (0x14, 4), (0x20, 4), (0xcc, 4)]
    {
        assert_eq!(read(offset, width), vec![0; width], "{offset:#x} {width}");
    }
    assert_eq!(read(0x100, 8), [1, 2, 3, 4, 5, 6, 7, 0]);
    assert_eq!(read(0x103, 1), [4]);
    assert_eq!(read(0x105, 4), [6, 7, 0, 0]);
    for offset in [0x107, 0xffd, 0x1000, u64::MAX - 1, u64::MAX] {
        assert_eq!(read(offset, 8), [0; 8]);
    }
    assert_eq!(read(0x100, 0), Vec::<u8>::new());
}

#[test]
fn test_write_odd_widths_change_nothing() {
    let bench = Bench::rng();
    for (offset, bytes) in [
        (STATUS, &[1u8][..]),
        (STATUS, &[1, 0]),
        (STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (STATUS, &[]),
        (0x6f, &[0, 1, 0, 0]),
        (0x71, &[1, 0, 0, 0]),
    ] {
        bench.transport.write(offset, bytes);
    }
    bench.transport.write(0x100, &[1, 2, 3, 4]);
    bench.transport.write(u64::MAX, &[1, 2, 3, 4]);
    assert_eq!(bench.status(), 0);
    assert!(bench.works());
}

#[test]
fn test_status_out_of_order_is_refused() {
    let sequences: &[(&[u32], u32)] = &[
        (&[2], 0),
        (&[8], 0),
        (&[4], 0),
        (&[1, 3, 7], 3),
        (&[1, 3, 1], 3),
        (&[1, 3, 2], 3),
        (&[1, 3, 0x13], 3),
        (&[1, 3, 0x23], 3),
        (&[1, 3, 0x103], 3),
        (&[u32::MAX], 0),
        // FEATURES_OK does not stay without VERSION_1.
        (&[1, 3, 0xb], 3),
        (&[1, 3, 0xf], 3),
        // FAILED, and then only a reset.
        (&[1, 3, 0x83, 0x8b, 0x87, 3], 0x83),
        (&[1, 3, 0x83, 0], 0),
        // NEEDS_RESET is not the driver's to set.
        (&[1, 0x41, 0x43], 3),
    ];
    for (writes, expected) in sequences {
        let bench = Bench::rng();
        for &value in *writes {
            bench.write(STATUS, value);
        }
        assert_eq!(bench.status(), *expected, "{writes:?}");
        assert!(bench.works());
    }
}

#[test]
fn test_features_not_offered_are_refused() {
    let attempts: &[&[(u32, u32)]] = &[
        &[(0, 0), (1, 0)],
        &[(0, 2), (1, 1)],
        &[(0, u32::MAX), (1, u32::MAX)],
        &[(0, 0), (1, 3)],
        &[(0, 0), (1, 1), (2, 1)],
        &[(0, 0), (1, 1), (u32::MAX, u32::MAX)],
    ];
    for words in attempts {
        let bench = Bench::rng();
        bench.write(STATUS, 1);
        bench.write(STATUS, 3);
        for &(select, value) in *words {
            bench.write(0x24, select);
            bench.write(0x20, value);
        }
        bench.write(STATUS, 0xb);
        assert_eq!(bench.status(), 3, "{words:?}");
        assert!(bench.works());
    }
}

#[test]
fn test_features_changed_after_features_ok_are_ignored() {
    let bench = Bench::rng();
    let ring = bench.ring();
    assert_eq!(start(&bench.transport, &[&ring], VERSION_1), 0xf);
    bench.write(0x24, 0);
    bench.write(0x20, u32::MAX);
    bench.write(STATUS, 0xf);
    assert_eq!(bench.status(), 0xf);
    assert!(bench.works());
}

#[test]
fn test_queue_writes_outside_their_time_are_ignored() {
    let bench = Bench::rng();
    let read_ready = || read_register(&bench.transport, 0x44);
    // Before FEATURES_OK.
    bench.write(0x44, 1);
    assert_eq!(read_ready(), 0);
    // After DRIVER_OK.
    let ring = bench.ring();
    start(&bench.transport, &[&ring], VERSION_1);
    bench.write(0x44, 0);
    assert_eq!(read_ready(), 1);
    bench.write(0x38, 4);
    bench.write(0x80, u32::try_from(HOLE).unwrap());
    assert_eq!(bench.status(), 0xf);
    // After a reset.
    bench.write(STATUS, 0);
    assert_eq!(read_ready(), 0);
    assert!(bench.works());
}

#[test]
fn test_queue_of_a_ready_queue_does_not_change() {
    let bench = Bench::rng();
    let ring = bench.ring();
    for status in [1, 3] {
        bench.write(STATUS, status);
    }
    bench.write(0x24, 1);
    bench.write(0x20, 1);
    bench.write(STATUS, 0xb);
    bench.write(0x38, 8);
    for (register, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
        bench.write(register, u32::try_from(address).unwrap());
    }
    bench.write(0x44, 1);
    // None of these would pass validation.
    bench.write(0x38, 3);
    bench.write(0x80, u32::try_from(HOLE).unwrap());
    bench.write(0xa4, u32::MAX);
    bench.write(STATUS, 0xf);
    assert_eq!(bench.status(), 0xf);
}

#[test]
fn test_driver_ok_with_hostile_queues_needs_reset_and_says_so() {
    let configure: &[&dyn Fn(&Bench)] = &[
        &|_| {},
        &|bench| bench.write(0x44, 1),
        &|bench| {
            bench.write(0x38, 8);
            bench.write(0x44, 2);
            bench.write(0x44, u32::MAX);
        },
        &|bench| {
            bench.write(0x38, 0x8000_0000);
            bench.write(0x80, 0x1000);
            bench.write(0x90, 0x2000);
            bench.write(0xa0, 0x3000);
            bench.write(0x44, 1);
        },
        &|bench| {
            bench.write(0x30, 1);
            bench.write(0x38, 8);
            bench.write(0x44, 1);
        },
    ];
    for (number, act) in configure.iter().enumerate() {
        let bench = Bench::rng();
        bench.write(STATUS, 3);
        bench.write(0x24, 1);
        bench.write(0x20, 1);
        bench.write(STATUS, 0xb);
        act(&bench);
        bench.write(STATUS, 0xf);
        assert_eq!(bench.status(), 0xf | NEEDS_RESET, "{number}");
        assert_eq!(read_register(&bench.transport, 0x60), 2);
        assert!(bench.line.read().is_ok());
        assert_eq!(bench.transport.faults().0, 1);
        assert!(bench.works());
    }
}

#[test]
fn test_malformed_chain_needs_reset_then_works_again() {
    let bench = Bench::rng();
    let mut ring = bench.ring();
    start(&bench.transport, &[&ring], VERSION_1);
    ring.add(&[(HOLE, 64, true)]).unwrap();
    bench.write(0x50, 0);
    assert!(becomes_true(|| bench.status() == 0xf | NEEDS_RESET));
    assert_eq!(read_register(&bench.transport, 0x60) & 2, 2);
    let (count, reason) = bench.transport.faults();
    assert!(count == 1 && reason.unwrap().contains("RAM"));
    // Nothing happens until the reset.
    bench.write(STATUS, 0xf);
    bench.write(0x50, 0);
    assert_eq!(bench.status(), 0xf | NEEDS_RESET);
    assert!(bench.works());
    assert_eq!(bench.transport.faults().0, 1);
}

#[test]
fn test_kicks_at_the_wrong_time_do_nothing() {
    let bench = Bench::rng();
    for queue in [0, 1, 7, u32::MAX] {
        bench.write(0x50, queue);
    }
    let mut ring = bench.ring();
    start(&bench.transport, &[&ring], VERSION_1);
    for _ in 0..10_000 {
        bench.write(0x50, 0);
    }
    assert!(ring.take_used().is_empty());
    assert_eq!(bench.status(), 0xf);
    bench.write(STATUS, 0);
    bench.write(0x50, 0);
    ring.add(&[(BUFFERS, 8, true)]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(ring.take_used().is_empty());
    assert!(bench.works());
}

#[test]
fn test_chain_offered_before_driver_ok_is_used_without_a_kick() {
    let bench = Bench::rng();
    let mut ring = bench.ring();
    ring.add(&[(BUFFERS, 8, true)]).unwrap();
    start(&bench.transport, &[&ring], VERSION_1);
    assert!(becomes_true(|| !ring.take_used().is_empty()));
}

#[test]
fn test_interrupt_acknowledge_clears_set_bits_only() {
    let bench = Bench::rng();
    let mut ring = bench.ring();
    start(&bench.transport, &[&ring], VERSION_1);
    ring.add(&[(BUFFERS, 8, true)]).unwrap();
    bench.write(0x50, 0);
    let status = || read_register(&bench.transport, 0x60);
    assert!(becomes_true(|| status() == 1));
    bench.write(0x64, !1);
    assert_eq!(status(), 1);
    bench.write(0x64, u32::MAX);
    assert_eq!(status(), 0);
}

#[test]
fn test_device_panic_needs_reset_then_works_again() {
    let told = Told::default();
    let (panic, resets) = (Arc::clone(&told.panic), Arc::clone(&told.resets));
    let bench = Bench::new(Box::new(told));
    let rings = two_rings(&bench);
    panic.store(true, Ordering::SeqCst);
    start(&bench.transport, &[&rings[0], &rings[1]], VERSION_1);
    assert!(becomes_true(|| bench.status() == 0xf | NEEDS_RESET));
    assert!(resets.load(Ordering::SeqCst) > 0);
    panic.store(false, Ordering::SeqCst);
    assert_eq!(start(&bench.transport, &[&rings[0], &rings[1]], VERSION_1), 0xf);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bench.status(), 0xf);
}

#[test]
fn test_reset_waits_for_the_worker() {
    let told = Told::default();
    let (slow, resets) = (Arc::clone(&told.slow), Arc::clone(&told.resets));
    let bench = Bench::new(Box::new(told));
    let rings = two_rings(&bench);
    slow.store(true, Ordering::SeqCst);
    start(&bench.transport, &[&rings[0], &rings[1]], VERSION_1);
    std::thread::sleep(Duration::from_millis(50));
    let before = resets.load(Ordering::SeqCst);
    bench.write(STATUS, 0);
    assert_eq!(resets.load(Ordering::SeqCst), before + 1);
    assert_eq!(bench.status(), 0);
}

#[test]
fn test_interrupt_registers_do_not_wait_for_a_slow_device() {
    let told = Told::default();
    let slow = Arc::clone(&told.slow);
    let bench = Bench::new(Box::new(told));
    let rings = two_rings(&bench);
    slow.store(true, Ordering::SeqCst);
    start(&bench.transport, &[&rings[0], &rings[1]], VERSION_1);
    std::thread::sleep(Duration::from_millis(50));
    let transport = Arc::clone(&bench.transport);
    let (sender, receiver) = std::sync::mpsc::channel();
    let resetter = std::thread::spawn(move || {
        sender.send(()).unwrap();
        write_register(&transport, STATUS, 0);
    });
    receiver.recv().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let started = Instant::now();
    read_register(&bench.transport, 0x60);
    bench.write(0x64, 3);
    assert!(started.elapsed() < Duration::from_millis(100));
    resetter.join().unwrap();
}

#[test]
fn test_thousand_resets_racing_with_kicks_leave_it_working() {
    let bench = Bench::rng();
    let transport = Arc::clone(&bench.transport);
    let over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&over);
    let kicker = std::thread::spawn(move || {
        while !flag.load(Ordering::SeqCst) {
            write_register(&transport, 0x50, 0);
        }
    });
    for _ in 0..1000 {
        let mut ring = bench.ring();
        clear(&bench.memory, &ring);
        ring.add(&[(BUFFERS, 8, true)]).unwrap();
        assert_eq!(start(&bench.transport, &[&ring], VERSION_1), 0xf);
    }
    over.store(true, Ordering::SeqCst);
    kicker.join().unwrap();
    assert!(bench.works());
}

#[test]
fn test_stop_ends_the_worker_and_the_window_still_answers() {
    let bench = Bench::rng();
    let ring = bench.ring();
    start(&bench.transport, &[&ring], VERSION_1);
    bench.transport.stop();
    bench.transport.stop();
    bench.write(STATUS, 0);
    assert_eq!(bench.status(), 0);
    assert_eq!(read_register(&bench.transport, 0), 0x7472_6976);
}

#[test]
fn test_worker_takes_no_signals() {
    let bench = Bench::rng();
    let worker_masks = || -> Vec<u64> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let workers = tasks.filter(|path| read(path.join("comm")) == "test\n");
        let blocked =
            |status: String| status.lines().find_map(|line| line.strip_prefix("SigBlk:\t").map(str::to_owned));
        workers
            .filter_map(|path| blocked(read(path.join("status"))))
            .map(|mask| u64::from_str_radix(&mask, 16).unwrap())
            .collect()
    };
    // A thread names itself, some time after it was made.
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut masks = worker_masks();
    while masks.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        masks = worker_masks();
    }
    // SIGKILL, SIGSTOP and the C library's own two cannot be blocked.
    let all = !(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32);
    assert!(!masks.is_empty() && masks.iter().all(|mask| mask & all == all), "{masks:x?}");
    bench.transport.stop();
}

/// Writes that are near what a driver does, and any others.
fn access() -> impl Strategy<Value = (u64, Vec<u8>)> {
    let register = prop_oneof![
        prop::sample::select(vec![
            0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xc0,
        ]),
        0u64..0x1100,
        any::<u64>(),
    ];
    let word = prop_oneof![
        prop::sample::select(vec![0u32, 1, 2, 3, 4, 7, 8, 0xb, 0xf, 0x1000, 0x2000, 0x3000, 0x40, 0x80]),
        any::<u32>(),
    ]
    .prop_map(|word| word.to_le_bytes().to_vec());
    let bytes = prop_oneof![4 => word, 1 => proptest::collection::vec(any::<u8>(), 0..9)];
    (register, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No sequence of accesses panics, bits of Status come in order, and a reset always recovers the device.
    #[test]
    fn prop_any_accesses_leave_a_defined_state_and_reset_recovers(
        accesses in proptest::collection::vec(access(), 0..60),
        started in any::<bool>(),
    ) {
        let bench = Bench::rng();
        if started {
            let ring = bench.ring();
            start(&bench.transport, &[&ring], VERSION_1);
        }
        for (offset, bytes) in accesses {
            bench.transport.write(offset, &bytes);
            let mut back = bytes;
            bench.transport.read(offset, &mut back);
            let status = bench.status();
            prop_assert_eq!(status & !0xcf, 0);
            let order = status & 0xf;
            prop_assert!([0, 1, 3, 0xb, 0xf].contains(&order), "{:#x}", status);
        }
        prop_assert!(bench.works());
    }
}
