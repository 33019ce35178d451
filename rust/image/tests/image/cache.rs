//! Laws of the image cache.

use microvm_image::{Cache, ImageError, Stage, Tree, silent};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn folder() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("sub")).unwrap();
    for number in 0..300 {
        fs::write(directory.path().join(format!("sub/{number}")), vec![b'x'; 5000]).unwrap();
    }
    directory
}

fn image(cache: &Cache, folder: &Path) -> PathBuf {
    cache.image(&Tree::from_directory(folder).unwrap(), &mut silent).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn an_image_is_built_once() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let cache = Cache::at(place.path());
    let first = image(&cache, folder.path());
    let status = fs::metadata(&first).unwrap();
    let mut calls = 0;
    let mut count = |_| {
        calls += 1;
        ControlFlow::Continue(())
    };
    let second = cache.image(&Tree::from_directory(folder.path()).unwrap(), &mut count).unwrap();
    assert_eq!((first, calls), (second.clone(), 0));
    assert_eq!(fs::metadata(&second).unwrap().ino(), status.ino());
    assert_eq!(status.permissions().mode() & 0o777, 0o400);
    assert_eq!(names(&place.path().join("images")).len(), 1);
}

/// Every change that an image would show, and one it would not show but that could hide another.
#[test]
fn every_change_gives_another_image() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let cache = Cache::at(place.path());
    let file = folder.path().join("sub/7");
    let mut images = vec![image(&cache, folder.path())];
    let mut changed = |change: &dyn Fn()| {
        std::thread::sleep(Duration::from_millis(20));
        change();
        images.push(image(&cache, folder.path()));
    };
    changed(&|| fs::write(&file, "other").unwrap());
    changed(&|| fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap());
    changed(&|| fs::rename(&file, folder.path().join("sub/seven")).unwrap());
    changed(&|| fs::create_dir(folder.path().join("new")).unwrap());
    changed(&|| std::os::unix::fs::symlink("a", folder.path().join("link")).unwrap());
    // The same size and the same times as before, as archives with normalized times leave it.
    let normalized = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    let target = folder.path().join("sub/8");
    let rewrite = |content: &str| {
        fs::write(&target, content).unwrap();
        fs::File::options().write(true).open(&target).unwrap().set_times(normalized).unwrap();
    };
    changed(&|| rewrite("one"));
    changed(&|| rewrite("two"));
    let count = images.len();
    images.sort();
    images.dedup();
    assert_eq!(images.len(), count);
}

#[test]
fn a_touched_folder_with_the_same_tree_is_the_same_image() {
    let place = tempfile::tempdir().unwrap();
    let cache = Cache::at(place.path());
    let tree = |order: [&str; 3]| {
        let mut tree = Tree::new();
        for name in order {
            tree.add_file(name, 0o644, name.as_bytes()).unwrap();
        }
        tree
    };
    let one = cache.image(&tree(["a", "b", "c"]), &mut silent).unwrap();
    let other = cache.image(&tree(["c", "a", "b"]), &mut silent).unwrap();
    assert_eq!(one, other);
}

#[test]
fn builders_at_the_same_time_build_it_once() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let tree = Tree::from_directory(folder.path()).unwrap();
    let (builds, waits) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let cache = Cache::at(place.path());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut first = true;
                let mut watch = |progress: microvm_image::Progress| {
                    match progress.stage {
                        Stage::Packing if first => {
                            first = false;
                            builds.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(100));
                        }
                        Stage::Waiting => {
                            waits.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                    ControlFlow::Continue(())
                };
                assert!(cache.image(&tree, &mut watch).unwrap().is_file());
            });
        }
    });
    assert_eq!(builds.into_inner(), 1);
    assert!(waits.into_inner() > 0, "nobody had to wait, so nothing was tried");
    assert_eq!(names(&place.path().join("images")).len(), 1);
}

#[test]
fn what_a_dead_builder_left_is_no_obstacle() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let cache = Cache::at(place.path());
    let finished = image(&cache, folder.path());
    let bytes = fs::read(&finished).unwrap();
    fs::remove_file(&finished).unwrap();
    fs::write(finished.with_extension("partial"), vec![0xff; 10_000_000]).unwrap();
    assert_eq!(image(&cache, folder.path()), finished);
    assert!(fs::read(&finished).unwrap() == bytes);
    assert_eq!(names(&place.path().join("images")).len(), 1);
}

#[test]
fn a_cancelled_build_leaves_nothing() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let tree = Tree::from_directory(folder.path()).unwrap();
    for stage in [Stage::Packing, Stage::Syncing] {
        let mut stop = |progress: microvm_image::Progress| {
            if progress.stage == stage { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let result = Cache::at(place.path()).image(&tree, &mut stop);
        assert!(matches!(result, Err(ImageError::Cancelled)));
        assert!(names(&place.path().join("images")).is_empty());
    }
}

#[test]
fn an_image_unused_for_long_goes_when_another_is_built() {
    let (place, folder) = (tempfile::tempdir().unwrap(), folder());
    let cache = Cache::at(place.path());
    let old = image(&cache, folder.path());
    let foreign = old.with_file_name("note");
    fs::write(&foreign, "").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(31 * 24 * 3600);
    for path in [&old, &foreign] {
        let times = fs::FileTimes::new().set_modified(long_ago);
        fs::File::open(path).unwrap().set_times(times).unwrap();
    }
    // Using it makes it young again.
    image(&cache, folder.path());
    let new = cache.image(&Tree::new(), &mut silent).unwrap();
    assert!(old.is_file() && new.is_file());
    fs::File::open(&old).unwrap().set_times(fs::FileTimes::new().set_modified(long_ago)).unwrap();
    let mut tree = Tree::new();
    tree.add_directory("d", 0o755).unwrap();
    cache.image(&tree, &mut silent).unwrap();
    assert!(!old.exists() && new.is_file() && foreign.is_file());
}

#[test]
fn a_cache_that_cannot_be_made_is_named() {
    let place = tempfile::NamedTempFile::new().unwrap();
    let error = Cache::at(place.path()).image(&Tree::new(), &mut silent).unwrap_err();
    assert!(error.to_string().contains(&place.path().display().to_string()), "{error}");
}
