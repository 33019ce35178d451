//! Bytes on their way into the image, with bounded memory.

use crate::ImageError;
use crate::tree::{Content, HostFile};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

/// How much is gathered before it is written.
const CHUNK: usize = 1 << 20;
/// To compare with.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// The image file, and a digest of what went into it.
pub struct Output<'a, W> {
    inner: &'a mut W,
    digest: Sha256,
}

impl<'a, W: Write + Seek> Output<'a, W> {
    /// `inner` must be empty; it gets `length` bytes, zeros at first.
    pub fn new(inner: &'a mut W, length: u64) -> Result<Output<'a, W>, ImageError> {
        let mut output = Output { inner, digest: Sha256::new() };
        let end = output.inner.seek(SeekFrom::End(0)).map_err(|source| ImageError::Write { source })?;
        if end != 0 {
            // Parts of the image that are zero are not written.
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "the output is not empty");
            return Err(ImageError::Write { source });
        }
        output.write_at(length.saturating_sub(1), &[0])?;
        Ok(output)
    }

    /// Writes outside of any [`Zone`] and outside of the digest.
    pub fn write_at(&mut self, position: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let result = self.inner.seek(SeekFrom::Start(position)).and_then(|_| self.inner.write_all(bytes));
        result.map_err(|source| ImageError::Write { source })
    }

    /// Digest of everything written so far through zones; starts a new one.
    pub fn finish(&mut self) -> [u8; 32] {
        self.digest.finalize_reset().into()
    }
}

/// A region of the image that is filled from its start to its end. Several zones can be filled side by side.
pub struct Zone {
    /// Where the buffer's first byte belongs.
    start: u64,
    buffer: Vec<u8>,
    /// Hash what is written (metadata), or only its CRC (data, of which there is much).
    strong: bool,
}

impl Zone {
    /// A zone of inodes, names and small files.
    pub fn metadata() -> Zone {
        Zone { start: 0, buffer: Vec::with_capacity(CHUNK), strong: true }
    }

    /// A zone of file content.
    pub fn data() -> Zone {
        Zone { strong: false, ..Zone::metadata() }
    }

    /// Goes on at `position`, which is not before what the zone already has; the gap stays zero.
    pub fn advance_to<W: Write + Seek>(&mut self, position: u64, output: &mut Output<'_, W>) -> Result<(), ImageError> {
        match usize::try_from(position.saturating_sub(self.start)) {
            Ok(length) if length <= CHUNK && !self.buffer.is_empty() => self.buffer.resize(length, 0),
            _ => {
                self.flush(output)?;
                self.start = position;
            }
        }
        Ok(())
    }

    /// Appends `bytes`.
    pub fn put<W: Write + Seek>(&mut self, bytes: &[u8], output: &mut Output<'_, W>) -> Result<(), ImageError> {
        for part in bytes.chunks(CHUNK) {
            if self.buffer.len().saturating_add(part.len()) > CHUNK {
                self.flush(output)?;
            }
            self.buffer.extend_from_slice(part);
        }
        Ok(())
    }

    /// Appends the content of a file; `step` is called after each chunk with the bytes copied.
    pub fn copy<W: Write + Seek>(
        &mut self,
        content: &Content,
        output: &mut Output<'_, W>,
        step: &mut dyn FnMut(u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        match content {
            Content::Bytes(bytes) => {
                self.put(bytes, output)?;
                step(content.size())
            }
            Content::Host(file) => self.copy_host(file, output, step),
        }
    }

    fn copy_host<W: Write + Seek>(
        &mut self,
        expected: &HostFile,
        output: &mut Output<'_, W>,
        step: &mut dyn FnMut(u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let path = &expected.path;
        let changed = |what| ImageError::Changed { path: path.clone(), what };
        // NONBLOCK: should a named pipe have taken the file's place, opening it must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from);
        let mut file = File::from(opened.map_err(ImageError::io("read", path))?);
        check_unchanged(&file, expected)?;
        let mut remaining = expected.size;
        while remaining > 0 {
            let offset = expected.size.saturating_sub(remaining);
            let hole = hole_at(&file, offset, remaining).map_err(ImageError::io("read", path))?;
            if hole > 0 {
                let end = self.start.saturating_add(self.buffer.len() as u64).saturating_add(hole);
                self.advance_to(end, output)?;
                remaining = remaining.saturating_sub(hole);
                step(hole)?;
                continue;
            }
            let space = CHUNK.saturating_sub(self.buffer.len());
            if space == 0 {
                self.flush(output)?;
                continue;
            }
            let part = remaining.min(space as u64);
            let read = (&mut file).take(part).read_to_end(&mut self.buffer).map_err(ImageError::io("read", path))?;
            if read == 0 {
                return Err(changed("it became shorter"));
            }
            remaining = remaining.saturating_sub(read as u64);
            step(read as u64)?;
        }
        // A file that grew, or was rewritten under the copy, has another time now.
        check_unchanged(&file, expected)
    }

    /// Writes out what is gathered.
    pub fn flush<W: Write + Seek>(&mut self, output: &mut Output<'_, W>) -> Result<(), ImageError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        output.digest.update(self.start.to_le_bytes());
        // The image is zero already: what stays unwritten takes no room on the disk.
        if !ZEROS.starts_with(&self.buffer) {
            if self.strong {
                output.digest.update(&self.buffer);
            } else {
                output.digest.update(crc32c::crc32c(&self.buffer).to_le_bytes());
            }
            output.write_at(self.start, &self.buffer)?;
        }
        self.start = self.start.saturating_add(self.buffer.len() as u64);
        self.buffer.clear();
        Ok(())
    }
}

/// How many of the next `remaining` bytes from `offset` are not stored because they are zero; the file is then
/// positioned behind them. Small files are not asked about, it would cost more than it saves.
fn hole_at(file: &File, offset: u64, remaining: u64) -> std::io::Result<u64> {
    if remaining < CHUNK as u64 {
        return Ok(0);
    }
    let next_data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(position) => position,
        // Nothing but a hole up to the end.
        Err(rustix::io::Errno::NXIO) => offset.saturating_add(remaining),
        // A file system that cannot tell.
        Err(_) => offset,
    };
    let hole = next_data.saturating_sub(offset).min(remaining);
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(offset.saturating_add(hole)))?;
    Ok(hole)
}

fn check_unchanged(file: &File, expected: &HostFile) -> Result<(), ImageError> {
    let path = &expected.path;
    let status = file.metadata().map_err(ImageError::io("examine", path))?;
    let what = match crate::scan::host_file(path, &status) {
        _ if !status.is_file() => "it is no regular file any more",
        found if found == *expected => return Ok(()),
        found if found.size != expected.size => "its size is another one",
        found if found.inode != expected.inode => "it was replaced",
        _ => "it was written to",
    };
    Err(ImageError::Changed { path: path.clone(), what })
}
