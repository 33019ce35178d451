//! Kernels made up by the tests, and what loading them must leave in guest memory.
#![expect(clippy::arithmetic_side_effects, reason = "test data is small")]

mod bzimage;
mod elf;
mod low_memory;

use super::{BootError, BootPlan, Entry, MmioWindow, layout, load};
use crate::memory::ram;
use proptest::prelude::*;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
/// Memory of the guests in these tests.
const MEMORY: u64 = 4 * MIB;

/// A PT_LOAD segment to be.
#[derive(Debug, Clone)]
struct TestSegment {
    address: u64,
    contents: Vec<u8>,
    memory_size: u64,
}

/// A kernel to be; the entry point lies in its first segment.
#[derive(Debug, Clone)]
struct TestKernel {
    segments: Vec<TestSegment>,
    entry_offset: u64,
    /// Bytes between the parts of the file.
    padding: usize,
}

/// Offsets of ELF fields, for tests that break them.
const E_ENTRY: usize = 24;
const E_PHOFF: usize = 32;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const FIRST_HEADER: usize = 64;
const P_OFFSET: usize = FIRST_HEADER + 8;
const P_VADDR: usize = FIRST_HEADER + 16;
const P_PADDR: usize = FIRST_HEADER + 24;
const P_FILESZ: usize = FIRST_HEADER + 32;
const P_MEMSZ: usize = FIRST_HEADER + 40;
/// What the tests add to physical addresses to get virtual ones, as Linux does.
const VIRTUAL: u64 = 0xffff_ffff_8000_0000;

impl TestKernel {
    fn small() -> Self {
        let segment =
            |address, contents: &[u8], memory_size| TestSegment { address, contents: contents.into(), memory_size };
        Self {
            segments: vec![segment(MIB, b"first segment", 0x100), segment(MIB + 0x1000, b"second", 0x2000)],
            entry_offset: 3,
            padding: 5,
        }
    }

    fn entry(&self) -> u64 {
        self.segments[0].address + self.entry_offset
    }

    fn end(&self) -> u64 {
        self.segments.iter().map(|segment| segment.address + segment.memory_size).max().unwrap()
    }

    fn to_elf(&self) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend(self.entry().to_le_bytes());
        file.extend((FIRST_HEADER as u64).to_le_bytes());
        file.extend([0; 12]);
        for half in [64u16, 56, self.segments.len() as u16, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = file.len() + self.segments.len() * 56;
        for segment in &self.segments {
            offset += self.padding;
            file.extend(1u32.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            let size = segment.contents.len() as u64;
            let virtual_address = segment.address + VIRTUAL;
            for value in [offset as u64, virtual_address, segment.address, size, segment.memory_size, 0] {
                file.extend(value.to_le_bytes());
            }
            offset += segment.contents.len();
        }
        for segment in &self.segments {
            file.resize(file.len() + self.padding, 0xAA);
            file.extend(&segment.contents);
        }
        file
    }

    /// All memory from 1 MiB on, after loading.
    fn model(&self) -> Vec<u8> {
        let mut memory = vec![0; (MEMORY - MIB) as usize];
        for segment in &self.segments {
            let start = (segment.address - MIB) as usize;
            memory[start..start + segment.contents.len()].copy_from_slice(&segment.contents);
        }
        memory
    }
}

/// Up to five segments that do not overlap, in any order in the file.
fn kernels() -> impl Strategy<Value = TestKernel> {
    let segment = (0u64..0x3000, noise(0..0x1800), 1u64..0x2000);
    (prop::collection::vec(segment, 1..6), any::<prop::sample::Index>(), any::<bool>(), 0usize..40).prop_map(
        |(parts, entry, reverse, padding)| {
            let mut next = MIB;
            let mut segments = Vec::new();
            for (gap, contents, more) in parts {
                let memory_size = contents.len() as u64 + more;
                segments.push(TestSegment { address: next + gap, contents, memory_size });
                next += gap + memory_size;
            }
            if reverse {
                segments.reverse();
            }
            let entry_offset = entry.index(segments[0].memory_size as usize) as u64;
            TestKernel { segments, entry_offset, padding }
        },
    )
}

/// Bytes without a pattern. One random number makes them all, because generating each takes too long.
fn noise(length: Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    (length, any::<u64>()).prop_map(|(length, seed)| {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    })
}

fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

fn plan(kernel: &File) -> BootPlan<'_> {
    BootPlan { kernel, initrd: None, command_line: "", vcpus: 1, devices: &[], acpi: false, rng_seed: [0; 32] }
}

/// Loads a kernel file into fresh memory.
fn boot(kernel: &[u8]) -> Result<(Entry, GuestMemoryMmap), BootError> {
    let memory = ram(MEMORY).unwrap();
    load(&memory, &plan(&file(kernel))).map(|entry| (entry, memory))
}

fn read(memory: &GuestMemoryMmap, address: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn high_memory(memory: &GuestMemoryMmap) -> Vec<u8> {
    read(memory, MIB, MEMORY - MIB)
}

/// Input and field of the error, in one string.
fn refusal(result: Result<(Entry, GuestMemoryMmap), BootError>) -> String {
    match result {
        Err(BootError::Field { input, field, .. }) => format!("{input}: {field}"),
        other => panic!("not refused because of a field: {:?}", other.map(|(entry, _)| entry)),
    }
}

#[test]
fn load_of_a_file_that_is_no_kernel_names_its_first_bytes() {
    for contents in [&b"#!/bin/sh\n"[..], b"x", &[0; 4096]] {
        let error = boot(contents).map(|(entry, _)| entry).unwrap_err();
        assert!(matches!(&error, BootError::UnknownKernel { magic } if contents.starts_with(magic)), "{error}");
    }
}

#[test]
fn load_of_an_empty_file_or_a_directory_is_refused() {
    assert_eq!(refusal(boot(b"")), "kernel: the file's size");
    let directory = File::open("/").unwrap();
    let memory = ram(MEMORY).unwrap();
    let result = load(&memory, &plan(&directory)).map(|entry| (entry, memory.clone()));
    assert_eq!(refusal(result), "kernel: the file's type");
}

#[test]
fn load_needs_more_than_the_first_mebibyte() {
    let memory = ram(MIB).unwrap();
    let result = load(&memory, &plan(&file(&TestKernel::small().to_elf()))).map(|entry| (entry, memory.clone()));
    assert_eq!(refusal(result), "memory: the RAM at address 0");
}
