//! The host file behind a disk: every access is checked against its size first.

use super::SECTOR;
use crate::queue::{Reader, Writer};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A directory, a pipe, a terminal...
    #[error("a disk must be a regular file or a block device; hint: give a raw image")]
    Kind,
    /// Its length.
    #[error("disk of {length} bytes: must be a multiple of 512 and not 0; hint: pad it with truncate --size=%512 FILE")]
    Length {
        /// Length of the file.
        length: u64,
    },
    /// The host refused to tell.
    #[error("disk file: {0}")]
    Io(#[from] io::Error),
}

/// The guest asked for something outside the disk, or the host failed. The guest learns no more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed;

impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Failed {
        Failed
    }
}

#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    length: u64,
    read_only: bool,
}

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

impl Disk {
    pub fn new(mut file: File, read_only: bool) -> Result<Disk, BlockError> {
        let metadata = file.metadata()?;
        let length = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0))?
        } else {
            return Err(BlockError::Kind);
        };
        if length == 0 || length.checked_rem(SECTOR) != Some(0) || i64::try_from(length).is_err() {
            return Err(BlockError::Length { length });
        }
        Ok(Disk { file, length, read_only })
    }

    pub fn sectors(&self) -> u64 {
        self.length.checked_div(SECTOR).unwrap_or(0)
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The byte offset of `sector`, if `length` bytes from there are whole sectors within the disk.
    fn locate(&self, sector: u64, length: u64) -> Result<u64, Failed> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failed)?;
        let end = offset.checked_add(length).ok_or(Failed)?;
        if end > self.length || length.checked_rem(SECTOR) != Some(0) {
            return Err(Failed);
        }
        Ok(offset)
    }

    /// Fills `data`. A file that was truncated underneath is an error.
    pub fn read(&self, sector: u64, data: &mut Writer<'_>) -> Result<(), Failed> {
        let count = data.remaining();
        let offset = self.locate(sector, u64::try_from(count).map_err(|_| Failed)?)?;
        Ok(data.read_from_file(&self.file, offset, count)?)
    }

    pub fn write(&self, sector: u64, data: &mut Reader<'_>) -> Result<(), Failed> {
        let count = data.remaining();
        let offset = self.locate(sector, u64::try_from(count).map_err(|_| Failed)?)?;
        Ok(data.write_to_file(&self.file, offset, count)?)
    }

    pub fn flush(&self) -> Result<(), Failed> {
        if self.read_only {
            return Ok(());
        }
        fdatasync(&self.file).map_err(|_| Failed)
    }

    /// Discarded sectors read as anything; a file system without holes keeps them.
    pub fn discard(&self, sector: u64, sectors: u32) -> Result<(), Failed> {
        let length = u64::from(sectors).saturating_mul(SECTOR);
        let offset = self.locate(sector, length)?;
        match self.deallocate(offset, length, FallocateFlags::PUNCH_HOLE) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(_) => Err(Failed),
        }
    }

    pub fn write_zeroes(&self, sector: u64, sectors: u32, may_unmap: bool) -> Result<(), Failed> {
        let length = u64::from(sectors).saturating_mul(SECTOR);
        let offset = self.locate(sector, length)?;
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.deallocate(offset, length, how) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.overwrite(offset, length),
            result => result.map_err(|_| Failed),
        }
    }

    fn deallocate(&self, offset: u64, length: u64, how: FallocateFlags) -> rustix::io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, length)
    }

    fn overwrite(&self, mut offset: u64, mut left: u64) -> Result<(), Failed> {
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(ZEROS.get(..count).unwrap_or_default(), offset)?;
            let done = u64::try_from(count).map_err(|_| Failed)?;
            offset = offset.saturating_add(done);
            left = left.saturating_sub(done);
        }
        Ok(())
    }
}
