//! Writes a [`Tree`] as an EROFS image: read-only, uncompressed, 4 KiB blocks, checksummed superblock.
//!
//! The same tree gives the same bytes: times are those of the tree (nodes made up by this crate carry
//! [`crate::tree::Timestamp::FIXED`]), nothing depends on the clock, and the UUID is derived from what
//! is written. Linux 5.16 or later and erofs-utils read the result; no optional feature is required.

mod format;
mod output;
mod plan;

use crate::progress::{Progress, Stage, Watch};
use crate::tree::{Kind, Tree};
use crate::{ImageError, tree::Content};
use format::{BLOCK, SLOT, Superblock};
use output::{Output, Zone as OutputZone};
use plan::{Plan, Planned, Zone};
use std::io::{Seek, Write};

/// Changes whenever the same tree would give other bytes: a part of every cache key.
pub const WRITER_VERSION: u32 = 1;

/// A watch is asked after this many files even if they are empty.
const FILES_PER_STEP: u64 = 128;

/// Writes `tree` to `out`, which must be empty (parts of the image that are zero are skipped). Needs
/// memory for the names of the tree and a few MiB, not for the content of its files.
///
/// # Errors
/// [`ImageError::Io`] names a file that cannot be read, [`ImageError::Changed`] one that is not what it
/// was when the tree was made; [`ImageError::Write`]; [`ImageError::Limit`] beyond 16 TiB or 2³² nodes;
/// [`ImageError::Cancelled`] if `watch` says so. What is in `out` after an error is no image.
pub fn write<W: Write + Seek>(tree: &Tree, out: &mut W, watch: Watch<'_>) -> Result<(), ImageError> {
    let plan = Plan::new(tree)?;
    let mut steps = Steps::new(&plan, watch);
    steps.tell()?;
    let length = u64::from(plan.blocks).saturating_mul(BLOCK);
    let mut output = Output::new(out, length)?;
    write_metadata(&plan, &mut output)?;
    write_files(&plan, &mut output, &mut steps)?;
    steps.tell()?;
    let superblock = Superblock {
        root: u16::try_from(plan.inode(0).nid).map_err(|_| ImageError::image_too_large())?,
        inodes: plan.inodes.len() as u64,
        blocks: plan.blocks,
        uuid: uuid(output.finish()),
    };
    output.write_at(0, &superblock.encode_block())
}

/// Zones "inodes" and "listings".
fn write_metadata<W: Write + Seek>(plan: &Plan<'_>, output: &mut Output<'_, W>) -> Result<(), ImageError> {
    let mut zone = OutputZone::metadata();
    for (position, inode) in plan.inodes.iter().enumerate() {
        if inode.zone == Zone::Small {
            continue;
        }
        zone.advance_to(inode.nid.saturating_mul(SLOT), output)?;
        zone.put(&encode(inode, position), output)?;
        if inode.zone == Zone::Inodes {
            zone.put(&listing(plan, inode, position), output)?;
        }
    }
    for (position, inode) in plan.inodes.iter().enumerate() {
        if inode.zone == Zone::Listings {
            zone.advance_to(u64::from(inode.start_block).saturating_mul(BLOCK), output)?;
            zone.put(&listing(plan, inode, position), output)?;
        }
    }
    zone.flush(output)
}

/// Zones "small" and "data", side by side so that every file is opened once and in the order of the tree.
fn write_files<W: Write + Seek>(
    plan: &Plan<'_>,
    output: &mut Output<'_, W>,
    steps: &mut Steps<'_>,
) -> Result<(), ImageError> {
    let mut small = OutputZone::metadata();
    let mut data = OutputZone::data();
    for (position, inode) in plan.inodes.iter().enumerate() {
        let Kind::File(content) = &inode.node.kind else { continue };
        match inode.zone {
            Zone::Small => {
                small.advance_to(inode.nid.saturating_mul(SLOT), output)?;
                small.put(&encode(inode, position), output)?;
                copy(&mut small, content, output, steps)?;
            }
            Zone::Data => {
                data.advance_to(u64::from(inode.start_block).saturating_mul(BLOCK), output)?;
                copy(&mut data, content, output, steps)?;
            }
            Zone::Inodes | Zone::Listings => {}
        }
        steps.file()?;
    }
    small.flush(output)?;
    data.flush(output)
}

fn copy<W: Write + Seek>(
    zone: &mut OutputZone,
    content: &Content,
    output: &mut Output<'_, W>,
    steps: &mut Steps<'_>,
) -> Result<(), ImageError> {
    zone.copy(content, output, &mut |bytes| steps.bytes(bytes))
}

fn encode(inode: &Planned<'_>, position: usize) -> Vec<u8> {
    let encoded = format::Inode {
        node: inode.node,
        size: inode.size,
        inline: inode.size > 0 && matches!(inode.zone, Zone::Inodes | Zone::Small),
        start_block: inode.start_block,
        // The plan holds fewer than 2³² inodes; 0 would mean "none".
        number: u32::try_from(position).unwrap_or(u32::MAX).saturating_add(1),
        links: inode.links,
    };
    encoded.encode()
}

/// The content of a directory or a symbolic link.
fn listing(plan: &Plan<'_>, inode: &Planned<'_>, position: usize) -> Vec<u8> {
    match &inode.node.kind {
        Kind::Directory(_) => plan.directory(position),
        Kind::Symlink(target) => target.clone(),
        _ => Vec::new(),
    }
}

/// A UUID of version 8 ("custom") from the start of a digest.
fn uuid(digest: [u8; 32]) -> [u8; 16] {
    let mut number = digest.iter().take(16).fold(0u128, |number, byte| (number << 8) | u128::from(*byte));
    number &= !(0xf << 76) & !(0b11 << 62);
    number |= (8 << 76) | (0b10 << 62);
    number.to_be_bytes()
}

/// Tells the watch where the work is, not too often.
struct Steps<'a> {
    watch: Watch<'a>,
    progress: Progress,
    untold: u64,
}

impl<'a> Steps<'a> {
    fn new(plan: &Plan<'_>, watch: Watch<'a>) -> Steps<'a> {
        let (files_total, bytes_total) = plan.files;
        let progress = Progress { stage: Stage::Packing, files: 0, files_total, bytes: 0, bytes_total };
        Steps { watch, progress, untold: 0 }
    }

    fn tell(&mut self) -> Result<(), ImageError> {
        self.untold = 0;
        if (self.watch)(self.progress).is_break() { Err(ImageError::Cancelled) } else { Ok(()) }
    }

    fn bytes(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.progress.bytes = self.progress.bytes.saturating_add(bytes);
        // In units of a file's share of a MiB, so that either many files or much content brings a step.
        self.untold = self.untold.saturating_add(bytes / ((1 << 20) / FILES_PER_STEP));
        if self.untold >= FILES_PER_STEP { self.tell() } else { Ok(()) }
    }

    fn file(&mut self) -> Result<(), ImageError> {
        self.progress.files = self.progress.files.saturating_add(1);
        self.untold = self.untold.saturating_add(1);
        if self.untold >= FILES_PER_STEP { self.tell() } else { Ok(()) }
    }
}
