//! From files to a guest that can execute its first instruction: kernel, initrd, command line, boot parameters, tables.
//!
//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): the vCPU starts in long mode at the kernel's
//! 64-bit entry point, RSI holds the address of `boot_params`, memory is mapped one to one.
//! * [`layout`]: where everything lies. `elf`, `bzimage`, `decompress`: the kernel. `initrd`: the initial RAM disk.
//! * [`crate::x86::boot_params`], [`crate::x86::tables`], [`crate::x86::mptable`], [`crate::x86::acpi`]: what else the
//!   kernel reads.

mod bzimage;
mod decompress;
mod elf;
mod error;
mod initrd;
pub mod layout;
mod source;

pub use bzimage::kernel_release;
pub use error::BootError;
pub(crate) use initrd::Initrd;

use crate::x86::{acpi, boot_params, mptable, tables};
use source::{FileSource, Source};
use std::fs::File;
use vm_memory::GuestMemoryMmap;

/// What to boot, and on what machine.
#[derive(Debug, Clone, Copy)]
pub struct BootPlan<'a> {
    /// ELF vmlinux or bzImage.
    pub kernel: &'a File,
    /// Initial RAM disk, in any format the kernel reads.
    pub initrd: Option<&'a File>,
    /// The whole command line: printable ASCII, at most [`layout::COMMAND_LINE_MAX`] bytes.
    pub command_line: &'a str,
    /// Number of vCPUs; their local APICs have the ids 0, 1, ….
    pub vcpus: u8,
    /// The virtio-mmio windows, for ACPI.
    pub devices: &'a [MmioWindow],
    /// Whether to give the guest ACPI tables beside the MP table.
    pub acpi: bool,
    /// Fresh random bytes for the guest's random number generator.
    pub rng_seed: [u8; 32],
}

/// A virtio-mmio device as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioWindow {
    /// Guest-physical address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
    /// IOAPIC pin.
    pub irq: u32,
}

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Address of `boot_params`, for RSI.
    pub rsi: u64,
    /// End of the kernel in guest memory.
    pub kernel_end: u64,
}

/// Puts everything the guest needs to boot into its memory, which must be fresh (all zero).
///
/// # Errors
/// [`BootError`], naming input, field, value and what would be right. Guest memory is then undefined.
pub fn load(memory: &GuestMemoryMmap, plan: &BootPlan<'_>) -> Result<Entry, BootError> {
    let kernel = FileSource::new("kernel", plan.kernel)?;
    let (header, loaded) = if bzimage::is_bzimage(&kernel) {
        let header = bzimage::setup_header(&kernel)?;
        let loaded = bzimage::load(&kernel, &header, memory)?;
        (boot_params::for_bzimage(header), loaded)
    } else {
        expect_elf(&kernel)?;
        (boot_params::for_vmlinux(), elf::load(&kernel, memory)?)
    };
    let initrd = match plan.initrd {
        Some(file) => {
            let highest = u64::from(header.initrd_addr_max);
            Some(initrd::load(&FileSource::new("initrd", file)?, memory, loaded.end, highest)?)
        }
        None => None,
    };
    tables::write_tables(memory)?;
    mptable::write(memory, plan.vcpus)?;
    let rsdp = if plan.acpi { Some(acpi::write(memory, plan.vcpus, plan.devices)?) } else { None };
    let inputs = boot_params::Inputs { header, initrd, command_line: plan.command_line, rsdp, rng_seed: plan.rng_seed };
    boot_params::write(memory, &inputs)?;
    Ok(Entry { rip: loaded.entry, rsi: layout::BOOT_PARAMS, kernel_end: loaded.end })
}

fn expect_elf(kernel: &FileSource<'_>) -> Result<(), BootError> {
    let mut magic = [0; 4];
    let length = magic.len().min(usize::try_from(kernel.length()).unwrap_or(usize::MAX));
    let magic = magic.get_mut(..length).unwrap_or_default();
    kernel.read(0, magic)?;
    if *magic == elf::MAGIC { Ok(()) } else { Err(BootError::UnknownKernel { magic: magic.to_vec() }) }
}

#[cfg(test)]
mod tests;
