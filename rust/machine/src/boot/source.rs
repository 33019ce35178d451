//! Bytes of a kernel or initrd, from a file or from a decompressed payload: sized, readable at any offset.

use super::BootError;
use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// An input of known length. Nothing outside `0..length()` is ever read.
pub(crate) trait Source {
    /// What error messages call it.
    fn name(&self) -> &'static str;
    /// Length in bytes.
    fn length(&self) -> u64;
    /// Fills `buffer` from `offset` on.
    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Copies `length` bytes from `offset` on to guest memory without a buffer in between.
    fn copy_exact(&self, offset: u64, length: u64, memory: &GuestMemoryMmap, address: u64) -> Result<(), CopyError>;

    /// [`Source::read_exact`] with the error that names place and length.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        let length = buffer.len() as u64;
        self.read_exact(offset, buffer).map_err(|source| BootError::Read { input: self.name(), offset, length, source })
    }

    /// [`Source::copy_exact`] with the error that names place and length.
    fn copy(&self, offset: u64, length: u64, memory: &GuestMemoryMmap, address: u64) -> Result<(), BootError> {
        self.copy_exact(offset, length, memory, address).map_err(|error| match error {
            CopyError::Source(source) => BootError::Read { input: self.name(), offset, length, source },
            CopyError::Memory(source) => BootError::Memory { address, source },
        })
    }
}

/// Which side of a copy failed.
pub(crate) enum CopyError {
    Source(io::Error),
    Memory(GuestMemoryError),
}

impl From<GuestMemoryError> for CopyError {
    fn from(error: GuestMemoryError) -> Self {
        match error {
            GuestMemoryError::IOError(error) => Self::Source(error),
            GuestMemoryError::PartialBuffer { .. } => Self::Source(ErrorKind::UnexpectedEof.into()),
            other => Self::Memory(other),
        }
    }
}

/// A regular file whose length was taken once, at the start: a file that grows is not followed, one that shrinks is
/// an error.
#[derive(Debug)]
pub(crate) struct FileSource<'a> {
    name: &'static str,
    file: &'a File,
    length: u64,
}

impl<'a> FileSource<'a> {
    pub(crate) fn new(name: &'static str, file: &'a File) -> Result<Self, BootError> {
        let metadata =
            file.metadata().map_err(|source| BootError::Read { input: name, offset: 0, length: 0, source })?;
        if !metadata.is_file() {
            return Err(BootError::field(
                name,
                "the file's type",
                format!("{:?}", metadata.file_type()),
                "it must be a regular file, because it is read at offsets",
            ));
        }
        if metadata.len() == 0 {
            return Err(BootError::field(name, "the file's size", "0 bytes", "it must not be empty"));
        }
        Ok(Self { name, file, length: metadata.len() })
    }

    pub(crate) fn file(&self) -> &'a File {
        self.file
    }
}

impl Source for FileSource<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn copy_exact(&self, offset: u64, length: u64, memory: &GuestMemoryMmap, address: u64) -> Result<(), CopyError> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset)).map_err(CopyError::Source)?;
        memory.read_exact_volatile_from(GuestAddress(address), &mut file, to_usize(length)?)?;
        Ok(())
    }
}

/// A kernel image in the VMM's memory.
pub(crate) struct BytesSource<'a>(pub(crate) &'a [u8]);

impl BytesSource<'_> {
    fn range(&self, offset: u64, length: u64) -> io::Result<&[u8]> {
        let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
        usize::try_from(offset)
            .ok()
            .zip(end)
            .and_then(|(start, end)| self.0.get(start..end))
            .ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }
}

impl Source for BytesSource<'_> {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(self.range(offset, buffer.len() as u64)?);
        Ok(())
    }

    fn copy_exact(&self, offset: u64, length: u64, memory: &GuestMemoryMmap, address: u64) -> Result<(), CopyError> {
        let bytes = self.range(offset, length).map_err(CopyError::Source)?;
        memory.write_slice(bytes, GuestAddress(address))?;
        Ok(())
    }
}

fn to_usize(length: u64) -> Result<usize, CopyError> {
    usize::try_from(length).map_err(|_| CopyError::Source(ErrorKind::FileTooLarge.into()))
}
