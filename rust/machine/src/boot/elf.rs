//! 64-bit little-endian x86-64 ELF executables, placed at the *physical* addresses of their program headers.
//!
//! Every number of the file is checked before it is used; the file is untrusted, and no size in it decides how much
//! is allocated.

use super::source::Source;
use super::{BootError, layout};
use vm_memory::GuestMemoryMmap;

const INPUT: &str = "kernel (ELF)";
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Most program headers. A Linux kernel has five.
const PROGRAM_HEADERS_MAX: u16 = 64;
const CLASS_64: u64 = 2;
const LITTLE_ENDIAN: u64 = 1;
const TYPE_EXECUTABLE: u64 = 2;
const MACHINE_X86_64: u64 = 62;
const LOADABLE: u32 = 1;

/// First bytes of every ELF file.
pub(crate) const MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Physical address of the entry point.
    pub(crate) entry: u64,
    /// End of the highest segment, physical.
    pub(crate) end: u64,
}

/// A PT_LOAD program header that occupies memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    index: u16,
    offset: u64,
    virtual_address: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Reads the kernel's segments into guest memory. The memory must be fresh: the part of a segment that is not in the
/// file (.bss) is taken to be zero already.
///
/// # Errors
/// [`BootError`] naming the field that is out of range, before anything was written; or that reading failed.
pub(crate) fn load(kernel: &dyn Source, memory: &GuestMemoryMmap) -> Result<Loaded, BootError> {
    let low_end = layout::low_ram_end(memory)?.min(layout::MAPPED);
    let (entry, segments) = parse(kernel)?;
    let mut placed = Vec::with_capacity(segments.len());
    for segment in &segments {
        placed.push((segment.address, check_placement(segment, low_end)?, segment.index));
    }
    check_overlap(&mut placed)?;
    let end = placed.iter().map(|range| range.1).max().unwrap_or_default();
    let entry = physical_entry(entry, &segments)?;
    for segment in &segments {
        if segment.file_size > 0 {
            kernel.copy(segment.offset, segment.file_size, memory, segment.address)?;
        }
    }
    Ok(Loaded { entry, end })
}

/// Entry point as the file gives it, and the segments, whose contents lie within the file.
fn parse(kernel: &dyn Source) -> Result<(u64, Vec<Segment>), BootError> {
    if kernel.length() < HEADER as u64 {
        return Err(truncated("the ELF header", HEADER as u64, kernel.length()));
    }
    let mut header = [0; HEADER];
    kernel.read(0, &mut header)?;
    if !header.starts_with(&MAGIC) {
        return Err(BootError::UnknownKernel { magic: header.iter().take(MAGIC.len()).copied().collect() });
    }
    let expect = |field: &str, value: u64, wanted: u64, meaning: &str| {
        let refuse = || BootError::field(INPUT, field, value, format!("it must be {wanted}: {meaning}"));
        (value == wanted).then_some(()).ok_or_else(refuse)
    };
    expect("EI_CLASS", u64::from(u8_at(&header, 4)), CLASS_64, "64-bit (32-bit kernels are not supported)")?;
    expect("EI_DATA", u64::from(u8_at(&header, 5)), LITTLE_ENDIAN, "little-endian")?;
    expect("e_type", u64::from(u16_at(&header, 16)), TYPE_EXECUTABLE, "linked to fixed addresses, as a kernel is")?;
    expect("e_machine", u64::from(u16_at(&header, 18)), MACHINE_X86_64, "x86-64")?;
    expect("e_phentsize", u64::from(u16_at(&header, 54)), PROGRAM_HEADER as u64, "the size of Elf64_Phdr")?;
    let count = u16_at(&header, 56);
    if count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(BootError::field(INPUT, "e_phnum", count, format!("it must be 1 to {PROGRAM_HEADERS_MAX}")));
    }
    let table_offset = u64_at(&header, 32);
    let mut table = vec![0; usize::from(count).saturating_mul(PROGRAM_HEADER)];
    let table_end = table_offset.checked_add(table.len() as u64);
    if table_end.is_none_or(|end| end > kernel.length()) {
        return Err(truncated("the program header table (e_phoff)", table_end.unwrap_or(u64::MAX), kernel.length()));
    }
    kernel.read(table_offset, &mut table)?;
    let mut segments = Vec::new();
    for (index, bytes) in (0..count).zip(table.chunks_exact(PROGRAM_HEADER)) {
        let segment = Segment {
            index,
            offset: u64_at(bytes, 8),
            virtual_address: u64_at(bytes, 16),
            address: u64_at(bytes, 24),
            file_size: u64_at(bytes, 32),
            memory_size: u64_at(bytes, 40),
        };
        if u32_at(bytes, 0) == LOADABLE && segment.memory_size > 0 {
            check_file_range(&segment, kernel.length())?;
            segments.push(segment);
        }
    }
    if segments.is_empty() {
        return Err(BootError::field(INPUT, "the number of PT_LOAD segments", 0, "there must be at least one"));
    }
    Ok((u64_at(&header, 24), segments))
}

fn check_file_range(segment: &Segment, length: u64) -> Result<(), BootError> {
    if segment.file_size > segment.memory_size {
        return Err(BootError::field(
            INPUT,
            format!("p_filesz of segment {}", segment.index),
            segment.file_size,
            format!("it must not exceed p_memsz, {}", segment.memory_size),
        ));
    }
    let end = segment.offset.checked_add(segment.file_size);
    if segment.file_size > 0 && end.is_none_or(|end| end > length) {
        return Err(truncated(
            &format!("segment {} (p_offset + p_filesz)", segment.index),
            end.unwrap_or(u64::MAX),
            length,
        ));
    }
    Ok(())
}

/// The end of the segment in guest memory.
fn check_placement(segment: &Segment, low_end: u64) -> Result<u64, BootError> {
    if segment.address < layout::HIGH_MEMORY {
        return Err(BootError::field(
            INPUT,
            format!("p_paddr of segment {}", segment.index),
            format!("{:#x}", segment.address),
            "it must be 1 MiB or higher: boot parameters and tables lie below; hint: is this a program rather than a kernel?",
        ));
    }
    segment.address.checked_add(segment.memory_size).filter(|end| *end <= low_end).ok_or_else(|| {
        BootError::field(
            INPUT,
            format!("p_memsz of segment {}", segment.index),
            format!("{} bytes at p_paddr {:#x}", segment.memory_size, segment.address),
            format!("it must end within the guest's low memory, at {low_end:#x}; hint: give the guest more memory"),
        )
    })
}

fn check_overlap(placed: &mut [(u64, u64, u16)]) -> Result<(), BootError> {
    placed.sort_unstable();
    for pair in placed.windows(2) {
        let &[(_, end, first), (start, _, second)] = pair else {
            continue;
        };
        if start < end {
            return Err(BootError::field(
                INPUT,
                format!("p_paddr of segment {second}"),
                format!("{start:#x}"),
                format!("it must not overlap segment {first}, which ends at {end:#x}"),
            ));
        }
    }
    Ok(())
}

/// Linux gives the physical address of its entry point; other kernels give the virtual one.
fn physical_entry(entry: u64, segments: &[Segment]) -> Result<u64, BootError> {
    let inside =
        |start: u64, segment: &Segment| entry.checked_sub(start).filter(|offset| *offset < segment.memory_size);
    let physical = segments.iter().find_map(|segment| inside(segment.address, segment).map(|_| entry));
    let through_virtual = || {
        segments.iter().find_map(|segment| {
            inside(segment.virtual_address, segment).and_then(|offset| segment.address.checked_add(offset))
        })
    };
    physical.or_else(through_virtual).ok_or_else(|| {
        BootError::field(INPUT, "e_entry", format!("{entry:#x}"), "it must lie within one of the PT_LOAD segments")
    })
}

fn truncated(what: &str, end: u64, length: u64) -> BootError {
    BootError::field(
        INPUT,
        format!("the end of {what}"),
        format!("{end:#x}"),
        format!("the file has only {length:#x} bytes; hint: it may have been truncated"),
    )
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u8_at(bytes: &[u8], offset: usize) -> u8 {
    u8::from_le_bytes(bytes_at(bytes, offset))
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, offset))
}
