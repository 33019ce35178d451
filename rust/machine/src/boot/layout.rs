//! Where things lie in the first mebibyte of guest memory, and which parts of it are RAM.
//!
//! ```text
//! 0x0000_0500  GDT
//! 0x0000_7000  boot_params, the "zero page"
//! 0x0000_8000  command line, 2 KiB with its NUL
//! 0x0000_8800  setup_data with the seed for the guest's random number generator
//! 0x0000_9000  page tables: PML4, PDPT, four page directories
//! 0x0009_FC00  EBDA, 1 KiB: MP table
//! 0x000A_0000  (what a PC has here: video memory, adapter ROMs)
//! 0x000E_0000  ACPI: RSDP, then the tables
//! 0x0010_0000  kernel, as far up as it wants; initrd at the end of low memory
//! ```
//! Linux keeps the first 64 KiB and everything from the EBDA to 1 MiB out of its allocator, so nothing of this is
//! overwritten before it was read.

use super::BootError;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Command line with its NUL.
pub const COMMAND_LINE: u64 = 0x8000;
/// Longest command line in bytes, without its NUL.
pub const COMMAND_LINE_MAX: usize = 2047;
/// `struct setup_data` with the RNG seed.
pub const RNG_SEED: u64 = 0x8800;
/// Top-level page table; the others follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// Extended BIOS data area: the last KiB of the conventional 640 KiB.
pub const EBDA: u64 = 0x9_FC00;
/// Size of the EBDA in bytes.
pub const EBDA_SIZE: u64 = 0x400;
/// Root of the ACPI tables.
pub const RSDP: u64 = 0xE_0000;
/// End of the room for ACPI tables (the BIOS's own 64 KiB follow).
pub const ACPI_END: u64 = 0xF_0000;
/// Kernels lie here or higher.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// End of what the boot page tables map.
pub const MAPPED: u64 = 1 << 32;

/// The ranges of RAM as (start, end), in ascending order, neighbours merged.
pub(crate) fn ram(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = memory
        .iter()
        .map(|region| (region.start_addr().raw_value(), region.last_addr().raw_value().saturating_add(1)))
        .collect();
    ranges.sort_unstable();
    ranges.dedup_by(|next, previous| {
        let touching = next.0 == previous.1;
        if touching {
            previous.1 = next.1;
        }
        touching
    });
    ranges
}

/// End of the RAM that begins at address 0.
///
/// # Errors
/// [`BootError::Field`] if there is none or it does not even reach past the first mebibyte.
pub(crate) fn low_ram_end(memory: &GuestMemoryMmap) -> Result<u64, BootError> {
    match ram(memory).first() {
        Some(&(0, end)) if end > HIGH_MEMORY => Ok(end),
        first => Err(BootError::field(
            "memory",
            "the RAM at address 0",
            first.filter(|range| range.0 == 0).map_or("absent".into(), |range| format!("{} bytes", range.1)),
            "it must reach past 1 MiB",
        )),
    }
}
