//! Where everything goes. An image has four zones, each in the order of [`Plan::inodes`]:
//!
//! ```text
//! block 0   superblock
//! inodes    64 bytes each; small directories and symbolic links follow theirs
//! listings  blocks of larger directories
//! small     files of up to half a block, each behind its inode
//! data      all other files, each from a block boundary
//! ```
//!
//! So a path lookup reads from one dense region at the start, a small file costs one read, and a
//! larger one is read in whole blocks straight into the page cache. Inodes of one directory lie
//! side by side, and so do the contents of its files.

use super::format::{self, BLOCK, INODE, NO_BLOCK, SLOT};
use crate::ImageError;
use crate::tree::{Kind, Node, Tree, check_name, check_node};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// Content up to this size follows its inode: half a block, so that content with a block of its own
/// wastes less than half of it.
const INLINE_LIMIT: u64 = BLOCK / 2;

/// In which zone an inode and its content are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// Inode in "inodes", content behind it or absent.
    Inodes,
    /// Inode in "inodes", content in "listings".
    Listings,
    /// Both in "small".
    Small,
    /// Inode in "inodes", content in "data".
    Data,
}

/// One inode and its place.
pub struct Planned<'a> {
    /// What it is.
    pub node: &'a Node,
    /// Content length in bytes.
    pub size: u64,
    /// Its zone.
    pub zone: Zone,
    /// Node number.
    pub nid: u64,
    /// First block of its content, or [`NO_BLOCK`].
    pub start_block: u32,
    /// Names it has.
    pub links: u32,
    /// Of a directory: the directory above it, itself for the root.
    pub parent: usize,
    /// Of a directory: its entries in [`Plan::entries`].
    pub entries: Range<usize>,
}

/// The whole image before its first byte is written.
pub struct Plan<'a> {
    /// All inodes, the root first, those of one directory side by side.
    pub inodes: Vec<Planned<'a>>,
    /// Names of all directories with the positions of their inodes.
    pub entries: Vec<(&'a [u8], usize)>,
    /// Blocks in all.
    pub blocks: u32,
    /// Regular files, and the bytes in them.
    pub files: (u64, u64),
}

impl<'a> Plan<'a> {
    /// Gives every node of `tree` its place.
    pub fn new(tree: &'a Tree) -> Result<Plan<'a>, ImageError> {
        let mut plan = Plan { inodes: Vec::new(), entries: Vec::new(), blocks: 0, files: (0, 0) };
        plan.collect(tree)?;
        plan.place()?;
        Ok(plan)
    }

    /// The inode at `position`, which comes from this plan.
    #[expect(clippy::indexing_slicing, reason = "positions are made by collect() and inodes are never removed")]
    pub fn inode(&self, position: usize) -> &Planned<'a> {
        &self.inodes[position]
    }

    #[expect(clippy::indexing_slicing, reason = "as in inode()")]
    fn inode_mut(&mut self, position: usize) -> &mut Planned<'a> {
        &mut self.inodes[position]
    }

    /// The content of the directory `inode`.
    pub fn directory(&self, position: usize) -> Vec<u8> {
        let inode = self.inode(position);
        let entry = |name, position| {
            let target = self.inode(position);
            format::Entry { name, nid: target.nid, file_type: format::file_type(&target.node.kind).0 }
        };
        let names = self.entries.get(inode.entries.clone()).unwrap_or_default();
        let mut entries: Vec<format::Entry<'_>> = vec![entry(b".", position), entry(b"..", inode.parent)];
        entries.extend(names.iter().map(|(name, position)| entry(*name, *position)));
        entries.sort_by_key(|entry| entry.name);
        format::encode_directory(&entries)
    }

    /// Lists the nodes: a directory's children side by side, then those of its first subdirectory.
    fn collect(&mut self, tree: &'a Tree) -> Result<(), ImageError> {
        let mut shared: HashMap<*const Node, usize> = HashMap::new();
        self.add(tree.root(), 0)?;
        let mut open = vec![0];
        while let Some(position) = open.pop() {
            let Kind::Directory(children) = &self.inode(position).node.kind else { continue };
            let first = self.entries.len();
            let mut directories = Vec::new();
            for (name, child) in children {
                check_name(Path::new(OsStr::from_bytes(name)), name)?;
                let known = shared.get(&Arc::as_ptr(child)).copied().filter(|_| !child.is_directory());
                let target = match known {
                    Some(target) => {
                        let links = &mut self.inode_mut(target).links;
                        *links = links.saturating_add(1);
                        target
                    }
                    None => {
                        check_node(Path::new(OsStr::from_bytes(name)), child)?;
                        let target = self.add(child, position)?;
                        if Arc::strong_count(child) > 1 {
                            shared.insert(Arc::as_ptr(child), target);
                        }
                        target
                    }
                };
                if child.is_directory() {
                    directories.push(target);
                }
                self.entries.push((name.as_slice(), target));
            }
            let size = listing_size(children.keys().map(Vec::as_slice));
            let links = u32::try_from(directories.len()).unwrap_or(u32::MAX).saturating_add(2);
            let entries = first..self.entries.len();
            let inode = self.inode_mut(position);
            (inode.size, inode.links, inode.entries) = (size, links, entries);
            open.extend(directories.into_iter().rev());
        }
        Ok(())
    }

    fn add(&mut self, node: &'a Node, parent: usize) -> Result<usize, ImageError> {
        let position = self.inodes.len();
        if position >= u32::MAX as usize {
            let (value, limit) = (position as u64, u64::from(u32::MAX));
            return Err(ImageError::Limit { what: "number of nodes", path: None, value, limit });
        }
        let size = match &node.kind {
            Kind::File(content) => content.size(),
            Kind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        if let Kind::File(_) = node.kind {
            self.files = (self.files.0.saturating_add(1), self.files.1.saturating_add(size));
        }
        self.inodes.push(Planned {
            node,
            size,
            zone: Zone::Inodes,
            nid: 0,
            start_block: NO_BLOCK,
            links: 1,
            parent,
            entries: 0..0,
        });
        Ok(position)
    }

    fn place(&mut self) -> Result<(), ImageError> {
        let mut cursor = Cursor { position: BLOCK };
        for inode in &mut self.inodes {
            inode.zone = match inode.node.kind {
                Kind::File(_) if (1..=INLINE_LIMIT).contains(&inode.size) => Zone::Small,
                Kind::File(_) if inode.size > 0 => Zone::Data,
                _ if inode.size > INLINE_LIMIT => Zone::Listings,
                _ => Zone::Inodes,
            };
            match inode.zone {
                Zone::Inodes => inode.nid = cursor.inode(inode.size)?,
                Zone::Listings | Zone::Data => inode.nid = cursor.inode(0)?,
                Zone::Small => {}
            }
        }
        cursor.place_blocks(self.inodes.iter_mut().filter(|inode| inode.zone == Zone::Listings))?;
        cursor.align(BLOCK)?;
        for inode in self.inodes.iter_mut().filter(|inode| inode.zone == Zone::Small) {
            inode.nid = cursor.inode(inode.size)?;
        }
        cursor.place_blocks(self.inodes.iter_mut().filter(|inode| inode.zone == Zone::Data))?;
        cursor.align(BLOCK)?;
        self.blocks = cursor.block()?;
        Ok(())
    }
}

/// Content length of a directory with these names.
fn listing_size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut names: Vec<&[u8]> = [b".".as_slice(), b".."].into_iter().chain(names).collect();
    names.sort_unstable();
    format::directory_size(&format::split_directory(names.iter().map(|name| name.len())))
}

/// The next free byte of the image.
struct Cursor {
    position: u64,
}

impl Cursor {
    fn align(&mut self, to: u64) -> Result<(), ImageError> {
        self.position = self.position.checked_next_multiple_of(to).ok_or_else(ImageError::image_too_large)?;
        Ok(())
    }

    fn advance(&mut self, by: u64) -> Result<(), ImageError> {
        self.position = self.position.checked_add(by).ok_or_else(ImageError::image_too_large)?;
        Ok(())
    }

    /// Takes the place of an inode and `inline` bytes behind it, which may not cross a block boundary.
    fn inode(&mut self, inline: u64) -> Result<u64, ImageError> {
        self.align(SLOT)?;
        let needed = INODE.saturating_add(inline);
        if (self.position % BLOCK).saturating_add(needed) > BLOCK {
            self.align(BLOCK)?;
        }
        let nid = self.position / SLOT;
        self.advance(needed)?;
        Ok(nid)
    }

    /// The number of the block at the cursor, which is at its start.
    fn block(&self) -> Result<u32, ImageError> {
        match u32::try_from(self.position / BLOCK) {
            Ok(block) if block != NO_BLOCK => Ok(block),
            _ => Err(ImageError::image_too_large()),
        }
    }

    fn place_blocks<'p, 'a: 'p>(
        &mut self,
        inodes: impl Iterator<Item = &'p mut Planned<'a>>,
    ) -> Result<(), ImageError> {
        for inode in inodes {
            self.align(BLOCK)?;
            inode.start_block = self.block()?;
            self.advance(inode.size)?;
        }
        Ok(())
    }
}
