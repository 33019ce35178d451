//! Page tables and descriptor table for the first instructions in long mode. The kernel replaces both at once.

use crate::boot::BootError;
use crate::boot::layout::{GDT, MAPPED, PAGE_TABLES};
use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// Page directories: each maps 1 GiB.
const DIRECTORIES: u64 = MAPPED / (ENTRIES * LARGE_PAGE);
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Selectors 0x10 and 0x18, as the 64-bit boot protocol demands (`__BOOT_CS`, `__BOOT_DS`); the task register is a
/// busy TSS because hardware refuses to enter long mode without one.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const DESCRIPTORS: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Writes the GDT and page tables that map the first 4 GiB to themselves.
///
/// # Errors
/// [`BootError::Memory`] if guest memory ends below them.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let write = |address: u64, values: &[u64]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(address)).map_err(BootError::memory(address))
    };
    write(GDT, &DESCRIPTORS)?;
    // Constants far from overflow: pages behind PAGE_TABLES, addresses up to 4 GiB.
    let page = |index: u64| PAGE_TABLES.saturating_add(index.saturating_mul(PAGE));
    let pointers = page(1);
    write(PAGE_TABLES, &[pointers | PRESENT_WRITABLE])?;
    let directory = |index: u64| page(index.saturating_add(2));
    let to_directories: Vec<u64> = (0..DIRECTORIES).map(|index| directory(index) | PRESENT_WRITABLE).collect();
    write(pointers, &to_directories)?;
    // The directories are neighbours, so their entries are one array.
    let pages = (0..DIRECTORIES.saturating_mul(ENTRIES)).map(|index| index.saturating_mul(LARGE_PAGE));
    write(directory(0), &pages.map(|address| address | PRESENT_WRITABLE | LARGE).collect::<Vec<_>>())
}

/// Long mode at CPL 0 with the tables of [`write_tables`]; fields that do not matter stay as KVM's reset left them.
pub fn initial_sregs(sregs: &mut kvm_sregs) {
    let flat = |selector: u16, type_: u8, long: bool| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l: long.into(),
        db: (!long).into(),
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(CODE, 0xb, true);
    let data = flat(DATA, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0xffff, selector: TASK, type_: 0xb, present: 1, ..Default::default() };
    let limit = u16::try_from(size_of_val(&DESCRIPTORS)).unwrap_or_default().saturating_sub(1);
    sregs.gdt = kvm_dtable { base: GDT, limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
