//! The initial RAM disk: at the end of low memory, as high as the kernel accepts it.

use super::source::{FileSource, Source};
use super::{BootError, layout};
use vm_memory::GuestMemoryMmap;

const PAGE: u64 = 4096;

/// Where the initrd lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Initrd {
    /// Guest-physical address, a multiple of 4096.
    pub(crate) address: u32,
    /// Size in bytes.
    pub(crate) size: u32,
}

/// Reads the file into guest memory, between the end of the kernel and `highest`, the last address it may occupy.
///
/// # Errors
/// [`BootError`] if it does not fit there, or cannot be read.
pub(crate) fn load(
    initrd: &FileSource<'_>,
    memory: &GuestMemoryMmap,
    kernel_end: u64,
    highest: u64,
) -> Result<Initrd, BootError> {
    let end = layout::low_ram_end(memory)?.min(highest.saturating_add(1));
    let too_large = || {
        let room = end.saturating_sub(kernel_end);
        BootError::field(
            "initrd",
            "the file's size",
            format!("{} bytes", initrd.length()),
            format!("{room} bytes are left behind the kernel; hint: give the guest more memory, or a smaller initrd"),
        )
    };
    let address = end
        .checked_sub(initrd.length())
        .map(|start| start & !PAGE.wrapping_sub(1))
        .filter(|start| *start >= kernel_end)
        .ok_or_else(too_large)?;
    let placed = u32::try_from(address).ok().zip(u32::try_from(initrd.length()).ok());
    let (address, size) = placed.ok_or_else(too_large)?;
    initrd.copy(0, initrd.length(), memory, address.into())?;
    Ok(Initrd { address, size })
}
