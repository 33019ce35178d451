//! Checklist items "block", and the disk as a model.
#![expect(clippy::arithmetic_side_effects, reason = "tests")]

use super::{Block, BlockError, MAX_RANGE_SECTORS};
use crate::device::{Device, Progress};
use crate::queue::Malformed;
use crate::testing::{BUFFERS, Buffer, Ring, activate, guest_memory, interrupt};
use proptest::prelude::*;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SECTORS: u64 = 32;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const FLUSH: u64 = 1 << 9;
const RANGES: u64 = 1 << 13 | 1 << 14;

struct Bench {
    memory: GuestMemoryMmap,
    ring: Ring,
    disk: Block,
    file: File,
}

impl Bench {
    fn new(read_only: bool, features: u64) -> Bench {
        let mut file = tempfile::tempfile().unwrap();
        let pattern: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512) as u8 + 1).collect();
        file.write_all(&pattern).unwrap();
        let mut disk = Block::new(file.try_clone().unwrap(), read_only).unwrap();
        let memory = guest_memory();
        let ring = Ring::new(&memory, 0x1000, 16);
        let (interrupt, _) = interrupt();
        let queues = activate(&[&ring], true, &interrupt);
        disk.activate(memory.clone(), queues, features).unwrap();
        Bench { memory, ring, disk, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        let bytes = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&bytes, GuestAddress(HEADER)).unwrap();
    }

    /// A request with these data buffers: status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(kind, sector);
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let chain = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.ring.add(&chain).unwrap();
        assert_eq!(self.disk.process(0), Ok(Progress::Done));
        let used = self.ring.take_used();
        assert_eq!(used.len(), 1);
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), used[0].1)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, &[(DATA, u32::try_from(bytes.len()).unwrap(), false)]).0
    }
}

#[test]
fn test_new_unfit_files_are_refused() {
    let empty = tempfile::tempfile().unwrap();
    assert!(matches!(Block::new(empty, true), Err(BlockError::Length { length: 0 })));
    let odd = tempfile::tempfile().unwrap();
    odd.set_len(513).unwrap();
    assert!(matches!(Block::new(odd, true), Err(BlockError::Length { length: 513 })));
    let directory = File::open("/").unwrap();
    assert!(matches!(Block::new(directory, true), Err(BlockError::Kind)));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Block::new(null, true), Err(BlockError::Kind)));
}

#[test]
fn test_config_space_states_capacity_and_limits() {
    let space = Bench::new(false, FLUSH).disk.config_space();
    assert_eq!(space.len(), 60);
    assert_eq!(space[0..8], SECTORS.to_le_bytes());
    assert_eq!(space[36..40], MAX_RANGE_SECTORS.to_le_bytes());
    assert_eq!(space[56], 1);
}

#[test]
fn test_features_read_only_disk_offers_no_discard() {
    let features = |read_only| Bench::new(read_only, FLUSH).disk.features();
    assert_eq!(features(true) & (RANGES | 1 << 5), 1 << 5);
    assert_eq!(features(false) & (RANGES | 1 << 5), RANGES);
}

#[test]
fn test_read_in_and_out_of_range() {
    let mut bench = Bench::new(true, FLUSH);
    let data = |length| [(DATA, length, true)];
    assert_eq!(bench.request(0, SECTORS - 1, &data(512)), (OK, 513));
    let last: u8 = bench.memory.read_obj(GuestAddress(DATA + 511)).unwrap();
    assert_eq!(u64::from(last), SECTORS);
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 513),
        (0, 511),
        (0, 1),
    ] {
        assert_eq!(bench.request(0, sector, &data(length)), (IOERR, 0), "{sector} {length}");
    }
    // No data at all.
    assert_eq!(bench.request(0, 0, &[]).0, IOERR);
    // Data that the device may only read.
    assert_eq!(bench.request(0, 0, &[(DATA, 512, false)]).0, IOERR);
}

#[test]
fn test_write_read_only_disk_is_refused_and_unchanged() {
    let mut bench = Bench::new(true, FLUSH | RANGES);
    assert_eq!(bench.request(1, 0, &[(DATA, 512, false)]), (IOERR, 1));
    let mut byte = [0];
    bench.file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn test_write_out_of_range_changes_nothing() {
    let mut bench = Bench::new(false, FLUSH);
    for (sector, length) in [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (0, 513)] {
        assert_eq!(bench.request(1, sector, &[(DATA, length, false)]).0, IOERR);
    }
    assert_eq!(bench.request(1, 0, &[(DATA, 512, true)]).0, IOERR);
    assert_eq!(bench.file.metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn test_unknown_kinds_are_unsupported() {
    let mut bench = Bench::new(false, FLUSH);
    for kind in [2, 3, 5, 7, 9, 11, 13, 14, 26, 0x8000_0000, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[(DATA, 512, true)]).0, UNSUPP, "{kind}");
    }
}

#[test]
fn test_get_id_takes_exactly_20_bytes() {
    let mut bench = Bench::new(true, FLUSH);
    assert_eq!(bench.request(8, 0, &[(DATA, 20, true)]), (OK, 21));
    let mut identity = [0xff; 20];
    bench.memory.read_slice(&mut identity, GuestAddress(DATA)).unwrap();
    assert_eq!(&identity, b"microvm\0\0\0\0\0\0\0\0\0\0\0\0\0");
    for length in [1, 19, 21] {
        assert_eq!(bench.request(8, 0, &[(DATA, length, true)]).0, IOERR);
    }
}

#[test]
fn test_requests_that_cannot_be_answered_are_malformed() {
    let chains: [&[Buffer]; 4] = [
        &[(HEADER, 16, false)],
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, true)],
    ];
    for chain in chains {
        let mut bench = Bench::new(true, FLUSH);
        bench.header(0, 0);
        bench.ring.add(chain).unwrap();
        assert!(matches!(bench.disk.process(0), Err(Malformed::Request(_))), "{chain:?}");
        // After a reset it works.
        bench.disk.reset();
        assert_eq!(bench.disk.process(0), Ok(Progress::Done));
        bench.ring = Ring::new(&bench.memory, 0x8000, 16);
        let (interrupt, _) = interrupt();
        let queues = activate(&[&bench.ring], true, &interrupt);
        bench.disk.activate(bench.memory.clone(), queues, FLUSH).unwrap();
        assert_eq!(bench.request(0, 0, &[(DATA, 512, true)]).0, OK);
    }
}

#[test]
fn test_header_and_status_cut_anywhere_are_understood() {
    let mut bench = Bench::new(true, FLUSH);
    bench.header(0, 3);
    // Header in three pieces; data and status in one buffer.
    let chain = [(HEADER, 1, false), (HEADER + 1, 8, false), (HEADER + 9, 7, false), (DATA, 513, true)];
    bench.ring.add(&chain).unwrap();
    assert_eq!(bench.disk.process(0), Ok(Progress::Done));
    assert_eq!(bench.ring.take_used()[0].1, 513);
    let bytes: [u8; 2] = bench.memory.read_obj(GuestAddress(DATA + 511)).unwrap();
    assert_eq!(bytes, [4, OK]);
}

#[test]
fn test_ranges_hostile_are_refused() {
    let mut bench = Bench::new(false, FLUSH | RANGES);
    for kind in [11, 13] {
        assert_eq!(bench.ranges(kind, &[(SECTORS, 1, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(SECTORS - 1, 2, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(u64::MAX, 1, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(u64::MAX / 512, 2, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(0, u32::MAX, 0)]), IOERR);
        assert_eq!(bench.ranges(kind, &[(0, 1, 2)]), UNSUPP);
        assert_eq!(bench.ranges(kind, &[(0, 0, 0); 17]), IOERR);
        assert_eq!(bench.request(kind, 0, &[]).0, IOERR);
        assert_eq!(bench.request(kind, 0, &[(DATA, 15, false)]).0, IOERR);
        assert_eq!(bench.request(kind, 0, &[(DATA, 17, false)]).0, IOERR);
    }
    assert_eq!(bench.ranges(11, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(bench.file.metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn test_ranges_longer_than_the_limit_are_refused_though_the_disk_is_larger() {
    let mut bench = Bench::new(false, FLUSH | RANGES);
    bench.file.set_len(64 << 20).unwrap();
    bench.disk = Block::new(bench.file.try_clone().unwrap(), false).unwrap();
    let (interrupt, _) = interrupt();
    let queues = activate(&[&bench.ring], true, &interrupt);
    bench.disk.activate(bench.memory.clone(), queues, FLUSH | RANGES).unwrap();
    for kind in [11, 13] {
        assert_eq!(bench.ranges(kind, &[(0, MAX_RANGE_SECTORS, 0)]), OK);
        assert_eq!(bench.ranges(kind, &[(0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
    }
}

#[test]
fn test_file_truncated_underneath_is_an_error_status() {
    let mut bench = Bench::new(false, FLUSH);
    bench.file.set_len(700).unwrap();
    assert_eq!(bench.request(0, 0, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(bench.request(0, 1, &[(DATA, 512, true)]).0, IOERR);
    assert_eq!(bench.request(0, 5, &[(DATA, 512, true)]).0, IOERR);
}

#[test]
fn test_host_error_is_an_error_status() {
    // A descriptor that only reads, under a disk that is to be writable: pwritev fails with EBADF.
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(SECTORS * 512).unwrap();
    let mut bench = Bench::new(false, FLUSH);
    let (interrupt, _) = interrupt();
    bench.disk = Block::new(File::open(path.path()).unwrap(), false).unwrap();
    let queues = activate(&[&bench.ring], true, &interrupt);
    bench.disk.activate(bench.memory.clone(), queues, FLUSH).unwrap();
    assert_eq!(bench.request(1, 0, &[(DATA, 512, false)]).0, IOERR);
    assert_eq!(bench.request(0, 0, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn test_process_more_requests_than_the_budget_says_more() {
    let mut bench = Bench::new(true, FLUSH);
    bench.ring = Ring::new(&bench.memory, 0x8000, 256);
    let (interrupt, line) = interrupt();
    let queues = activate(&[&bench.ring], true, &interrupt);
    bench.disk.activate(bench.memory.clone(), queues, FLUSH).unwrap();
    bench.header(4, 0);
    for _ in 0..20 {
        bench.ring.add(&[(HEADER, 16, false), (STATUS, 1, true)]).unwrap();
    }
    assert_eq!(bench.disk.process(0), Ok(Progress::More));
    assert_eq!(line.read().unwrap(), 1);
    assert_eq!(bench.disk.process(0), Ok(Progress::Done));
    assert_eq!(bench.ring.take_used().len(), 20);
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, Vec<u32>),
    Write(u64, Vec<u32>, u8),
    Flush,
    Discard(u64, u32),
    Zero(u64, u32, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let sector = || 0u64..SECTORS + 2;
    // Buffers of any cut that sum to whole sectors most of the time.
    let cuts = || {
        (1u32..6, proptest::collection::vec(1u32..900, 0..4), any::<bool>()).prop_map(|(sectors, cuts, whole)| {
            let mut left = sectors * 512 + u32::from(!whole);
            let mut lengths = Vec::new();
            for cut in cuts {
                if cut < left {
                    lengths.push(cut);
                    left -= cut;
                }
            }
            lengths.push(left);
            lengths
        })
    };
    prop_oneof![
        (sector(), cuts()).prop_map(|(sector, cuts)| Step::Read(sector, cuts)),
        (sector(), cuts(), any::<u8>()).prop_map(|(sector, cuts, byte)| Step::Write(sector, cuts, byte)),
        Just(Step::Flush),
        (sector(), 0u32..6).prop_map(|(sector, count)| Step::Discard(sector, count)),
        (sector(), 0u32..6, any::<bool>()).prop_map(|(sector, count, unmap)| Step::Zero(sector, count, unmap)),
    ]
}

fn place(cuts: &[u32], writable: bool) -> Vec<Buffer> {
    let mut address = DATA;
    let mut buffers = Vec::new();
    for &length in cuts {
        buffers.push((address, length, writable));
        address += u64::from(length);
    }
    buffers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The disk is an array of bytes; a request outside it fails and changes nothing.
    #[test]
    fn prop_disk_equals_an_array(steps in proptest::collection::vec(step(), 1..30), flush in any::<bool>()) {
        let mut bench = Bench::new(false, RANGES | if flush { FLUSH } else { 0 });
        let mut model = vec![0u8; usize::try_from(SECTORS).unwrap() * 512];
        bench.file.read_exact_at(&mut model, 0).unwrap();
        let range = |sector: u64, length: u64| {
            let end = sector * 512 + length;
            let fits = length.is_multiple_of(512) && end <= SECTORS * 512;
            fits.then_some((sector * 512) as usize..end as usize)
        };
        for step in steps {
            match step {
                Step::Read(sector, cuts) => {
                    let length: u32 = cuts.iter().sum();
                    let (status, _) = bench.request(0, sector, &place(&cuts, true));
                    let expected = range(sector, u64::from(length)).map(|range| model[range].to_vec());
                    prop_assert_eq!(status, if expected.is_some() { OK } else { IOERR });
                    if let Some(expected) = expected {
                        let mut bytes = vec![0; expected.len()];
                        bench.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
                        prop_assert_eq!(bytes, expected);
                    }
                }
                Step::Write(sector, cuts, byte) => {
                    let length: u32 = cuts.iter().sum();
                    let bytes: Vec<u8> = (0..length).map(|i| byte.wrapping_add(i as u8)).collect();
                    bench.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
                    let (status, _) = bench.request(1, sector, &place(&cuts, false));
                    let target = range(sector, u64::from(length));
                    prop_assert_eq!(status, if target.is_some() { OK } else { IOERR });
                    if let Some(target) = target {
                        model[target].copy_from_slice(&bytes);
                    }
                }
                Step::Flush => prop_assert_eq!(bench.request(4, 0, &[]).0, OK),
                Step::Discard(sector, count) | Step::Zero(sector, count, _) => {
                    let status = match step {
                        Step::Zero(_, _, unmap) => bench.ranges(13, &[(sector, count, u32::from(unmap))]),
                        _ => bench.ranges(11, &[(sector, count, 0)]),
                    };
                    let target = range(sector, u64::from(count) * 512);
                    prop_assert_eq!(status, if target.is_some() { OK } else { IOERR });
                    if let Some(target) = target {
                        if matches!(step, Step::Discard(..)) {
                            // What discarded sectors read as is the host's choice.
                            bench.file.read_exact_at(&mut model[target.clone()], target.start as u64).unwrap();
                        } else {
                            model[target].fill(0);
                        }
                    }
                }
            }
            let mut now = vec![0; model.len()];
            bench.file.read_exact_at(&mut now, 0).unwrap();
            prop_assert!(now == model);
        }
    }
}
