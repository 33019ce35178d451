//! What an image will hold, in memory. Names and attributes are here; the content of files from the
//! host stays on the host until the image is written.
//!
//! A tree is ordered by the bytes of its names, so everything made from it is deterministic. Two
//! names are hard links of each other when they hold the same [`Arc`].

use crate::ImageError;
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Longest name of one entry, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest path in a tree, in bytes: what a guest's system calls accept.
pub const MAX_PATH: usize = 4095;
/// Longest target of a symbolic link, in bytes.
pub const MAX_TARGET: usize = 4095;

/// The entries of a directory, by name.
pub type Directory = BTreeMap<Vec<u8>, Arc<Node>>;

/// A moment, as files carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC; negative before.
    pub seconds: i64,
    /// Nanoseconds after that second, below 1 000 000 000.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// What made-up nodes carry: 1980-01-02 00:00 UTC, the first day a zip archive can hold in every
    /// time zone.
    pub const FIXED: Timestamp = Timestamp { seconds: 315_619_200, nanoseconds: 0 };
}

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits, with set-user-ID, set-group-ID and sticky: the low 12 bits of `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content.
    pub modified: Timestamp,
}

impl Metadata {
    /// Root's, with [`Timestamp::FIXED`].
    pub const fn fixed(mode: u16) -> Metadata {
        Metadata { mode, uid: 0, gid: 0, modified: Timestamp::FIXED }
    }
}

/// A file of the host, and what it looked like when it was listed. Copying fails when it looks different then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// Its inode number.
    pub inode: u64,
    /// Its modification time.
    pub modified: Timestamp,
    /// Its status change time: also moves when the modification time was set back.
    pub changed: Timestamp,
}

/// Where the content of a regular file comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// From memory.
    Bytes(Arc<[u8]>),
    /// From the host, read when the image is written.
    Host(HostFile),
}

impl Content {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            // usize is at most 64 bits wide.
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Host(file) => file.size,
        }
    }
}

/// Number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Driver.
    pub major: u32,
    /// Unit of that driver.
    pub minor: u32,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    File(Content),
    /// A symbolic link, with its target.
    Symlink(Vec<u8>),
    /// A character device.
    CharacterDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
}

/// A file, a directory, a link, a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its attributes.
    pub metadata: Metadata,
    /// What it is.
    pub kind: Kind,
}

impl Node {
    /// An empty directory of root's.
    pub fn directory(mode: u16) -> Node {
        Node { metadata: Metadata::fixed(mode), kind: Kind::Directory(Directory::new()) }
    }

    /// A file of root's with `bytes` in it.
    pub fn file(mode: u16, bytes: impl Into<Arc<[u8]>>) -> Node {
        Node { metadata: Metadata::fixed(mode), kind: Kind::File(Content::Bytes(bytes.into())) }
    }

    /// A symbolic link to `target`.
    pub fn symlink(target: impl Into<Vec<u8>>) -> Node {
        Node { metadata: Metadata::fixed(0o777), kind: Kind::Symlink(target.into()) }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }
}

/// A directory tree, starting at `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    root: Arc<Node>,
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Tree {
    /// An empty root directory, mode 755.
    pub fn new() -> Tree {
        Tree { root: Arc::new(Node::directory(0o755)) }
    }

    /// The folder at `path` on the host, as it is: symbolic links are kept, mounts below it are
    /// crossed, sockets are left out. Content is not read yet. Files of the calling user become
    /// root's (for root that changes nothing), so a folder unpacked without privileges still makes a
    /// system owned by root; other owners, modes and modification times stay.
    ///
    /// # Errors
    /// [`ImageError::Io`] names what could not be listed or examined; [`ImageError::InvalidPath`] and
    /// [`ImageError::Limit`] what does not fit in an image.
    pub fn from_directory(path: impl AsRef<Path>) -> Result<Tree, ImageError> {
        Ok(Tree { root: Arc::new(crate::scan::directory(path.as_ref())?) })
    }

    /// The root directory.
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// The node at `path`, where symbolic links are not followed.
    pub fn get(&self, path: impl AsRef<Path>) -> Option<&Node> {
        self.get_shared(path.as_ref()).map(Arc::as_ref)
    }

    fn get_shared(&self, path: &Path) -> Option<&Arc<Node>> {
        let mut node = &self.root;
        for name in names(path).ok()? {
            let Kind::Directory(entries) = &node.kind else { return None };
            node = entries.get(name)?;
        }
        Some(node)
    }

    /// Puts `node` at `path`, with directories of mode 755 above it where there are none. What was
    /// there is replaced; a directory that replaces a directory keeps the entries of
    /// both, the new one's where both have the name.
    ///
    /// # Errors
    /// [`ImageError::InvalidPath`], also when a part of the path is not a directory (symbolic links
    /// are not followed); [`ImageError::Limit`] for a long name, path or target.
    pub fn insert(&mut self, path: impl AsRef<Path>, node: Node) -> Result<(), ImageError> {
        self.insert_shared(path.as_ref(), Arc::new(node))
    }

    /// Makes `path` another name of what is at `existing` (a hard link).
    ///
    /// # Errors
    /// Those of [`Tree::insert`], and [`ImageError::InvalidPath`] if `existing` is missing or a directory.
    pub fn insert_link(&mut self, path: impl AsRef<Path>, existing: impl AsRef<Path>) -> Result<(), ImageError> {
        let existing = existing.as_ref();
        let invalid = |reason| ImageError::InvalidPath { path: existing.to_owned(), reason };
        let node = self.get_shared(existing).ok_or_else(|| invalid("the target of the hard link is not there"))?;
        if node.is_directory() {
            return Err(invalid("a directory has one name"));
        }
        let node = Arc::clone(node);
        self.insert_shared(path.as_ref(), node)
    }

    /// Puts a file of root's with `bytes` in it at `path`.
    ///
    /// # Errors
    /// Those of [`Tree::insert`].
    pub fn add_file(
        &mut self,
        path: impl AsRef<Path>,
        mode: u16,
        bytes: impl Into<Arc<[u8]>>,
    ) -> Result<(), ImageError> {
        self.insert(path, Node::file(mode, bytes))
    }

    /// Puts a directory of root's at `path`.
    ///
    /// # Errors
    /// Those of [`Tree::insert`].
    pub fn add_directory(&mut self, path: impl AsRef<Path>, mode: u16) -> Result<(), ImageError> {
        self.insert(path, Node::directory(mode))
    }

    /// Puts a symbolic link at `path`.
    ///
    /// # Errors
    /// Those of [`Tree::insert`].
    pub fn add_symlink(&mut self, path: impl AsRef<Path>, target: impl Into<Vec<u8>>) -> Result<(), ImageError> {
        self.insert(path, Node::symlink(target))
    }

    /// Takes `path` out of the tree, with everything below it.
    pub fn remove(&mut self, path: impl AsRef<Path>) -> Option<Arc<Node>> {
        let mut names = names(path.as_ref()).ok()?;
        let last = names.pop()?;
        let mut node = &mut self.root;
        for name in names {
            let Kind::Directory(entries) = &mut Arc::make_mut(node).kind else { return None };
            node = entries.get_mut(name)?;
        }
        let Kind::Directory(entries) = &mut Arc::make_mut(node).kind else { return None };
        entries.remove(last)
    }

    fn insert_shared(&mut self, path: &Path, new: Arc<Node>) -> Result<(), ImageError> {
        check_node(path, &new)?;
        let mut node = &mut self.root;
        for name in names(path)? {
            let inside = |reason| ImageError::InvalidPath { path: path.to_owned(), reason };
            let Kind::Directory(entries) = &mut Arc::make_mut(node).kind else {
                return Err(inside("a part of it exists and is not a directory"));
            };
            node = match entries.contains_key(name) {
                // Looked up twice rather than copying the name of every directory on the way.
                true => entries.get_mut(name).ok_or_else(|| inside("its directory changed"))?,
                false => entries.entry(name.to_vec()).or_insert_with(|| Arc::new(Node::directory(0o755))),
            };
        }
        if node.is_directory() && new.is_directory() {
            let new = Arc::unwrap_or_clone(new);
            let node = Arc::make_mut(node);
            node.metadata = new.metadata;
            if let (Kind::Directory(entries), Kind::Directory(mut added)) = (&mut node.kind, new.kind) {
                entries.append(&mut added);
            }
        } else if names(path)?.is_empty() {
            return Err(ImageError::InvalidPath { path: path.to_owned(), reason: "the root must be a directory" });
        } else {
            *node = new;
        }
        Ok(())
    }

    /// Calls `visit` for every node with its absolute path, parents before children, in order of the
    /// names' bytes; a node with several names is visited under each.
    ///
    /// # Errors
    /// The first error of `visit`.
    pub fn walk<'a, E>(&'a self, mut visit: impl FnMut(&[u8], &'a Arc<Node>) -> Result<(), E>) -> Result<(), E> {
        visit(b"/", &self.root)?;
        let mut path = Vec::new();
        let mut open = Vec::new();
        if let Kind::Directory(entries) = &self.root.kind {
            open.push((0, entries.iter()));
        }
        while let Some((length, entries)) = open.last_mut() {
            path.truncate(*length);
            let Some((name, node)) = entries.next() else {
                open.pop();
                continue;
            };
            path.push(b'/');
            path.extend_from_slice(name);
            visit(&path, node)?;
            if let Kind::Directory(entries) = &node.kind {
                open.push((path.len(), entries.iter()));
            }
        }
        Ok(())
    }
}

/// Refuses what no file system can hold; called for everything that enters a tree.
pub(crate) fn check_node(path: &Path, node: &Node) -> Result<(), ImageError> {
    if node.metadata.modified.nanoseconds >= 1_000_000_000 {
        let reason = "nanoseconds of its time are not below 1000000000";
        return Err(ImageError::InvalidPath { path: path.to_owned(), reason });
    }
    if let Kind::Symlink(target) = &node.kind {
        check_target(path, target)?;
    }
    Ok(())
}

fn check_target(path: &Path, target: &[u8]) -> Result<(), ImageError> {
    let invalid = |reason| Err(ImageError::InvalidPath { path: path.to_owned(), reason });
    if target.is_empty() {
        return invalid("the target of the symbolic link is empty");
    }
    if target.contains(&0) {
        return invalid("the target of the symbolic link contains a NUL byte");
    }
    limit("length in bytes of the target", path, target.len(), MAX_TARGET)
}

/// Refuses a name that cannot be a directory entry.
pub(crate) fn check_name(path: &Path, name: &[u8]) -> Result<(), ImageError> {
    let invalid = |reason| Err(ImageError::InvalidPath { path: path.to_owned(), reason });
    match name {
        b"" | b"." | b".." => return invalid("a part of it is empty, \".\" or \"..\""),
        _ if name.contains(&0) => return invalid("it contains a NUL byte"),
        _ if name.contains(&b'/') => return invalid("a name contains \"/\""),
        _ => {}
    }
    limit("length in bytes of a name", path, name.len(), MAX_NAME)
}

pub(crate) fn limit(what: &'static str, path: &Path, value: usize, limit: usize) -> Result<(), ImageError> {
    if value <= limit {
        return Ok(());
    }
    Err(ImageError::Limit { what, path: Some(path.to_owned()), value: value as u64, limit: limit as u64 })
}

/// The names along `path`, relative to the root whether it starts with "/" or not.
fn names(path: &Path) -> Result<Vec<&[u8]>, ImageError> {
    limit("length in bytes of a path", path, path.as_os_str().len(), MAX_PATH)?;
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                check_name(path, name.as_bytes())?;
                names.push(name.as_bytes());
            }
            Component::ParentDir | Component::Prefix(_) => {
                return Err(ImageError::InvalidPath { path: path.to_owned(), reason: "a part of it is \"..\"" });
            }
        }
    }
    Ok(names)
}
