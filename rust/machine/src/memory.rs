//! Guest RAM: private anonymous memory of the host, handed out to the guest page by page as it is touched.

use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Where the hole for devices, IOAPIC and local APICs begins. RAM beyond this size continues at 4 GiB.
pub const HOLE_START: u64 = 0xC000_0000;
/// Where RAM goes on behind the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not usable on this host at all.
    #[error("guest memory of {size} bytes at {address:#x}: {reason}")]
    Range {
        /// Guest address of the region.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host refused the mapping.
    #[error(
        "the host refused {size} bytes of guest memory: {reason}; hint: ask for less, or see ulimit -v and the cgroup's memory limit"
    )]
    Refused {
        /// Size in bytes.
        size: u64,
        /// What the host said.
        reason: String,
    },
}

/// RAM of `size` bytes from guest address 0, with the hole below 4 GiB.
///
/// # Errors
/// [`MemoryError`] if the size is not a positive multiple of 4096 or the host refuses.
pub fn ram(size: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let low = size.min(HOLE_START);
    let mut regions = vec![region(0, low)?];
    let high = size.saturating_sub(low);
    if high > 0 {
        regions.push(region(HOLE_END, high)?);
    }
    collect(regions)
}

/// One region of fresh zeroed memory at guest address `address`.
///
/// The pages are not reserved: the host gives them when the guest touches them, 2 MiB at a time where it can, which
/// on software KVM halves the time a kernel needs to boot. A child of `fork` does not get them.
///
/// # Errors
/// [`MemoryError`] if address or size are not multiples of 4096, wrap around, or the host refuses.
pub fn region(address: u64, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let refuse = |reason| MemoryError::Range { address, size, reason };
    if size == 0 || !size.is_multiple_of(4096) || !address.is_multiple_of(4096) {
        return Err(refuse("address and size must be multiples of 4096, size not 0"));
    }
    if address.checked_add(size).is_none() {
        return Err(refuse("it wraps around the end of the address space"));
    }
    let length = usize::try_from(size).map_err(|_| refuse("larger than the host's address space"))?;
    let refused = |reason: String| MemoryError::Refused { size, reason };
    let mapping = MmapRegion::build(
        None,
        length,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    )
    .map_err(|error| refused(error.to_string()))?;
    // A host kernel without huge pages refuses this, and nothing is lost but time.
    let _ = advise(&mapping, libc::MADV_HUGEPAGE);
    advise(&mapping, libc::MADV_DONTFORK).map_err(|error| refused(error.to_string()))?;
    GuestRegionMmap::new(mapping, GuestAddress(address))
        .ok_or_else(|| refuse("it wraps around the end of the address space"))
}

/// Puts regions together; they may come in any order.
///
/// # Errors
/// [`MemoryError::Range`] if two of them overlap or there are none.
pub fn collect(regions: Vec<GuestRegionMmap>) -> Result<GuestMemoryMmap, MemoryError> {
    let none = MemoryError::Range { address: 0, size: 0, reason: "there are no regions" };
    let together = |memory: Option<_>, region| insert(memory.as_ref(), &region).map(Some);
    regions.into_iter().try_fold(None, together)?.ok_or(none)
}

/// `memory` and `region` together; they share the host's mapping with the originals.
///
/// # Errors
/// [`MemoryError::Range`] if they overlap.
pub fn insert(memory: Option<&GuestMemoryMmap>, region: &GuestRegionMmap) -> Result<GuestMemoryMmap, MemoryError> {
    let refuse = |reason| MemoryError::Range { address: region.start_addr().0, size: region.len(), reason };
    let shared = GuestRegionMmap::with_arc(region.get_mmap(), region.start_addr())
        .map(Arc::new)
        .ok_or_else(|| refuse("it wraps around the end of the address space"))?;
    match memory {
        Some(memory) => memory.insert_region(shared),
        None => GuestMemoryMmap::from_arc_regions(vec![shared]),
    }
    .map_err(|_| refuse("it overlaps other memory of the guest"))
}

/// Total size in bytes.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().fold(0, |sum, region| region.len().saturating_add(sum))
}

fn advise(mapping: &MmapRegion, advice: libc::c_int) -> std::io::Result<()> {
    // SAFETY: the range is exactly the mapping that was just made, and the advice changes no contents.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn layout(size: u64) -> Vec<(u64, u64)> {
        ram(size).unwrap().iter().map(|region| (region.start_addr().0, region.len())).collect()
    }

    #[test]
    fn ram_over_three_gib_leaves_the_hole() {
        assert_eq!(layout(64 << 20), [(0, 64 << 20)]);
        assert_eq!(layout(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(layout(HOLE_START + 4096), [(0, HOLE_START), (HOLE_END, 4096)]);
        assert_eq!(size(&ram(8 << 30).unwrap()), 8 << 30);
    }

    #[test]
    fn ram_is_zero_and_writable_to_its_last_byte() {
        let memory = ram(1 << 20).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress((1 << 20) - 8)).unwrap(), 0);
        memory.write_obj(7u8, GuestAddress((1 << 20) - 1)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(1 << 20)).is_err());
    }

    #[test]
    fn region_with_bad_range_is_refused() {
        for (address, size) in [(0, 0), (0, 1), (1, 4096), (0, 4097), (u64::MAX - 4095, 4096)] {
            assert!(matches!(region(address, size), Err(MemoryError::Range { .. })), "{address:#x} {size}");
        }
        let twice = vec![region(0, 8192).unwrap(), region(4096, 4096).unwrap()];
        assert!(matches!(collect(twice), Err(MemoryError::Range { .. })));
    }
}
