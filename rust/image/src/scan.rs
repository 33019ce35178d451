//! From a folder of the host to a tree, by listing and `lstat` only.

use crate::ImageError;
use crate::tree::{
    Content, DeviceNumber, Directory, HostFile, Kind, MAX_PATH, Metadata, Node, Timestamp, check_name, check_node,
    limit,
};
use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory whose listing is not finished.
struct Open {
    path: PathBuf,
    name: Vec<u8>,
    metadata: Metadata,
    pending: fs::ReadDir,
    entries: Directory,
}

/// Lists `path` and everything below it.
pub(crate) fn directory(path: &Path) -> Result<Node, ImageError> {
    // Absolute, because content is read later, when the working directory may be another one.
    let path = std::path::absolute(path).map_err(ImageError::io("find", path))?;
    let status = fs::metadata(&path).map_err(ImageError::io("examine", &path))?;
    if !status.is_dir() {
        let source = std::io::Error::from(std::io::ErrorKind::NotADirectory);
        return Err(ImageError::Io { action: "list", path, source });
    }
    let owner = Owner::of_caller();
    let mut links: HashMap<(u64, u64), Arc<Node>> = HashMap::new();
    let mut open = vec![open_directory(path.clone(), Vec::new(), &status, &owner)?];
    // Depth first without recursion: a deep tree must not exhaust the stack.
    while let Some(directory) = open.last_mut() {
        let Some(entry) = directory.pending.next() else {
            let Some(done) = open.pop() else { break };
            let node = Node { metadata: done.metadata, kind: Kind::Directory(done.entries) };
            let Some(parent) = open.last_mut() else { return Ok(node) };
            parent.entries.insert(done.name, Arc::new(node));
            continue;
        };
        let entry = entry.map_err(ImageError::io("list", &directory.path))?;
        let path = entry.path();
        let name = entry.file_name().into_vec();
        check_name(&path, &name)?;
        limit("length in bytes of a path", &path, path.as_os_str().len(), MAX_PATH)?;
        let status = entry.metadata().map_err(ImageError::io("examine", &path))?;
        if status.is_dir() {
            open.push(open_directory(path, name, &status, &owner)?);
            continue;
        }
        let identity = (status.dev(), status.ino());
        if status.nlink() > 1
            && let Some(node) = links.get(&identity)
        {
            directory.entries.insert(name, Arc::clone(node));
            continue;
        }
        let Some(kind) = leaf(&path, &status)? else { continue };
        let node = Node { metadata: owner.metadata(&status), kind };
        check_node(&path, &node)?;
        let node = Arc::new(node);
        if status.nlink() > 1 {
            links.insert(identity, Arc::clone(&node));
        }
        directory.entries.insert(name, node);
    }
    // Reached only if the stack ran empty without returning its bottom, which the loop does not do.
    Ok(Node::directory(0o755))
}

fn open_directory(path: PathBuf, name: Vec<u8>, status: &fs::Metadata, owner: &Owner) -> Result<Open, ImageError> {
    let pending = fs::read_dir(&path).map_err(ImageError::io("list", &path))?;
    Ok(Open { path, name, metadata: owner.metadata(status), pending, entries: Directory::new() })
}

/// Whose files become root's.
struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    fn of_caller() -> Owner {
        Owner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    fn metadata(&self, status: &fs::Metadata) -> Metadata {
        Metadata {
            mode: permissions(status),
            uid: if status.uid() == self.uid { 0 } else { status.uid() },
            gid: if status.gid() == self.gid { 0 } else { status.gid() },
            modified: timestamp(status.mtime(), status.mtime_nsec()),
        }
    }
}

/// What is at `path` if it is not a directory; `None` for a socket, which lives only with its process.
pub(crate) fn leaf(path: &Path, status: &fs::Metadata) -> Result<Option<Kind>, ImageError> {
    let kind = status.file_type();
    Ok(Some(if kind.is_file() {
        Kind::File(Content::Host(host_file(path, status)))
    } else if kind.is_symlink() {
        let target = fs::read_link(path).map_err(ImageError::io("read the link", path))?;
        Kind::Symlink(target.as_os_str().as_bytes().to_vec())
    } else if kind.is_char_device() {
        Kind::CharacterDevice(device_number(status))
    } else if kind.is_block_device() {
        Kind::BlockDevice(device_number(status))
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        return Ok(None);
    }))
}

/// What identifies the file at `path`, from its status.
pub(crate) fn host_file(path: &Path, status: &fs::Metadata) -> HostFile {
    HostFile {
        path: path.to_owned(),
        size: status.size(),
        inode: status.ino(),
        modified: timestamp(status.mtime(), status.mtime_nsec()),
        changed: timestamp(status.ctime(), status.ctime_nsec()),
    }
}

/// The low 12 bits of `st_mode`.
pub(crate) fn permissions(status: &fs::Metadata) -> u16 {
    u16::try_from(status.mode() & 0o7777).unwrap_or(0)
}

fn device_number(status: &fs::Metadata) -> DeviceNumber {
    DeviceNumber { major: rustix::fs::major(status.rdev()), minor: rustix::fs::minor(status.rdev()) }
}

pub(crate) fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    // The kernel keeps nanoseconds below a second.
    Timestamp { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) }
}
