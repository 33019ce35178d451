//! The EROFS on-disk format, as far as this writer uses it. All numbers are little-endian.
//!
//! A node number ("nid") is the position of an inode in units of 32 bytes. Inodes are always the
//! extended kind of 64 bytes: the compact kind has no time of its own, and Python's compiled files
//! are only valid beside sources with their old times.

use crate::tree::{DeviceNumber, Kind, Node};

/// Size of a block in bytes.
pub const BLOCK: u64 = 1 << BLOCK_BITS;
const BLOCK_BITS: u8 = 12;
/// Size of the slots that node numbers count.
pub const SLOT: u64 = 32;
/// Size of an extended inode.
pub const INODE: u64 = 64;
/// Where the superblock is.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Size of one directory entry without its name.
const ENTRY: usize = 12;

const MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock's checksum is valid.
const COMPATIBLE_CHECKSUM: u32 = 1 << 0;
/// Extended inodes carry times of modification.
const COMPATIBLE_MTIME: u32 = 1 << 1;
/// "No block": what an inode without blocks of its own points to.
pub const NO_BLOCK: u32 = u32::MAX;

/// An inode ready to be written.
pub struct Inode<'a> {
    /// Attributes and type.
    pub node: &'a Node,
    /// Content length in bytes.
    pub size: u64,
    /// Whether the content follows the inode, in the same block.
    pub inline: bool,
    /// First block of the content, or [`NO_BLOCK`].
    pub start_block: u32,
    /// Number for programs that can only hold 32 bits.
    pub number: u32,
    /// Names it has.
    pub links: u32,
}

impl Inode<'_> {
    /// The 64 bytes of an extended inode.
    pub fn encode(&self) -> Vec<u8> {
        const VERSION_EXTENDED: u16 = 1;
        const LAYOUT_INLINE: u16 = 2 << 1;
        let format = if self.inline { VERSION_EXTENDED | LAYOUT_INLINE } else { VERSION_EXTENDED };
        let metadata = &self.node.metadata;
        let union = match &self.node.kind {
            Kind::CharacterDevice(number) | Kind::BlockDevice(number) => encode_device(*number),
            _ => self.start_block,
        };
        let mut bytes = Vec::with_capacity(64);
        put16(&mut bytes, format);
        put16(&mut bytes, 0); // extended attributes
        put16(&mut bytes, file_type(&self.node.kind).1 | (metadata.mode & 0o7777));
        put16(&mut bytes, 0);
        put64(&mut bytes, self.size);
        put32(&mut bytes, union);
        put32(&mut bytes, self.number);
        put32(&mut bytes, metadata.uid);
        put32(&mut bytes, metadata.gid);
        // Times before 1970 are kept as two's complement, as the kernel reads them.
        put64(&mut bytes, metadata.modified.seconds as u64);
        put32(&mut bytes, metadata.modified.nanoseconds);
        put32(&mut bytes, self.links);
        bytes.resize(64, 0);
        bytes
    }
}

/// Numbers of the superblock.
pub struct Superblock {
    /// Node number of the root directory: it must be near the start, the field has 16 bits.
    pub root: u16,
    /// Inodes in all.
    pub inodes: u64,
    /// Blocks in all.
    pub blocks: u32,
    /// Identity of the image.
    pub uuid: [u8; 16],
}

impl Superblock {
    /// The whole first block: boot area, superblock, checksum.
    pub fn encode_block(&self) -> Vec<u8> {
        let mut bytes = self.encode(0);
        // The checksum covers the superblock with the field itself at zero, to the end of the block.
        // The kernel keeps it without the usual final inversion.
        let checksum = !crc32c::crc32c(&bytes);
        bytes = self.encode(checksum);
        let mut block = vec![0; SUPERBLOCK_OFFSET as usize];
        block.append(&mut bytes);
        block
    }

    fn encode(&self, checksum: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BLOCK as usize);
        put32(&mut bytes, MAGIC);
        put32(&mut bytes, checksum);
        put32(&mut bytes, COMPATIBLE_CHECKSUM | COMPATIBLE_MTIME);
        bytes.push(BLOCK_BITS);
        bytes.push(0); // no superblock extension
        put16(&mut bytes, self.root);
        put64(&mut bytes, self.inodes);
        put64(&mut bytes, 0); // time of compact inodes, of which there are none
        put32(&mut bytes, 0);
        put32(&mut bytes, self.blocks);
        put32(&mut bytes, 0); // node numbers count from the image's start
        put32(&mut bytes, 0); // no shared extended attributes
        bytes.extend_from_slice(&self.uuid);
        // Volume name, and every feature a reader would have to know: none.
        bytes.resize((BLOCK - SUPERBLOCK_OFFSET) as usize, 0);
        bytes
    }
}

/// One entry of a directory.
pub struct Entry<'a> {
    /// Its name, 1 to 255 bytes.
    pub name: &'a [u8],
    /// Node number.
    pub nid: u64,
    /// The type's number in directory entries.
    pub file_type: u8,
}

/// Splits sorted entries with names of these lengths into the blocks they fit in: the number of
/// entries of each block and the bytes used in it.
pub fn split_directory(lengths: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut blocks: Vec<(usize, usize)> = Vec::new();
    for length in lengths {
        let needed = length.saturating_add(ENTRY);
        match blocks.last_mut() {
            Some((count, used)) if used.saturating_add(needed) <= BLOCK as usize => {
                *count = count.saturating_add(1);
                *used = used.saturating_add(needed);
            }
            _ => blocks.push((1, needed)),
        }
    }
    blocks
}

/// Content length of a directory with these blocks: the last one is not padded.
pub fn directory_size(blocks: &[(usize, usize)]) -> u64 {
    let full = (blocks.len() as u64).saturating_sub(1).saturating_mul(BLOCK);
    full.saturating_add(blocks.last().map_or(0, |(_, used)| *used as u64))
}

/// The content of a directory. `entries` are sorted by name, "." and ".." among them: readers find
/// the block of a name by bisection over the blocks, then the name by bisection inside.
pub fn encode_directory(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = entries.iter();
    for (count, _) in split_directory(entries.iter().map(|entry| entry.name.len())) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let block: Vec<&Entry<'_>> = rest.by_ref().take(count).collect();
        // The first entry's offset also tells how many entries the block has.
        let mut name_offset = count.saturating_mul(ENTRY);
        for entry in &block {
            put64(&mut bytes, entry.nid);
            // Below BLOCK by the split.
            put16(&mut bytes, u16::try_from(name_offset).unwrap_or(u16::MAX));
            bytes.push(entry.file_type);
            bytes.push(0);
            name_offset = name_offset.saturating_add(entry.name.len());
        }
        for entry in &block {
            bytes.extend_from_slice(entry.name);
        }
    }
    bytes
}

/// The type's number in directory entries, and its bits in the mode.
pub fn file_type(kind: &Kind) -> (u8, u16) {
    match kind {
        Kind::File(_) => (1, 0o100_000),
        Kind::Directory(_) => (2, 0o040_000),
        Kind::CharacterDevice(_) => (3, 0o020_000),
        Kind::BlockDevice(_) => (4, 0o060_000),
        Kind::Fifo => (5, 0o010_000),
        Kind::Symlink(_) => (7, 0o120_000),
    }
}

/// Linux's 32-bit device number: 12 bits of major, 20 of minor.
fn encode_device(number: DeviceNumber) -> u32 {
    (number.minor & 0xff) | ((number.major & 0xfff) << 8) | ((number.minor & 0xfff00) << 12)
}

fn put16(bytes: &mut Vec<u8>, value: u16) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut Vec<u8>, value: u64) {
    bytes.extend_from_slice(&value.to_le_bytes());
}
