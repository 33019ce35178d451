//! The bzImage container (Documentation/arch/x86/boot.rst): setup header and compressed vmlinux.
//!
//! The guest's own decompressor is not used: it would run for seconds where kernel code is emulated, and it may move
//! the kernel (KASLR). The VMM decompresses the payload and loads the ELF file in it where it was linked to run.

use super::source::{FileSource, Source};
use super::{BootError, decompress, elf};
use linux_loader::bootparam::setup_header;
use std::fs::File;
use vm_memory::{ByteValued, GuestMemoryMmap};

const INPUT: &str = "kernel (bzImage)";
/// Where `struct setup_header` begins in the file, and in `struct boot_params`.
const HEADER: u64 = 0x1f1;
/// End of the header's first two bytes of code, from which its length is counted.
const JUMP_END: u64 = 0x202;
/// Holds how much header follows `JUMP_END`.
const JUMP_LENGTH: usize = 0x10;
const MAGIC: [u8; 4] = *b"HdrS";
/// Oldest boot protocol that says where the payload is.
const VERSION_MIN: u16 = 0x0208;
const SECTOR: u64 = 512;
/// Setup sectors if the field says 0.
const DEFAULT_SETUP_SECTORS: u64 = 4;
const RELEASE_MAX: usize = 256;

/// Whether the file has the magic number of a bzImage.
pub(crate) fn is_bzimage(kernel: &FileSource<'_>) -> bool {
    let mut magic = [0; 4];
    // A file too short for it is no bzImage; one that cannot be read fails again, with a message, on the ELF path.
    kernel.read_exact(JUMP_END, &mut magic).is_ok() && magic == MAGIC
}

/// The kernel's setup header, with the fields behind its end zero.
///
/// # Errors
/// [`BootError`] if the file is too short for it or of a boot protocol older than 2.08.
pub(crate) fn setup_header(kernel: &FileSource<'_>) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let mut bytes = [0; size_of::<setup_header>()];
    kernel.read(HEADER, &mut bytes)?;
    let jump = bytes.get(JUMP_LENGTH).copied().unwrap_or_default();
    let length = u64::from(jump).saturating_add(JUMP_END).saturating_sub(HEADER);
    for (to, from) in header.as_mut_slice().iter_mut().zip(bytes).take(usize::try_from(length).unwrap_or(usize::MAX)) {
        *to = from;
    }
    let version = header.version;
    if version < VERSION_MIN {
        return Err(BootError::field(
            INPUT,
            "the boot protocol version",
            format!("{}.{:02}", version >> 8, version & 0xff),
            "it must be 2.08 or later (Linux 2.6.26)",
        ));
    }
    Ok(header)
}

/// Decompresses the payload and loads the ELF file in it.
///
/// # Errors
/// [`BootError`] naming the header field that is out of range, the payload's damage, or the ELF field.
pub(crate) fn load(
    kernel: &FileSource<'_>,
    header: &setup_header,
    memory: &GuestMemoryMmap,
) -> Result<elf::Loaded, BootError> {
    let (offset, length) = payload(kernel, header)?;
    let limit = super::layout::low_ram_end(memory)?;
    let vmlinux = decompress::payload(kernel, offset, length, limit)?;
    elf::load(&super::source::BytesSource(&vmlinux), memory)
}

/// Offset in the file, and length, of the compressed kernel.
fn payload(kernel: &FileSource<'_>, header: &setup_header) -> Result<(u64, u64), BootError> {
    let (offset, length) = (u64::from(header.payload_offset), u64::from(header.payload_length));
    let start = setup_end(header).saturating_add(offset);
    if start.saturating_add(length) > kernel.length() {
        return Err(BootError::field(
            INPUT,
            "payload_offset + payload_length",
            format!("{start:#x} + {length:#x}"),
            format!("the file has only {:#x} bytes; hint: it may have been truncated", kernel.length()),
        ));
    }
    Ok((start, length))
}

/// Where the real-mode part ends and the protected-mode part begins.
fn setup_end(header: &setup_header) -> u64 {
    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => u64::from(sectors),
    };
    sectors.saturating_add(1).saturating_mul(SECTOR)
}

/// The release a bzImage was built as (`uname -r`), which names its folder in `/lib/modules`.
///
/// `None` if the file is no bzImage, carries no version, or its version is no plain file name.
pub fn kernel_release(file: &File) -> Option<String> {
    let kernel = FileSource::new("kernel", file).ok()?;
    let header = is_bzimage(&kernel).then(|| setup_header(&kernel).ok()).flatten()?;
    let offset = u64::from(header.kernel_version).checked_add(0x200).filter(|_| header.kernel_version != 0)?;
    let room = setup_end(&header).min(kernel.length()).checked_sub(offset)?;
    let mut text = vec![0; RELEASE_MAX.min(usize::try_from(room).ok()?)];
    kernel.read_exact(offset, &mut text).ok()?;
    let release = text.split(|byte| *byte == 0 || *byte == b' ').next()?;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-._~".contains(byte);
    let is_name = release.first().is_some_and(u8::is_ascii_alphanumeric) && release.iter().all(plain);
    is_name.then(|| String::from_utf8_lossy(release).into_owned())
}
