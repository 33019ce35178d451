//! `struct boot_params`, the page that tells Linux what machine it is on (Documentation/arch/x86/zero-page.rst), and
//! what it points to: command line, RNG seed.

use crate::boot::layout::{self, BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_MAX, EBDA, HIGH_MEMORY, RNG_SEED};
use crate::boot::{BootError, Initrd};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BOOT_FLAG: u16 = 0xAA55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The boot protocol the fields for a vmlinux follow: 2.15, as the kernels that this loader was written for.
const VERSION: u16 = 0x020f;
/// "Undefined" loader, as the protocol asks of those without a number of their own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel was loaded at 1 MiB or higher.
const LOADED_HIGH: u8 = 1;
/// Last address Linux on x86-64 accepts for an initrd.
const INITRD_ADDRESS_MAX: u32 = 0x7fff_ffff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const SETUP_RNG_SEED: u32 = 9;

/// What goes into the page.
pub(crate) struct Inputs<'a> {
    pub(crate) header: setup_header,
    pub(crate) initrd: Option<Initrd>,
    pub(crate) command_line: &'a str,
    pub(crate) rsdp: Option<u64>,
    pub(crate) rng_seed: [u8; 32],
}

/// The setup header for a kernel that came without one.
pub(crate) fn for_vmlinux() -> setup_header {
    for_bzimage(setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        initrd_addr_max: INITRD_ADDRESS_MAX,
        ..Default::default()
    })
}

/// The kernel's own setup header, with the fields that a loader fills in.
pub(crate) fn for_bzimage(header: setup_header) -> setup_header {
    setup_header { type_of_loader: LOADER_UNDEFINED, loadflags: header.loadflags | LOADED_HIGH, ..header }
}

/// Writes command line, RNG seed and the page itself.
///
/// # Errors
/// [`BootError`] if the command line is too long or not printable ASCII.
pub(crate) fn write(memory: &GuestMemoryMmap, inputs: &Inputs<'_>) -> Result<(), BootError> {
    let mut page = boot_params { hdr: inputs.header, ..Default::default() };
    page.hdr.cmd_line_ptr = write_command_line(memory, inputs.command_line)?;
    page.hdr.cmdline_size = u32::try_from(COMMAND_LINE_MAX).unwrap_or_default();
    page.hdr.setup_data = write_rng_seed(memory, inputs.rng_seed)?;
    if let Some(initrd) = inputs.initrd {
        page.hdr.ramdisk_image = initrd.address;
        page.hdr.ramdisk_size = initrd.size;
    }
    page.acpi_rsdp_addr = inputs.rsdp.unwrap_or_default();
    let map = e820(memory);
    let mut table = page.e820_table;
    let room = table.len();
    if map.len() > room {
        let allowed = format!("boot_params has room for {room}");
        return Err(BootError::field("memory", "the number of e820 entries", map.len(), allowed));
    }
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    page.e820_table = table;
    page.e820_entries = u8::try_from(map.len()).unwrap_or_default();
    memory.write_obj(page, GuestAddress(BOOT_PARAMS)).map_err(BootError::memory(BOOT_PARAMS))
}

/// The memory map: all RAM, of which the part from the EBDA to 1 MiB is reserved. Addresses without RAM (the hole
/// below 4 GiB) are not in it, so that Linux finds room for devices there.
fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let kinds = [(0, EBDA, E820_RAM), (EBDA, HIGH_MEMORY, E820_RESERVED), (HIGH_MEMORY, u64::MAX, E820_RAM)];
    let ram = layout::ram(memory);
    let entries = ram.iter().flat_map(|(start, end)| {
        kinds.iter().filter_map(move |(from, to, kind)| {
            let addr = *start.max(from);
            let size = (*end.min(to)).checked_sub(addr).filter(|size| *size > 0)?;
            Some(boot_e820_entry { addr, size, r#type: *kind })
        })
    });
    entries.collect()
}

fn write_command_line(memory: &GuestMemoryMmap, command_line: &str) -> Result<u32, BootError> {
    if command_line.len() > COMMAND_LINE_MAX {
        return Err(BootError::field(
            "cmdline",
            "its length",
            format!("{} bytes", command_line.len()),
            format!("at most {COMMAND_LINE_MAX} bytes, with the words that the machine itself adds"),
        ));
    }
    if let Some(bad) = command_line.chars().find(|c| !(' '..='~').contains(c)) {
        return Err(BootError::field("cmdline", "a character", format!("{bad:?}"), "printable ASCII only"));
    }
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(COMMAND_LINE)).map_err(BootError::memory(COMMAND_LINE))?;
    Ok(u32::try_from(COMMAND_LINE).unwrap_or_default())
}

/// A `struct setup_data` (next, type, length, data), last of its list.
fn write_rng_seed(memory: &GuestMemoryMmap, seed: [u8; 32]) -> Result<u64, BootError> {
    let mut bytes = 0u64.to_le_bytes().to_vec();
    bytes.extend(SETUP_RNG_SEED.to_le_bytes());
    bytes.extend((size_of_val(&seed) as u32).to_le_bytes());
    bytes.extend(seed);
    memory.write_slice(&bytes, GuestAddress(RNG_SEED)).map_err(BootError::memory(RNG_SEED))?;
    Ok(RNG_SEED)
}
