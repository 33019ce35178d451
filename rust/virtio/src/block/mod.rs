//! Block device (VIRTIO 1.2, 5.2) over a raw file: its format is stated by the user, never guessed from its bytes.

mod disk;
mod request;
#[cfg(test)]
mod tests;

pub use disk::BlockError;

use crate::device::{Device, Progress};
use crate::queue::{ActiveQueue, Malformed};
use disk::Disk;
use std::fs::File;
use std::io;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemoryMmap;

/// Bytes in a sector, the unit of every address and length on the wire.
pub const SECTOR: u64 = 512;
/// Most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Most sectors in one of them: 16 MiB, so that a host file system that can only write zeros is done soon.
pub const MAX_RANGE_SECTORS: u32 = 32 * 1024;

const QUEUE_SIZE: u16 = 256;
/// Data buffers in one request: with header and status it fits half the queue.
const SEGMENTS: u32 = 126;
/// Requests handled for one kick before the transport's commands are looked at.
const BUDGET: usize = 16;

struct Active {
    memory: GuestMemoryMmap,
    queue: ActiveQueue,
    features: u64,
}

/// A disk.
pub struct Block {
    disk: Disk,
    active: Option<Active>,
}

impl Block {
    /// A disk over `file`: a regular file or a block device, a multiple of 512 bytes long.
    ///
    /// # Errors
    /// [`BlockError`] if it is something else, or empty.
    pub fn new(file: File, read_only: bool) -> Result<Block, BlockError> {
        let disk = Disk::new(file, read_only)?;
        Ok(Block { disk, active: None })
    }
}

impl Device for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_limits(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common = (1 << VIRTIO_BLK_F_SEG_MAX) | (1 << VIRTIO_BLK_F_BLK_SIZE) | (1 << VIRTIO_BLK_F_FLUSH);
        let more = if self.disk.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES)
        };
        common | more
    }

    /// `virtio_blk_config` (5.2.4) up to `write_zeroes_may_unmap`.
    fn config_space(&self) -> Vec<u8> {
        let sector = u32::try_from(SECTOR).unwrap_or(u32::MAX);
        let mut space = Vec::with_capacity(60);
        space.extend(self.disk.sectors().to_le_bytes());
        space.extend(0u32.to_le_bytes()); // size_max
        space.extend(SEGMENTS.to_le_bytes()); // seg_max
        space.extend([0; 4]); // geometry
        space.extend(sector.to_le_bytes()); // blk_size
        space.extend([0; 8]); // topology
        space.extend([1, 0]); // writeback
        space.extend(1u16.to_le_bytes()); // num_queues
        space.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        space.extend(MAX_RANGES.to_le_bytes()); // max_discard_seg
        space.extend(1u32.to_le_bytes()); // discard_sector_alignment
        space.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        space.extend(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        space.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
        space
    }

    fn activate(&mut self, memory: GuestMemoryMmap, queues: Vec<ActiveQueue>, features: u64) -> io::Result<()> {
        let [queue] = <[ActiveQueue; 1]>::try_from(queues).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.active = Some(Active { memory, queue, features });
        Ok(())
    }

    fn process(&mut self, _: usize) -> Result<Progress, Malformed> {
        let Some(Active { memory, queue, features }) = &mut self.active else {
            return Ok(Progress::Done);
        };
        queue.drain(memory, BUDGET, |queue, chain| {
            let written = request::execute(&self.disk, *features, chain.readable, chain.writable)?;
            queue.complete(memory, chain.token, written)
        })
    }

    fn reset(&mut self) {
        self.active = None;
    }
}
