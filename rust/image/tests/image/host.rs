//! The default image of the host these tests run on.

use crate::common::{check, extract, have, python};
use microvm_image::host::{DEFAULT_TOOLS, Python};
use microvm_image::tree::{Content, Kind, Node, Timestamp};
use microvm_image::{HostOptions, ImageError, Tree, erofs, host, silent};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Output};

const GUEST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn default_tree() -> Tree {
    host::tree(&HostOptions::new(python::installed())).unwrap()
}

/// Follows symbolic links as a guest would.
fn resolve<'a>(tree: &'a Tree, path: &Path) -> Option<&'a Node> {
    let mut at = PathBuf::from("/");
    let mut pending: Vec<PathBuf> = vec![path.to_owned()];
    for _ in 0..200 {
        let Some(next) = pending.pop() else { return tree.get(&at) };
        for component in next.components() {
            match component {
                Component::RootDir => at = PathBuf::from("/"),
                Component::ParentDir => drop(at.pop()),
                Component::CurDir | Component::Prefix(_) => {}
                Component::Normal(name) => {
                    if let Some(Node { kind: Kind::Symlink(target), .. }) = tree.get(at.join(name)) {
                        let rest = next.components().skip_while(|other| *other != component).skip(1);
                        pending.push(rest.collect());
                        pending.push(PathBuf::from(OsStr::from_bytes(target)));
                        break;
                    }
                    at.push(name);
                }
            }
        }
    }
    None
}

/// Runs a command inside the unpacked image.
fn inside(root: &Path, command: &[&str]) -> Output {
    let mut chroot = Command::new("chroot");
    chroot.arg(root).args(command).env_clear().env("PATH", GUEST_PATH).env("LC_ALL", "C.UTF-8");
    crate::common::succeed(&mut chroot)
}

#[test]
fn every_library_a_program_names_is_in_the_image() {
    let tree = default_tree();
    let mut names: HashSet<String> = HashSet::new();
    let mut wanted: Vec<(String, String)> = Vec::new();
    tree.walk(|path, node| {
        let path = String::from_utf8_lossy(path).into_owned();
        let found = resolve(&tree, Path::new(&path));
        if found.is_some_and(|node| matches!(node.kind, Kind::File(_))) {
            names.insert(path.rsplit('/').next().unwrap().to_owned());
        }
        if let Kind::File(Content::Host(file)) = &node.kind {
            let bytes = fs::read(&file.path).unwrap();
            if bytes.starts_with(b"\x7fELF") {
                let elf = goblin::elf::Elf::parse(&bytes).unwrap();
                wanted.extend(elf.libraries.iter().map(|name| (path.clone(), (*name).to_owned())));
                if let Some(interpreter) = elf.interpreter {
                    assert!(resolve(&tree, Path::new(interpreter)).is_some(), "{path} needs {interpreter}");
                }
            }
        }
        Ok::<(), ()>(())
    })
    .unwrap();
    assert!(wanted.len() > 20, "programs were found");
    for (path, name) in wanted {
        assert!(names.contains(&name), "{path} needs {name}");
    }
}

#[test]
fn everything_is_owned_by_root_and_every_link_of_a_program_leads_somewhere() {
    let tree = default_tree();
    tree.walk(|path, node| {
        let path = Path::new(OsStr::from_bytes(path));
        assert_eq!((node.metadata.uid, node.metadata.gid), (0, 0), "{}", path.display());
        if path.starts_with("/usr/bin") || path.starts_with("/usr/local/bin") {
            assert!(resolve(&tree, path).is_some(), "{} leads nowhere", path.display());
        }
        if node.is_directory() {
            assert_eq!(node.metadata.modified, Timestamp::FIXED, "{}", path.display());
        }
        Ok::<(), ()>(())
    })
    .unwrap();
    for path in ["/bin/sh", "/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/home", "/var/tmp", "/mnt"] {
        assert!(resolve(&tree, Path::new(path)).is_some(), "{path}");
    }
    for directory in ["/bin", "/sbin", "/lib", "/lib64"] {
        let link = fs::read_link(directory).ok().map(|target| Kind::Symlink(target.as_os_str().as_bytes().to_vec()));
        if let Some(link) = link {
            assert_eq!(tree.get(directory).unwrap().kind, link, "{directory} is what it is on the host");
        }
    }
}

#[test]
fn compiled_python_files_come_with_their_sources_and_times() {
    let Some(python) = python::installed() else { return };
    let tree = host::tree(&HostOptions::new(Some(python.clone()))).unwrap();
    let suffix = format!(".{}.pyc", python.cache_tag);
    let mut compiled = 0;
    tree.walk(|path, node| {
        let path = PathBuf::from(OsStr::from_bytes(path));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let excluded = ["site-packages", "dist-packages", "idlelib", "turtledemo", "test", "tests", "_bundled"];
        let library = &python.standard_library[0];
        if let Ok(inside) = path.strip_prefix(library) {
            let bad = inside.components().find(|part| excluded.iter().any(|name| part.as_os_str() == *name));
            assert_eq!(bad, None, "{}", path.display());
        }
        if name.ends_with(".pyc") {
            let stem = name.strip_suffix(&suffix).unwrap_or_else(|| panic!("{} is of this Python", path.display()));
            let source = path.parent().unwrap().with_file_name(format!("{stem}.py"));
            let source = tree.get(&source).unwrap_or_else(|| panic!("{} has its source", path.display()));
            let Kind::File(Content::Host(file)) = &source.kind else { panic!("a source is a file") };
            assert_eq!(source.metadata.modified, file.modified);
            let Kind::File(Content::Host(compiled_file)) = &node.kind else { panic!("a file") };
            // PEP 552: flags of zero mean that time and size of the source are in the header.
            let header = fs::read(&compiled_file.path).unwrap();
            if header[4..8] == [0; 4] {
                assert_eq!(
                    header[8..12],
                    (source.metadata.modified.seconds as u32).to_le_bytes(),
                    "{}",
                    path.display()
                );
            }
            compiled += 1;
        }
        Ok::<(), ()>(())
    })
    .unwrap();
    println!("{compiled} compiled files");
}

/// What fsck.erofs unpacks runs: needs root, for chroot.
#[test]
fn the_default_image_runs_in_a_changed_root() {
    if !have("fsck.erofs", "erofs-utils") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (image, root) = (directory.path().join("image"), directory.path().join("root"));
    erofs::write(&default_tree(), &mut File::create_new(&image).unwrap(), &mut silent).unwrap();
    check(&image);
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: chroot needs root");
        return;
    }
    extract(&image, &root);

    inside(&root, &["/bin/sh", "-c", "echo hello | sed s/hello/hi/ | grep -q hi && ls -l / && awk 'BEGIN {}' && env"]);
    let mut broken = Vec::new();
    for name in fs::read_dir(root.join("usr/bin")).unwrap() {
        let name = format!("/usr/bin/{}", name.unwrap().file_name().into_string().unwrap());
        let output = Command::new("chroot").arg(&root).args(["ldd", &name]).env("PATH", GUEST_PATH).output().unwrap();
        if String::from_utf8_lossy(&output.stdout).contains("not found") {
            broken.push(name);
        }
    }
    assert!(broken.is_empty(), "libraries are missing for {broken:?}");
    if let Some(python) = python::installed() {
        let program = "import asyncio, bz2, ctypes, decimal, hashlib, json, lzma, multiprocessing, sqlite3, ssl, \
                       subprocess, sys, zlib, zoneinfo; zoneinfo.ZoneInfo('UTC'); print(sys.implementation.cache_tag)";
        let output = inside(&root, &["python3", "-c", program]);
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), python.cache_tag);
    }
    // The loader's own tool can read the cache we wrote.
    let output = inside(&root, &["ldconfig", "-p"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("libc.so.6 (libc6,x86-64) => /"));
}

#[test]
fn the_tree_of_the_host_is_the_same_every_time() {
    assert_eq!(default_tree(), default_tree());
}

#[test]
fn tools_that_are_missing_are_left_out_but_a_shell_must_be_there() {
    let mut options = HostOptions::new(None);
    options.tools = vec!["sh".to_owned(), "surely-not-a-program".to_owned()];
    let tree = host::tree(&options).unwrap();
    assert!(resolve(&tree, Path::new("/bin/sh")).is_some());
    assert!(tree.get("/usr/bin/env").is_none());
    assert!(DEFAULT_TOOLS.is_sorted_by_key(|name| *name != "sh"), "the shell comes first");
}

#[test]
fn tools_by_path_and_their_interpreters_come_along() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    fs::write(&script, "#!/usr/bin/env sed\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    symlink(&script, directory.path().join("link-to-script")).unwrap();
    let mut options = HostOptions::new(None);
    options.tools = vec!["link-to-script".to_owned()];
    options.search_path = vec![directory.path().to_owned()];
    let tree = host::tree(&options).unwrap();
    assert!(tree.get(&script).is_some() && tree.get(directory.path().join("link-to-script")).is_some());
    assert!(resolve(&tree, Path::new("/usr/bin/sed")).or(resolve(&tree, Path::new("/bin/sed"))).is_some());
}

#[test]
fn a_virtual_environment_leads_to_the_python_behind() {
    let Some(python) = python::installed() else { return };
    let directory = tempfile::tempdir().unwrap();
    let name = python.executable.file_name().unwrap();
    fs::create_dir(directory.path().join("bin")).unwrap();
    let copy = directory.path().join("bin").join(name);
    fs::copy(&python.executable, &copy).unwrap();
    let home = python.executable.parent().unwrap().display().to_string();
    fs::write(directory.path().join("pyvenv.cfg"), format!("home = {home}\nversion = 3\n")).unwrap();
    let real = fs::canonicalize(&python.executable).unwrap();

    let tree = host::tree(&HostOptions::new(Some(Python { executable: copy.clone(), ..python }))).unwrap();

    assert!(tree.get(&copy).is_none());
    let wanted = tree.get(&real).unwrap();
    assert_eq!(resolve(&tree, Path::new("/usr/local/bin/python3")), Some(wanted));
}

#[test]
fn a_python_that_is_not_there_is_named() {
    let python = Python {
        executable: PathBuf::from("/nowhere/python3"),
        standard_library: Vec::new(),
        cache_tag: "cpython-311".to_owned(),
    };
    let error = host::tree(&HostOptions::new(Some(python))).unwrap_err();
    assert!(matches!(error, ImageError::MissingProgram { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/python3"), "{error}");
}
