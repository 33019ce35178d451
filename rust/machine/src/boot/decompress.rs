//! The compressions a Linux bzImage may use, each with bounded memory.
//!
//! The kernel's build appends the uncompressed size as a 32-bit word to the payload (gzip's own trailer is such a
//! word). It is checked against the limit before anything is decompressed, and against the result afterwards.

use super::BootError;
use super::source::{FileSource, Source};
use std::io::{self, BufReader, ErrorKind, Read};

/// Largest dictionary or window in bytes. Linux uses up to 128 MiB; pages of it that the kernel does not fill are
/// never touched.
const WINDOW_MAX: u64 = 256 << 20;
/// Size of the word behind the payload.
const SIZE_WORD: u64 = 4;
/// Uncompressed size of a block of the LZ4 legacy format.
const LZ4_BLOCK: usize = 8 << 20;
/// Largest compressed size of such a block: incompressible data grows by 1/255, and 16 bytes.
const LZ4_BLOCK_COMPRESSED: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;
const LZ4_MAGIC: u32 = 0x184C_2102;

/// A compression this loader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// By the payload's first bytes.
    fn detect(magic: [u8; 6]) -> Result<Self, BootError> {
        let unsupported = |name: &str| {
            let hint = "it must be gzip, xz, zstd or lz4; hint: give the vmlinux of this kernel instead";
            Err(BootError::field("kernel (bzImage)", "the payload's compression", name, hint))
        };
        match magic {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Ok(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Ok(Self::Lz4),
            [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
            [0x5d, 0, 0, ..] => unsupported("lzma"),
            [0x89, b'L', b'Z', b'O', ..] => unsupported("lzo"),
            other => unsupported(&format!("unknown (it begins with {other:02x?})")),
        }
    }
}

/// The bytes of the payload at `offset`, `length` bytes long with its size word, decompressed.
///
/// # Errors
/// [`BootError`] if the compression is not supported, the size exceeds `limit` (the guest's RAM, in bytes), or the
/// payload is damaged.
pub(crate) fn payload(kernel: &FileSource<'_>, offset: u64, length: u64, limit: u64) -> Result<Vec<u8>, BootError> {
    let mut magic = [0; 6];
    let shortest = SIZE_WORD.saturating_add(magic.len() as u64);
    if length < shortest {
        let allowed = format!("it must be at least {shortest} bytes");
        return Err(BootError::field("kernel (bzImage)", "payload_length", length, allowed));
    }
    kernel.read(offset, &mut magic)?;
    let format = Format::detect(magic)?;
    let mut word = [0; SIZE_WORD as usize];
    kernel.read(offset.saturating_add(length).saturating_sub(SIZE_WORD), &mut word)?;
    let size = u32::from_le_bytes(word);
    if u64::from(size) > limit {
        return Err(BootError::field(
            "kernel (bzImage)",
            "the uncompressed size",
            format!("{size} bytes"),
            format!("the guest's low memory has only {limit} bytes; hint: give it more memory"),
        ));
    }
    // gzip's word is part of its trailer, the others' is not.
    let compressed = if format == Format::Gzip { length } else { length.saturating_sub(SIZE_WORD) };
    let input = BufReader::with_capacity(64 << 10, Section { kernel, offset, left: compressed });
    decompress(format, input, size).map_err(|source| BootError::Payload { format: format.name(), source })
}

/// Exactly `size` bytes, or an error.
fn decompress(format: Format, input: impl Read, size: u32) -> io::Result<Vec<u8>> {
    match format {
        Format::Gzip => take(flate2::read::GzDecoder::new(input), size),
        Format::Xz => {
            let limit = u32::try_from(WINDOW_MAX >> 10).unwrap_or(u32::MAX);
            take(lzma_rust2::XzReader::new_mem_limit(input, false, limit), size)
        }
        Format::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(input, WINDOW_MAX);
            take(decoder.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?, size)
        }
        Format::Lz4 => lz4_legacy(input, size),
    }
}

fn take(mut decoder: impl Read, size: u32) -> io::Result<Vec<u8>> {
    let mut output = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
    // One byte more than announced, to notice that there is more, and to make the decoder check its checksum.
    decoder.by_ref().take(u64::from(size).saturating_add(1)).read_to_end(&mut output)?;
    check_size(output, size)
}

/// The format of `lz4 -l`: a magic number, then blocks of 8 MiB, each compressed on its own, after its compressed size.
fn lz4_legacy(mut input: impl Read, size: u32) -> io::Result<Vec<u8>> {
    let mut word = [0; 4];
    input.read_exact(&mut word)?;
    if u32::from_le_bytes(word) != LZ4_MAGIC {
        return Err(invalid("no magic number"));
    }
    let size_bytes = usize::try_from(size).map_err(|_| invalid("it is too large for this host"))?;
    let mut output = vec![0; size_bytes];
    let mut filled = 0usize;
    let mut compressed = Vec::new();
    while filled < size_bytes {
        input.read_exact(&mut word)?;
        let length = u32::from_le_bytes(word);
        if length == LZ4_MAGIC {
            continue; // another frame: `lz4 -l` of concatenated files
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length == 0 || length > LZ4_BLOCK_COMPRESSED {
            return Err(invalid("the size of a block is out of range"));
        }
        compressed.resize(length, 0);
        input.read_exact(&mut compressed)?;
        let end = filled.saturating_add(LZ4_BLOCK).min(size_bytes);
        let room = output.get_mut(filled..end).unwrap_or_default();
        let written = lz4_flex::block::decompress_into(&compressed, room)
            .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        if written == 0 {
            return Err(invalid("a block is empty"));
        }
        filled = filled.saturating_add(written);
    }
    if input.read(&mut word)? != 0 {
        return Err(invalid("there is more data than the size behind it says"));
    }
    Ok(output)
}

fn check_size(output: Vec<u8>, size: u32) -> io::Result<Vec<u8>> {
    match output.len().cmp(&usize::try_from(size).unwrap_or(usize::MAX)) {
        std::cmp::Ordering::Less => Err(invalid("there is less data than the size behind it says")),
        std::cmp::Ordering::Equal => Ok(output),
        std::cmp::Ordering::Greater => Err(invalid("there is more data than the size behind it says")),
    }
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message)
}

/// A part of the kernel file as a stream.
struct Section<'a> {
    kernel: &'a FileSource<'a>,
    offset: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.kernel.file().read_at(buffer.get_mut(..wanted).unwrap_or_default(), self.offset)?;
        self.offset = self.offset.saturating_add(read as u64);
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}
