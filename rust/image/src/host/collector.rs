//! Copies paths of the host into a tree, with everything that leads to them.

use crate::ImageError;
use crate::scan;
use crate::tree::{Kind, Metadata, Node, Timestamp, Tree};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// As many symbolic links in one path as Linux follows.
const MAX_LINKS: usize = 40;

/// What is at a path of the host.
#[derive(Debug, Clone)]
enum Found {
    Nothing,
    Directory,
    File,
    Link(PathBuf),
}

/// A tree in the making, and what is known about the host.
pub struct Collector {
    tree: Tree,
    found: HashMap<PathBuf, Found>,
}

impl Collector {
    /// Starts with an empty tree.
    pub fn new() -> Collector {
        Collector { tree: Tree::new(), found: HashMap::new() }
    }

    /// What is collected so far.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// For nodes that are not the host's.
    pub fn tree_mut(&mut self) -> &mut Tree {
        &mut self.tree
    }

    /// What was collected.
    pub fn into_tree(self) -> Tree {
        self.tree
    }

    /// Takes the file or the directory (without its entries) at the absolute `path`, with the directories and
    /// symbolic links on the way. Gives its path without symbolic links; `None` if there is nothing.
    pub fn add(&mut self, path: &Path) -> Result<Option<PathBuf>, ImageError> {
        let mut pending: Vec<OsString> = parts(path);
        let mut at = PathBuf::from("/");
        let mut links = 0usize;
        while let Some(name) = pending.pop() {
            if name == ".." {
                at.pop();
                continue;
            }
            let next = at.join(&name);
            match self.find(&next)? {
                Found::Nothing => return Ok(None),
                Found::File if !pending.is_empty() => return Ok(None),
                Found::File | Found::Directory => at = next,
                Found::Link(target) => {
                    links = links.saturating_add(1);
                    if links > MAX_LINKS {
                        return Ok(None);
                    }
                    if target.is_absolute() {
                        at = PathBuf::from("/");
                    }
                    pending.extend(parts(&target));
                }
            }
        }
        Ok(Some(at))
    }

    /// What is at `path`, whose directory is free of symbolic links; puts it into the tree the first time.
    fn find(&mut self, path: &Path) -> Result<Found, ImageError> {
        if let Some(found) = self.found.get(path) {
            return Ok(found.clone());
        }
        let found = match fs::symlink_metadata(path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Found::Nothing
            }
            Err(error) => return Err(ImageError::io("examine", path)(error)),
            Ok(status) if status.is_dir() => {
                self.tree.insert(path, Node::directory(scan::permissions(&status)))?;
                Found::Directory
            }
            Ok(status) => match scan::leaf(path, &status)? {
                Some(Kind::Symlink(target)) => {
                    let link = PathBuf::from(OsStr::from_bytes(&target));
                    self.tree.insert(path, Node::symlink(target))?;
                    Found::Link(link)
                }
                Some(kind @ Kind::File(_)) => {
                    let modified = scan::host_file(path, &status).modified;
                    self.tree.insert(path, file(kind, scan::permissions(&status), modified))?;
                    Found::File
                }
                // Devices and pipes are the guest's own affair.
                _ => Found::Nothing,
            },
        };
        self.found.insert(path.to_owned(), found.clone());
        Ok(found)
    }
}

/// A file of root's that keeps its time.
fn file(kind: Kind, mode: u16, modified: Timestamp) -> Node {
    Node { metadata: Metadata { mode, uid: 0, gid: 0, modified }, kind }
}

/// The names along `path`, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    });
    let mut names: Vec<OsString> = names.collect();
    names.reverse();
    names
}
