//! The gate: a descriptor chain becomes host memory, or is malformed.

use super::{Malformed, Reader, Token, Writer, setup::Range};
use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// A whole valid descriptor chain.
#[derive(Debug)]
pub struct Chain<'m> {
    /// What the guest sent.
    pub readable: Reader<'m>,
    /// Where the answer goes.
    pub writable: Writer<'m>,
    /// Gives the chain back, once, through [`super::ActiveQueue::complete`].
    pub token: Token,
    /// Number of descriptors.
    pub descriptors: u16,
}

/// Reads every descriptor once, so the guest cannot change it between check and use.
pub(super) fn walk<'m>(
    memory: &'m GuestMemoryMmap,
    table: GuestAddress,
    size: u16,
    rings: &[Range],
    token: Token,
) -> Result<Chain<'m>, Malformed> {
    let head = token.head();
    let mut readable: Vec<VolatileSlice<'m>> = Vec::new();
    let mut writable: Vec<VolatileSlice<'m>> = Vec::new();
    let mut total = 0u32;
    let mut index = head;
    let mut descriptors = 0u16;
    loop {
        if descriptors >= size {
            return Err(Malformed::Loop { head, size });
        }
        descriptors = descriptors.saturating_add(1);
        let descriptor = read_descriptor(memory, table, size, index)?;
        if u32::from(descriptor.flags()) & VRING_DESC_F_INDIRECT != 0 {
            return Err(Malformed::Indirect { index });
        }
        let (address, length) = (descriptor.addr(), descriptor.len());
        if length == 0 {
            return Err(Malformed::Empty { index });
        }
        total = total.checked_add(length).ok_or(Malformed::TooLarge { head })?;
        let outside = Malformed::OutsideMemory { index, address: address.raw_value(), length };
        let Some(end) = address.checked_add(u64::from(length)) else {
            return Err(outside);
        };
        let overlaps = |&(start, stop): &Range| address.raw_value() < stop && start < end.raw_value();
        if rings.iter().any(overlaps) {
            return Err(Malformed::InsideRing { index, address: address.raw_value(), length });
        }
        let (into, permission) = if descriptor.is_write_only() {
            (&mut writable, Permissions::Write)
        } else if writable.is_empty() {
            (&mut readable, Permissions::Read)
        } else {
            return Err(Malformed::Order { index });
        };
        let count = usize::try_from(length).map_err(|_| outside.clone())?;
        let slices = memory.get_slices(address, count, permission).map_err(|_| outside.clone())?;
        for slice in slices {
            into.push(slice.map_err(|_| outside.clone())?);
        }
        if !descriptor.has_next() {
            return Ok(Chain { readable: Reader::new(readable), writable: Writer::new(writable), token, descriptors });
        }
        index = descriptor.next();
    }
}

fn read_descriptor(
    memory: &GuestMemoryMmap,
    table: GuestAddress,
    size: u16,
    index: u16,
) -> Result<Descriptor, Malformed> {
    if index >= size {
        return Err(Malformed::Index { index, size });
    }
    let address = table.checked_add(u64::from(index).saturating_mul(16)).ok_or(Malformed::Index { index, size })?;
    memory.read_obj::<RawDescriptor>(address).map(Descriptor::from).map_err(|error| Malformed::Ring(error.to_string()))
}
