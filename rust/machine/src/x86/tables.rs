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

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "test data is small")]
mod tests {
    use super::*;
    use crate::memory::ram;
    use proptest::prelude::*;

    fn entry(memory: &GuestMemoryMmap, table: u64, index: u64) -> u64 {
        memory.read_obj(GuestAddress(table + 8 * index)).unwrap()
    }

    /// A page walk as the processor does it, down to a 2 MiB page.
    fn translate(memory: &GuestMemoryMmap, root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for shift in [39, 30, 21] {
            let entry = entry(memory, table, address >> shift & 511);
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        Some(table | (address & (LARGE_PAGE - 1)))
    }

    fn started() -> (GuestMemoryMmap, kvm_sregs) {
        let memory = ram(2 << 20).unwrap();
        write_tables(&memory).unwrap();
        let mut sregs = kvm_sregs::default();
        initial_sregs(&mut sregs);
        (memory, sregs)
    }

    proptest! {
        #[test]
        fn page_tables_map_the_first_four_gib_to_themselves(address in prop_oneof![0..MAPPED, MAPPED..1 << 47, any::<u64>()]) {
            let (memory, sregs) = started();
            let expected = (address & 0xffff_ffff_ffff < MAPPED).then_some(address & 0xffff_ffff_ffff);
            prop_assert_eq!(translate(&memory, sregs.cr3, address), expected);
        }
    }

    /// What is loaded in the segment registers is what reloading them from the GDT gives.
    #[test]
    fn segment_registers_agree_with_the_descriptor_table() {
        let (memory, sregs) = started();
        for segment in [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr] {
            assert!(segment.selector + 7 <= sregs.gdt.limit);
            let descriptor = entry(&memory, sregs.gdt.base, u64::from(segment.selector >> 3));
            let flags = (u64::from(segment.g) << 3) | (u64::from(segment.db) << 2) | (u64::from(segment.l) << 1);
            let access = (u64::from(segment.present) << 7) | (u64::from(segment.s) << 4) | u64::from(segment.type_);
            assert_eq!(descriptor >> 40 & 0xff, access, "{segment:?}");
            assert_eq!(descriptor & 0xffff, u64::from(segment.limit & 0xffff));
            if segment.s == 1 {
                assert_eq!(descriptor >> 52 & 0xe, flags, "{segment:?}");
            }
        }
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.ds.selector), (0x10, 1, 0x18));
    }

    #[test]
    fn write_tables_beyond_the_end_of_memory_is_an_error() {
        let memory = ram(0x8000).unwrap();
        assert!(matches!(write_tables(&memory), Err(BootError::Memory { address: PAGE_TABLES, .. })));
    }
}
