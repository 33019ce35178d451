//! Laws of the EROFS writer.

use crate::common::trees::{build, steps};
use crate::common::{check, extract, have, reader};
use microvm_image::tree::{Content, Kind, Metadata, Node, Timestamp};
use microvm_image::{ImageError, Progress, Tree, erofs, silent};
use proptest::prelude::*;
use std::fs::{self, File};
use std::io::Cursor;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

fn image_of(tree: &Tree) -> Vec<u8> {
    let mut image = Cursor::new(Vec::new());
    erofs::write(tree, &mut image, &mut silent).unwrap();
    image.into_inner()
}

fn image_file(tree: &Tree, path: &Path) {
    let mut file = File::create_new(path).unwrap();
    erofs::write(tree, &mut file, &mut silent).unwrap();
}

/// Compares what fsck.erofs unpacked with the tree. Special files need privileges to be made, and are only
/// compared where they were.
fn assert_unpacked(tree: &Tree, root: &Path) {
    tree.walk(|path, node| {
        let path = root.join(std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap()));
        let status = match fs::symlink_metadata(&path) {
            Ok(status) => status,
            Err(error) => {
                let special = matches!(node.kind, Kind::CharacterDevice(_) | Kind::BlockDevice(_) | Kind::Fifo);
                assert!(special, "{}: {error}", path.display());
                return Ok(());
            }
        };
        match &node.kind {
            Kind::Directory(entries) => {
                let count = fs::read_dir(&path).unwrap().count();
                assert!(count <= entries.len());
                let special = |node: &&std::sync::Arc<Node>| {
                    matches!(node.kind, Kind::CharacterDevice(_) | Kind::BlockDevice(_) | Kind::Fifo)
                };
                assert!(count >= entries.len() - entries.values().filter(special).count());
            }
            Kind::File(Content::Bytes(bytes)) => assert!(fs::read(&path).unwrap() == bytes[..], "{}", path.display()),
            Kind::File(Content::Host(_)) => unreachable!("made from bytes"),
            Kind::Symlink(target) => assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), &target[..]),
            Kind::Fifo => assert!(status.file_type().is_fifo()),
            Kind::CharacterDevice(_) => assert!(status.file_type().is_char_device()),
            Kind::BlockDevice(_) => assert!(status.file_type().is_block_device()),
        }
        if matches!(node.kind, Kind::File(_)) {
            assert_eq!(status.mode() & 0o777, u32::from(node.metadata.mode) & 0o777, "{}", path.display());
        }
        Ok::<(), ()>(())
    })
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn an_image_holds_what_the_tree_holds(steps in steps()) {
        let tree = build(&steps);
        prop_assert_eq!(reader::read(&image_of(&tree)), reader::expected(&tree));
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes(steps in steps()) {
        let (one, other) = (build(&steps), build(&steps));
        prop_assert!(image_of(&one) == image_of(&other));
    }

    #[test]
    fn other_metadata_gives_another_uuid(steps in steps(), mode in 0u16..=0o7777) {
        let mut tree = build(&steps);
        let before = image_of(&tree);
        let changed = tree.root().metadata.mode != mode;
        tree.insert("/", Node::directory(mode)).unwrap();
        let after = image_of(&tree);
        prop_assert_eq!(before[1024 + 48..1024 + 64] != after[1024 + 48..1024 + 64], changed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn fsck_unpacks_what_the_tree_holds(steps in steps()) {
        if have("fsck.erofs", "erofs-utils") {
            let tree = build(&steps);
            let directory = tempfile::tempdir().unwrap();
            let image = directory.path().join("image");
            image_file(&tree, &image);
            check(&image);
            let unpacked = directory.path().join("unpacked");
            extract(&image, &unpacked);
            assert_unpacked(&tree, &unpacked);
        }
    }
}

#[test]
fn a_directory_with_ten_thousand_entries_and_long_names() {
    let mut tree = Tree::new();
    for number in 0..10_000 {
        let name = format!("many/{number:0width$}", width = 1 + number % 255);
        tree.add_file(&name, 0o644, name.clone().into_bytes()).unwrap();
    }
    let image = image_of(&tree);
    assert_eq!(reader::read(&image), reader::expected(&tree));
    if have("fsck.erofs", "erofs-utils") {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("image"), &image).unwrap();
        check(&directory.path().join("image"));
    }
}

#[test]
fn a_file_over_4_gib_takes_no_more_room_than_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    let large = File::create(source.join("large")).unwrap();
    let size = (4 << 30) + 12_345;
    large.set_len(size).unwrap();
    large.write_all_at(b"start", 0).unwrap();
    large.write_all_at(b"end", size - 3).unwrap();
    let tree = Tree::from_directory(&source).unwrap();
    let image = directory.path().join("image");

    image_file(&tree, &image);

    let status = fs::metadata(&image).unwrap();
    assert!(status.len() > size);
    assert!(status.blocks() * 512 < 16 << 20, "{} bytes on the disk", status.blocks() * 512);
    let file = File::open(&image).unwrap();
    let mut end = [0; 3];
    file.read_exact_at(&mut end, status.len() - 4096 + (size - 3) % 4096).unwrap();
    assert_eq!(&end, b"end");
    if have("dump.erofs", "erofs-utils") {
        let output = crate::common::succeed(std::process::Command::new("dump.erofs").arg("--path=/large").arg(&image));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&size.to_string()), "{text}");
    }
}

/// Packs a folder with one file of 10 000 bytes that `change` changes after it was listed.
fn result_of_packing_after(change: impl FnOnce(&Path)) -> Result<(), ImageError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, [b'x'; 10_000]).unwrap();
    let tree = Tree::from_directory(directory.path()).unwrap();
    // Longer than the tick in which a file's times are counted.
    std::thread::sleep(std::time::Duration::from_millis(20));
    change(&path);
    let result = erofs::write(&tree, &mut Cursor::new(Vec::new()), &mut silent);
    if let Err(ImageError::Changed { path: named, .. }) = &result {
        assert_eq!(*named, path);
    }
    result
}

#[test]
fn write_with_a_file_that_changed_names_it() {
    let results = [
        result_of_packing_after(|path| fs::write(path, [b'x'; 10_001]).unwrap()),
        result_of_packing_after(|path| fs::write(path, [b'x'; 9_999]).unwrap()),
        result_of_packing_after(|path| fs::write(path, [b'y'; 10_000]).unwrap()),
        result_of_packing_after(|path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        // Opening a pipe must not wait for somebody to write into it.
        result_of_packing_after(|path| {
            fs::remove_file(path).unwrap();
            crate::common::succeed(std::process::Command::new("mkfifo").arg(path));
        }),
    ];
    for result in results {
        assert!(matches!(result, Err(ImageError::Changed { .. })), "{result:?}");
    }
}

#[test]
fn write_with_a_file_that_is_gone_names_it() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "x").unwrap();
    let tree = Tree::from_directory(directory.path()).unwrap();
    fs::remove_file(directory.path().join("file")).unwrap();
    let error = erofs::write(&tree, &mut Cursor::new(Vec::new()), &mut silent).unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot read {}/file:", directory.path().display())), "{error}");
}

#[test]
fn write_tells_its_progress_and_stops_when_told_to() {
    let mut tree = Tree::new();
    for number in 0..1000 {
        tree.add_file(format!("{number}"), 0o644, vec![1; 3000]).unwrap();
    }
    let mut seen: Vec<Progress> = Vec::new();
    let mut record = |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    };
    erofs::write(&tree, &mut Cursor::new(Vec::new()), &mut record).unwrap();
    assert!(seen.len() >= 5 && seen.is_sorted_by_key(|progress| (progress.files, progress.bytes)));
    let last = seen.last().unwrap();
    assert_eq!((last.files, last.bytes), (1000, 3_000_000));
    assert_eq!((last.files, last.bytes), (last.files_total, last.bytes_total));

    let mut calls = 0;
    let mut stop = |_| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let result = erofs::write(&tree, &mut Cursor::new(Vec::new()), &mut stop);
    assert!(matches!(result, Err(ImageError::Cancelled)));
    assert_eq!(calls, 3);
}

#[test]
fn write_to_something_that_is_not_empty_is_refused() {
    let result = erofs::write(&Tree::new(), &mut Cursor::new(vec![1]), &mut silent);
    assert!(matches!(result, Err(ImageError::Write { .. })));
}

#[test]
fn a_hand_made_directory_with_a_bad_name_is_refused() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        let mut directory = Node::directory(0o755);
        let Kind::Directory(entries) = &mut directory.kind else { unreachable!("made as one") };
        entries.insert(name.to_vec(), Node::file(0o644, vec![]).into());
        let mut tree = Tree::new();
        tree.insert("/directory", directory).unwrap();
        let result = erofs::write(&tree, &mut Cursor::new(Vec::new()), &mut silent);
        assert!(matches!(result, Err(ImageError::InvalidPath { .. } | ImageError::Limit { .. })), "{name:?}");
    }
}

#[test]
fn an_empty_tree_makes_an_image() {
    let mut tree = Tree::new();
    let modified = Timestamp { seconds: -1, nanoseconds: 999_999_999 };
    let metadata = Metadata { mode: 0o700, uid: 1, gid: u32::MAX, modified };
    tree.insert("/", Node { metadata, ..Node::directory(0) }).unwrap();
    assert_eq!(reader::read(&image_of(&tree)), reader::expected(&tree));
}
