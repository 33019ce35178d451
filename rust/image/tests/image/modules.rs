//! Laws of choosing kernel modules.

use microvm_image::{ImageError, modules};
use proptest::prelude::*;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const RELEASE: &str = "6.1.0-test";

/// A modules directory; a module's content is an ELF magic and its name.
struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    fn new(dependencies: &str) -> Tree {
        let root = tempfile::tempdir().unwrap();
        let tree = Tree { root };
        fs::create_dir_all(tree.directory().join("kernel")).unwrap();
        tree.index("dep", dependencies);
        for line in dependencies.lines() {
            let path = line.split(':').next().unwrap();
            fs::write(tree.directory().join(path), format!("\x7fELF{path}")).unwrap();
        }
        tree
    }

    fn directory(&self) -> std::path::PathBuf {
        self.root.path().join(RELEASE)
    }

    fn index(&self, kind: &str, text: &str) {
        fs::write(self.directory().join(format!("modules.{kind}")), text).unwrap();
    }

    fn names(&self, wanted: &[&str]) -> Vec<String> {
        let modules = modules::for_release(self.root.path(), RELEASE, wanted).unwrap();
        modules.into_iter().map(|(name, _)| name).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Module `n` depends on some of those before it; depmod lists all of them, nearest first.
    #[test]
    fn every_module_comes_once_and_after_what_it_needs(
        needs in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..4), 1..20),
        wanted in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let mut direct: Vec<Vec<usize>> = Vec::new();
        let mut lines = String::new();
        for (number, needs) in needs.iter().enumerate() {
            let mut needs: Vec<usize> =
                if number == 0 { vec![] } else { needs.iter().map(|index| index.index(number)).collect() };
            needs.sort_unstable_by(|a, b| b.cmp(a));
            needs.dedup();
            let all: Vec<String> = needs.iter().map(|need| format!("kernel/m-{need}.ko")).collect();
            lines.push_str(&format!("kernel/m-{number}.ko: {}\n", all.join(" ")));
            direct.push(needs);
        }
        let tree = Tree::new(&lines);
        let wanted: Vec<String> = wanted.iter().map(|index| format!("m_{}", index.index(direct.len()))).collect();
        let names = tree.names(&wanted.iter().map(String::as_str).collect::<Vec<_>>());

        let position: HashMap<&String, usize> = names.iter().enumerate().map(|(at, name)| (name, at)).collect();
        prop_assert_eq!(position.len(), names.len());
        for name in &wanted {
            prop_assert!(position.contains_key(name));
        }
        for (name, at) in &position {
            let number: usize = name.strip_prefix("m_").unwrap().parse().unwrap();
            for need in &direct[number] {
                let need = format!("m_{need}");
                prop_assert!(position[&need] < *at);
            }
        }
    }
}

#[test]
fn built_in_modules_count_as_present() {
    let tree = Tree::new("kernel/erofs.ko:\n");
    tree.index("builtin", "kernel/drivers/virtio/virtio-mmio.ko\n");
    assert_eq!(tree.names(&["virtio_mmio", "erofs"]), ["erofs"]);
}

#[test]
fn soft_dependencies_come_first_and_the_generic_one_suffices() {
    let tree = Tree::new(
        "kernel/erofs.ko: kernel/libcrc32c.ko\nkernel/libcrc32c.ko:\nkernel/crc32c-intel.ko:\nkernel/crc32c_generic.ko:\n",
    );
    tree.index("softdep", "# comment\nsoftdep libcrc32c pre: crc32c absent post: erofs\n");
    tree.index("alias", "# comment\nalias crc32c crc32c_intel\nalias crc32c crc32c_generic\n");
    assert_eq!(tree.names(&["erofs"]), ["crc32c_generic", "libcrc32c", "erofs"]);
}

#[test]
fn dependencies_in_a_circle_end() {
    let tree = Tree::new("kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\n");
    assert_eq!(tree.names(&["a"]), ["b", "a"]);
}

#[test]
fn a_missing_module_is_named_with_its_option() {
    let tree = Tree::new("kernel/a.ko: kernel/gone.ko\n");
    let error = modules::for_release(tree.root.path(), RELEASE, &["erofs"]).unwrap_err();
    assert!(error.to_string().contains("no module erofs") && error.to_string().contains("CONFIG_EROFS"), "{error}");
    let error = modules::for_release(tree.root.path(), RELEASE, &["a"]).unwrap_err();
    assert!(matches!(error, ImageError::MissingModule { name, .. } if name == "gone"));
}

#[test]
fn a_missing_release_is_named() {
    let error = modules::for_release(Path::new("/lib/modules"), "0.0.0-none", &[]).unwrap_err();
    assert!(error.to_string().contains("0.0.0-none") && error.to_string().contains("hint"), "{error}");
}

#[test]
fn compressed_modules_are_unpacked() {
    for (suffix, program, arguments, package) in [
        ("gz", "gzip", &["-k"][..], "gzip"),
        ("xz", "xz", &["-k", "--check=crc32"], "xz-utils"),
        ("zst", "zstd", &["-q", "-k"], "zstd"),
    ] {
        if crate::common::have(program, package) {
            let tree = Tree::new("kernel/a.ko:\n");
            let plain = tree.directory().join("kernel/a.ko");
            let content = [b"\x7fELF".to_vec(), vec![7; 300_000]].concat();
            fs::write(&plain, &content).unwrap();
            crate::common::succeed(Command::new(program).args(arguments).arg(&plain));
            fs::remove_file(&plain).unwrap();
            tree.index("dep", &format!("kernel/a.ko.{suffix}:\n"));
            let modules = modules::for_release(tree.root.path(), RELEASE, &["a"]).unwrap();
            assert!(modules == [("a".to_owned(), content)], "{suffix}");
        }
    }
}

#[test]
fn a_damaged_module_is_named() {
    for (name, content) in [("a.ko", "no ELF"), ("a.ko.gz", "junk"), ("a.ko.xz", "junk"), ("a.ko.zst", "junk")] {
        let tree = Tree::new(&format!("kernel/{name}:\n"));
        fs::write(tree.directory().join("kernel").join(name), content).unwrap();
        let error = modules::for_release(tree.root.path(), RELEASE, &["a"]).unwrap_err();
        assert!(matches!(&error, ImageError::Malformed { path, .. } if path.ends_with(name)), "{name}: {error}");
    }
}

#[test]
fn a_module_that_unpacks_to_too_much_is_refused() {
    if crate::common::have("gzip", "gzip") {
        let tree = Tree::new("kernel/a.ko:\n");
        let plain = tree.directory().join("kernel/a.ko");
        fs::File::create(&plain).unwrap().set_len((64 << 20) + 1).unwrap();
        crate::common::succeed(Command::new("gzip").arg("-1").arg(&plain));
        tree.index("dep", "kernel/a.ko.gz:\n");
        let error = modules::for_release(tree.root.path(), RELEASE, &["a"]).unwrap_err();
        assert!(matches!(error, ImageError::Limit { .. }), "{error}");
    }
}

/// Every kernel's modules on this host that can be a guest: what a guest needs is found.
#[test]
fn modules_of_installed_kernels_are_complete() {
    let root = std::env::var_os("MICROVM_TEST_MODULES").unwrap_or("/lib/modules".into());
    for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
        let release = entry.file_name().into_string().unwrap();
        if !entry.path().join("modules.dep").is_file() {
            continue;
        }
        let wanted = ["virtio_mmio", "virtio_blk", "erofs", "overlay", "vmw_vsock_virtio_transport", "virtio_rng"];
        let modules = modules::for_release(Path::new(&root), &release, &wanted).unwrap();
        println!("{release}: {:?}", modules.iter().map(|(name, _)| name).collect::<Vec<_>>());
    }
}
