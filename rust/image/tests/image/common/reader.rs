//! A second reading of the EROFS format, written for the tests from its description: refuses whatever
//! the writer must not produce, and gives back what an image holds.

use microvm_image::tree::{Content, Kind, Node, Timestamp, Tree};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

const BLOCK: usize = 4096;

/// One node of an image or of a tree, in terms both can be compared in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub modified: Timestamp,
    pub links: u32,
    /// Content of a file, target of a link, device number; nothing for a directory.
    pub content: Vec<u8>,
    /// Position of the first path, in order, that names the same node.
    pub identity: usize,
}

/// All nodes of an image by path.
pub fn read(image: &[u8]) -> BTreeMap<Vec<u8>, Entry> {
    let reader = Reader { image };
    assert_eq!(image.len() % BLOCK, 0, "the image ends inside of a block");
    assert_eq!(reader.u32(1024), 0xe0f5_e1e2, "magic");
    let mut sum = image[1024..BLOCK].to_vec();
    sum[4..8].fill(0);
    assert_eq!(reader.u32(1028), !crc32c::crc32c(&sum), "checksum of the superblock");
    assert_eq!(image[1024 + 12], 12, "block size");
    assert_eq!(reader.u32(1024 + 36) as usize, image.len() / BLOCK, "number of blocks");
    assert_eq!(reader.u32(1024 + 40), 0, "inodes count from the start");
    assert_eq!(reader.u32(1024 + 80), 0, "features a reader must know");
    let root = u64::from(reader.u16(1024 + 14));

    let mut found = BTreeMap::new();
    let mut inodes = HashMap::new();
    let mut pending = vec![(Vec::new(), root, root)];
    while let Some((path, nid, parent)) = pending.pop() {
        let (mut entry, children) = reader.inode(nid);
        if let Some(children) = children {
            let mut names: Vec<&[u8]> = children.iter().map(|(name, ..)| *name).collect();
            assert!(names.is_sorted(), "the names of a directory are sorted");
            names.dedup();
            assert_eq!(names.len(), children.len(), "a name is there once");
            for (name, child, kind) in &children {
                match *name {
                    b"." => assert_eq!(*child, nid),
                    b".." => assert_eq!(*child, parent),
                    name => {
                        let path = [&path[..], b"/", name].concat();
                        pending.push((path, *child, nid));
                    }
                }
                assert_eq!(*kind, reader.kind(*child), "type in the directory");
            }
            assert!(names.contains(&b".".as_slice()) && names.contains(&b"..".as_slice()));
        }
        entry.identity = usize::try_from(nid).unwrap();
        inodes.insert(nid, ());
        found.insert(path, entry);
    }
    assert_eq!(reader.u64(1024 + 16), inodes.len() as u64, "number of inodes");
    with_first_names(found)
}

/// All nodes of a tree by path, as an image of it must have them.
pub fn expected(tree: &Tree) -> BTreeMap<Vec<u8>, Entry> {
    let mut found = BTreeMap::new();
    let mut links: HashMap<*const Node, u32> = HashMap::new();
    tree.walk(|_, node| {
        *links.entry(Arc::as_ptr(node)).or_default() += 1;
        Ok::<(), ()>(())
    })
    .unwrap();
    tree.walk(|path, node| {
        let device = |number: &microvm_image::tree::DeviceNumber| {
            rustix::fs::makedev(number.major, number.minor).to_le_bytes().to_vec()
        };
        let (kind, content) = match &node.kind {
            Kind::File(Content::Bytes(bytes)) => (0o100_000, bytes.to_vec()),
            Kind::File(Content::Host(file)) => (0o100_000, std::fs::read(&file.path).unwrap()),
            Kind::Directory(_) => (0o040_000, Vec::new()),
            Kind::Symlink(target) => (0o120_000, target.clone()),
            Kind::CharacterDevice(number) => (0o020_000, device(number)),
            Kind::BlockDevice(number) => (0o060_000, device(number)),
            Kind::Fifo => (0o010_000, Vec::new()),
        };
        let links = match &node.kind {
            Kind::Directory(entries) => 2 + entries.values().filter(|node| node.is_directory()).count() as u32,
            _ => links[&Arc::as_ptr(node)],
        };
        let entry = Entry {
            mode: kind | u32::from(node.metadata.mode),
            uid: node.metadata.uid,
            gid: node.metadata.gid,
            modified: node.metadata.modified,
            links,
            content,
            identity: Arc::as_ptr(node) as usize,
        };
        found.insert(if path == b"/" { Vec::new() } else { path.to_vec() }, entry);
        Ok::<(), ()>(())
    })
    .unwrap();
    with_first_names(found)
}

/// Replaces identities by the position of the first path that has them.
fn with_first_names(mut found: BTreeMap<Vec<u8>, Entry>) -> BTreeMap<Vec<u8>, Entry> {
    let mut first = HashMap::new();
    for (position, entry) in found.values_mut().enumerate() {
        entry.identity = *first.entry(entry.identity).or_insert(position);
    }
    found
}

type Children<'a> = Vec<(&'a [u8], u64, u8)>;

struct Reader<'a> {
    image: &'a [u8],
}

impl<'a> Reader<'a> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.image[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.image[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.image[at..at + 8].try_into().unwrap())
    }

    fn kind(&self, nid: u64) -> u8 {
        let mode = self.u16(usize::try_from(nid).unwrap() * 32 + 4);
        match mode & 0o170_000 {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o120_000 => 7,
            other => panic!("type {other:o} in a mode"),
        }
    }

    fn inode(&self, nid: u64) -> (Entry, Option<Children<'a>>) {
        let at = usize::try_from(nid).unwrap() * 32;
        assert!(at >= BLOCK, "an inode in the superblock's block");
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "an extended inode");
        assert_eq!(self.u16(at + 2), 0, "extended attributes");
        let size = usize::try_from(self.u64(at + 8)).unwrap();
        let union = self.u32(at + 16);
        let kind = self.kind(nid);
        let data: &[u8] = match format >> 1 {
            0 if size == 0 => &[],
            0 => {
                let start = union as usize * BLOCK;
                let padding = &self.image[start + size..(start + size).next_multiple_of(BLOCK)];
                assert!(padding.iter().all(|byte| *byte == 0), "what follows the content is zero");
                &self.image[start..start + size]
            }
            2 => {
                assert!(size > 0 && at % BLOCK + 64 + size <= BLOCK, "inline content stays in its block");
                &self.image[at + 64..at + 64 + size]
            }
            other => panic!("data layout {other}"),
        };
        let mut entry = Entry {
            mode: u32::from(self.u16(at + 4)),
            uid: self.u32(at + 24),
            gid: self.u32(at + 28),
            modified: Timestamp { seconds: self.u64(at + 32) as i64, nanoseconds: self.u32(at + 40) },
            links: self.u32(at + 44),
            content: data.to_vec(),
            identity: 0,
        };
        if matches!(kind, 3 | 4) {
            let (major, minor) = ((union >> 8) & 0xfff, (union & 0xff) | ((union >> 12) & 0xfff00));
            entry.content = rustix::fs::makedev(major, minor).to_le_bytes().to_vec();
        }
        let children = (kind == 2).then(|| {
            entry.content.clear();
            data.chunks(BLOCK).flat_map(children_of_block).collect()
        });
        (entry, children)
    }
}

fn children_of_block(block: &[u8]) -> Children<'_> {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes(block[at..at + 2].try_into().unwrap()));
    let count = u16_at(8) / 12;
    assert!(count > 0 && u16_at(8) % 12 == 0);
    (0..count)
        .map(|index| {
            let at = index * 12;
            let start = u16_at(at + 8);
            let end = if index + 1 < count { u16_at(at + 12 + 8) } else { block.len() };
            let mut name = &block[start..end];
            if index + 1 == count {
                // The last name of a block ends where the block does, or before its padding.
                name = name.split(|byte| *byte == 0).next().unwrap();
            }
            assert!((1..=255).contains(&name.len()), "length of a name");
            (name, u64::from_le_bytes(block[at..at + 8].try_into().unwrap()), block[at + 10])
        })
        .collect()
}
