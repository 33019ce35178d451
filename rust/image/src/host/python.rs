//! The host's Python: interpreter, standard library, compiled files, extension modules.

use super::Python;
use super::collector::Collector;
use super::fixed;
use super::libraries::Libraries;
use crate::ImageError;
use crate::scan;
use crate::tree::{Kind, Metadata, Node};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Directories that are left out wherever they are: tests, and packages that are not of the standard library.
const EXCLUDED_DIRECTORIES: [&str; 5] = ["test", "tests", "site-packages", "dist-packages", "_bundled"];
/// Directories of the standard library's top that are left out: what needs a screen.
const EXCLUDED_PACKAGES: [&str; 3] = ["idlelib", "turtledemo", "tkinter"];
/// Extension modules that are left out: test helpers, and the one that would bring the X11 libraries along.
const EXCLUDED_EXTENSIONS: [&str; 5] = ["_tkinter", "_test", "_ctypes_test", "_xxtestfuzz", "xxlimited"];
/// Beginning of the names of directories with what is needed to link against Python.
const LINK_DIRECTORY: &str = "config-";
/// Where a guest finds programs first; links to the interpreter go there, and where scripts look for it.
const LOCAL_BIN: &str = "/usr/local/bin";
const SYSTEM_LINK: &str = "/usr/bin/python3";

/// Takes `python` with its standard library, and makes it the guest's `python3`.
pub fn add(python: &Python, collector: &mut Collector, libraries: &mut Libraries) -> Result<(), ImageError> {
    let executable = interpreter(&python.executable)?;
    let missing = libraries.add(&executable, collector)?;
    if let Some(library) = missing.first() {
        let reason = format!("it needs the library {library}, which is not on this host");
        return Err(ImageError::Malformed { path: executable, reason });
    }
    for library in &python.standard_library {
        add_library(library, &executable, &python.cache_tag, collector, libraries)?;
    }
    add_links(&executable, collector)
}

/// The interpreter behind symbolic links and virtual environments.
fn interpreter(path: &Path) -> Result<PathBuf, ImageError> {
    let missing = |_| ImageError::MissingProgram {
        name: "Python interpreter".to_owned(),
        searched: path.display().to_string(),
        hint: "name the interpreter by its absolute path",
    };
    let mut real = fs::canonicalize(path).map_err(missing)?;
    // A virtual environment of copies: its configuration names the directory of the original.
    let configurations = real.ancestors().skip(1).take(2).map(|directory| directory.join("pyvenv.cfg"));
    if let Some(text) = configurations.into_iter().find_map(|path| fs::read_to_string(path).ok())
        && let Some(name) = real.file_name()
        && let Some(home) = text.lines().filter_map(|line| line.split_once('=')).find(|(key, _)| key.trim() == "home")
    {
        real = fs::canonicalize(Path::new(home.1.trim()).join(name)).map_err(missing)?;
    }
    Ok(real)
}

/// Takes a directory of the standard library.
fn add_library(
    root: &Path,
    executable: &Path,
    cache_tag: &str,
    collector: &mut Collector,
    libraries: &mut Libraries,
) -> Result<(), ImageError> {
    let Some(root) = collector.add(root)? else {
        let reason = "the standard library's directory is not there".to_owned();
        return Err(ImageError::Malformed { path: root.to_owned(), reason });
    };
    let mut extensions = Vec::new();
    let mut links = Vec::new();
    let mut pending = vec![root.clone()];
    while let Some(directory) = pending.pop() {
        let listing = list(&directory)?;
        let compiled = directory.ends_with("__pycache__");
        let sources = if compiled { sources_of(&directory)? } else { HashSet::new() };
        let status = fs::symlink_metadata(&directory).map_err(ImageError::io("examine", &directory))?;
        collector.tree_mut().insert(&directory, Node::directory(scan::permissions(&status)))?;
        for (name, status) in listing {
            let path = directory.join(&name);
            let text = name.to_string_lossy();
            if status.is_dir() {
                if !excluded_directory(&text, directory == root) {
                    pending.push(path);
                }
                continue;
            }
            let keep = if compiled { is_compiled(&text, cache_tag, &sources) } else { !excluded_file(&text) };
            if !keep {
                continue;
            }
            match scan::leaf(&path, &status)? {
                Some(kind @ Kind::File(_)) => {
                    let modified = scan::host_file(&path, &status).modified;
                    let metadata = Metadata { mode: scan::permissions(&status), uid: 0, gid: 0, modified };
                    collector.tree_mut().insert(&path, Node { metadata, kind })?;
                    if text.ends_with(".so") || text.contains(".so.") {
                        extensions.push(path);
                    }
                }
                // Debian links sitecustomize.py to /etc: such targets come along.
                Some(Kind::Symlink(_)) => links.push(path),
                _ => {}
            }
        }
    }
    for path in links {
        collector.add(&path)?;
    }
    // A module whose libraries are missing cannot be imported on the host either.
    for path in extensions {
        libraries.add_loaded_by(&path, Some(executable), collector)?;
    }
    Ok(())
}

fn list(directory: &Path) -> Result<Vec<(OsString, fs::Metadata)>, ImageError> {
    let mut listing = Vec::new();
    for entry in fs::read_dir(directory).map_err(ImageError::io("list", directory))? {
        let entry = entry.map_err(ImageError::io("list", directory))?;
        let status = entry.metadata().map_err(ImageError::io("examine", &entry.path()))?;
        listing.push((entry.file_name(), status));
    }
    Ok(listing)
}

fn excluded_directory(name: &str, top: bool) -> bool {
    EXCLUDED_DIRECTORIES.contains(&name)
        || (top && EXCLUDED_PACKAGES.contains(&name))
        || name.starts_with(LINK_DIRECTORY)
}

fn excluded_file(name: &str) -> bool {
    let extension = name.ends_with(".so") && EXCLUDED_EXTENSIONS.iter().any(|prefix| name.starts_with(prefix));
    extension || name.ends_with(".a") || name.ends_with(".o") || name.ends_with(".pyc")
}

/// Names of the modules beside a `__pycache__`.
fn sources_of(compiled: &Path) -> Result<HashSet<String>, ImageError> {
    let directory = compiled.parent().unwrap_or(compiled);
    let mut sources = HashSet::new();
    for entry in fs::read_dir(directory).map_err(ImageError::io("list", directory))? {
        let entry = entry.map_err(ImageError::io("list", directory))?;
        if let Some(stem) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".py")) {
            sources.insert(stem.to_owned());
        }
    }
    Ok(sources)
}

/// Whether this interpreter would load `name` for a module that is there. Those of `-O` are not kept.
fn is_compiled(name: &str, cache_tag: &str, sources: &HashSet<String>) -> bool {
    let stem = name.strip_suffix(".pyc").and_then(|name| name.strip_suffix(cache_tag));
    stem.and_then(|stem| stem.strip_suffix('.')).is_some_and(|stem| sources.contains(stem))
}

/// Makes the interpreter the one that `python3` means, and keeps the names it has beside itself.
fn add_links(executable: &Path, collector: &mut Collector) -> Result<(), ImageError> {
    let version = executable.file_name().map(OsString::from).unwrap_or_default();
    let names = ["python3".into(), "python".into(), version];
    for name in &names {
        let beside = executable.with_file_name(name);
        if fs::canonicalize(&beside).is_ok_and(|real| real == executable) {
            collector.add(&beside)?;
        }
        let local = Path::new(LOCAL_BIN).join(name);
        if local != executable {
            link(&local, executable, collector)?;
        }
    }
    if collector.tree().get(SYSTEM_LINK).is_none() {
        link(Path::new(SYSTEM_LINK), executable, collector)?;
    }
    Ok(())
}

fn link(path: &Path, executable: &Path, collector: &mut Collector) -> Result<(), ImageError> {
    let target = executable.as_os_str().as_bytes().to_vec();
    collector.tree_mut().insert(path, fixed(Node::symlink(target)))
}
