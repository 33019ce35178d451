//! Laws of trees and of reading a folder.

use crate::common::{reader, trees};
use microvm_image::tree::{Content, Kind, Node};
use microvm_image::{ImageError, Tree};
use proptest::prelude::*;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn walk_visits_parents_first_and_names_in_order(steps in trees::steps()) {
        let tree = trees::build(&steps);
        let mut paths: Vec<Vec<u8>> = Vec::new();
        tree.walk(|path, node| {
            paths.push(path.to_vec());
            assert_eq!(tree.get(Path::new(std::ffi::OsStr::from_bytes(path))), Some(&**node));
            Ok::<(), ()>(())
        }).unwrap();
        let components: Vec<Vec<&[u8]>> = paths.iter().map(|path| path.split(|byte| *byte == b'/').collect()).collect();
        prop_assert!(components[1..].is_sorted());
        prop_assert_eq!(&paths[0], b"/");
    }

    #[test]
    fn what_was_inserted_is_there_until_it_is_removed(steps in trees::steps(), path in "[abc]{1,2}(/[abc]{1,2}){0,3}") {
        let mut tree = trees::build(&steps);
        if tree.add_file(&path, 0o600, b"content".to_vec()).is_ok() {
            prop_assert_eq!(tree.get(&path), Some(&Node::file(0o600, b"content".to_vec())));
            prop_assert!(tree.remove(&path).is_some());
            prop_assert!(tree.get(&path).is_none());
            prop_assert!(tree.remove(&path).is_none());
        }
    }
}

#[test]
fn from_directory_keeps_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::create_dir_all(root.join("a/empty")).unwrap();
    fs::write(root.join("a/file"), "content").unwrap();
    fs::set_permissions(root.join("a/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(root.join("a/file"), root.join("link")).unwrap();
    symlink("/nowhere/../at all", root.join("symlink")).unwrap();
    symlink(root, root.join("a/loop")).unwrap();
    crate::common::succeed(std::process::Command::new("mkfifo").arg(root.join("pipe")));
    let _socket = UnixListener::bind(root.join("socket")).unwrap();

    let tree = Tree::from_directory(root).unwrap();

    let nodes = reader::expected(&tree);
    let paths: Vec<&str> = nodes.keys().map(|path| std::str::from_utf8(path).unwrap()).collect();
    assert_eq!(paths, ["", "/a", "/a/empty", "/a/file", "/a/loop", "/link", "/pipe", "/symlink"]);
    let file = &nodes[b"/a/file".as_slice()];
    assert_eq!((file.mode, file.links, &file.content[..]), (0o104_751, 2, &b"content"[..]));
    assert_eq!(file, &nodes[b"/link".as_slice()]);
    assert_eq!((file.uid, file.gid), (0, 0));
    assert_eq!(nodes[b"/symlink".as_slice()].content, b"/nowhere/../at all");
    assert!(matches!(tree.get("pipe").unwrap().kind, Kind::Fifo));
}

#[test]
fn from_directory_does_not_read_files() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "content").unwrap();
    let tree = Tree::from_directory(directory.path()).unwrap();
    let Kind::File(Content::Host(file)) = &tree.get("/file").unwrap().kind else { panic!("a file of the host") };
    assert_eq!((file.size, &file.path), (7, &directory.path().join("file")));
}

#[test]
fn from_directory_without_a_directory_names_it() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let missing = Tree::from_directory(directory.path().join("missing")).unwrap_err();
    assert!(missing.to_string().ends_with("missing: No such file or directory (os error 2)"), "{missing}");
    let file = Tree::from_directory(directory.path().join("file")).unwrap_err();
    assert!(file.to_string().ends_with("file: not a directory"), "{file}");
}

#[test]
fn from_directory_that_may_not_be_listed_names_it() {
    // Root may list everything, so there the law has nothing to say.
    if rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let error = Tree::from_directory(directory.path()).unwrap_err();
    assert!(matches!(&error, ImageError::Io { path, .. } if *path == secret), "{error}");
    assert!(error.to_string().contains("hint: make it readable"), "{error}");
}

#[test]
fn insert_refuses_what_no_file_system_can_hold() {
    let mut tree = Tree::new();
    tree.add_file("/file", 0o644, vec![]).unwrap();
    let long = "x/".repeat(2048);
    for path in ["/file/below", "/a/../b", "/", "nul\0", &"x".repeat(256), &long] {
        let result = tree.add_file(path, 0o644, vec![]);
        assert!(matches!(result, Err(ImageError::InvalidPath { .. } | ImageError::Limit { .. })), "{path}: {result:?}");
    }
    for target in ["".to_owned(), "nul\0".to_owned(), "x".repeat(4096)] {
        assert!(tree.add_symlink("/link", target.clone()).is_err(), "{target}");
    }
    assert!(tree.insert_link("/new", "/missing").is_err());
    assert!(tree.insert_link("/new", "/").is_err());
}

#[test]
fn a_directory_over_a_directory_keeps_both_contents() {
    let mut tree = Tree::new();
    tree.add_file("/d/old", 0o644, vec![]).unwrap();
    tree.add_file("/d/both", 0o644, b"old".to_vec()).unwrap();
    let mut other = Tree::new();
    other.add_file("/new", 0o644, vec![]).unwrap();
    other.add_file("/both", 0o644, b"new".to_vec()).unwrap();
    tree.insert("/d", Node { metadata: Node::directory(0o711).metadata, ..other.root().clone() }).unwrap();
    let paths: Vec<Vec<u8>> = reader::expected(&tree).into_keys().collect();
    assert_eq!(paths, [&b""[..], b"/d", b"/d/both", b"/d/new", b"/d/old"]);
    assert_eq!(tree.get("/d").unwrap().metadata.mode, 0o711);
    assert_eq!(tree.get("/d/both"), Some(&Node::file(0o644, b"new".to_vec())));
}
