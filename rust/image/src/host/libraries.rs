//! Which shared libraries a program loads, found the way the dynamic loader (ld.so(8)) finds them.

use super::collector::Collector;
use super::elf::{self, Dynamic};
use crate::ImageError;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Directories every loader on x86-64 knows: Debian's, then those of others.
const DEFAULT_DIRECTORIES: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
/// What `$LIB` can stand for.
const LIB_NAMES: [&str; 3] = ["lib/x86_64-linux-gnu", "lib64", "lib"];
/// Libraries that programs load by name at run time: name services, and what `pthread_cancel` needs.
const PLUGINS: [&str; 5] =
    ["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2", "libgcc_s.so.1", "libpthread.so.0"];
/// Configuration files that include each other, at most this deep.
const MAX_INCLUDES: usize = 8;

/// Finds libraries and takes them into a [`Collector`].
pub struct Libraries {
    /// `LD_LIBRARY_PATH`, then `/etc/ld.so.conf`, then the defaults; with the first two apart for `DT_RUNPATH`,
    /// which comes between them.
    preferred: Vec<PathBuf>,
    system: Vec<PathBuf>,
    /// What each path examined so far needs; `None` also if nothing is there.
    examined: HashMap<PathBuf, Option<Rc<Dynamic>>>,
    /// Files taken, with the inherited directories they were searched with.
    taken: HashSet<(PathBuf, Vec<PathBuf>)>,
    /// Libraries found in directories that are not named in the programs, by name.
    by_name: BTreeMap<String, PathBuf>,
}

/// A program or library whose libraries are still to be found.
struct Pending {
    path: PathBuf,
    /// Directories of `DT_RPATH` of what loads it.
    inherited: Vec<PathBuf>,
}

impl Libraries {
    /// `library_path` comes before the system's directories.
    pub fn new(library_path: &[PathBuf]) -> Result<Libraries, ImageError> {
        let mut system = Vec::new();
        read_configuration(Path::new("/etc/ld.so.conf"), &mut system, 0)?;
        system.extend(DEFAULT_DIRECTORIES.map(PathBuf::from));
        Ok(Libraries {
            preferred: library_path.to_vec(),
            system,
            examined: HashMap::new(),
            taken: HashSet::new(),
            by_name: BTreeMap::new(),
        })
    }

    /// Takes what the file at `path` needs to run (nothing, if it is no program); `path` itself is taken too.
    /// Gives the names of libraries that are nowhere.
    pub fn add(&mut self, path: &Path, collector: &mut Collector) -> Result<Vec<String>, ImageError> {
        self.add_loaded_by(path, None, collector)
    }

    /// As [`Libraries::add`] for a file that `loader` loads at run time: it inherits the loader's `DT_RPATH`.
    pub fn add_loaded_by(
        &mut self,
        path: &Path,
        loader: Option<&Path>,
        collector: &mut Collector,
    ) -> Result<Vec<String>, ImageError> {
        let inherited = match loader {
            Some(loader) => match self.examine(loader)? {
                Some(dynamic) => own_directories(loader, dynamic.rpath.as_deref()),
                None => Vec::new(),
            },
            None => Vec::new(),
        };
        let mut pending = vec![Pending { path: path.to_owned(), inherited }];
        let mut missing = Vec::new();
        while let Some(file) = pending.pop() {
            if collector.add(&file.path)?.is_none() || !self.taken.insert((file.path.clone(), file.inherited.clone())) {
                continue;
            }
            let Some(dynamic) = self.examine(&file.path)? else { continue };
            if let Some(interpreter) = &dynamic.interpreter {
                pending.push(Pending { path: interpreter.clone(), inherited: Vec::new() });
            }
            // A file with DT_RUNPATH neither uses DT_RPATH nor what it would inherit, but passes both on.
            let mut rpath = own_directories(&file.path, dynamic.rpath.as_deref());
            rpath.extend(file.inherited.iter().cloned());
            let runpath = own_directories(&file.path, dynamic.runpath.as_deref());
            for name in &dynamic.needed {
                let before: &[PathBuf] = if dynamic.runpath.is_some() { &[] } else { &rpath };
                match self.find(name, before, &runpath)? {
                    Some(path) => pending.push(Pending { path, inherited: rpath.clone() }),
                    None => missing.push(name.clone()),
                }
            }
        }
        Ok(missing)
    }

    /// Takes what is loaded by name at run time, where the host has it.
    pub fn add_plugins(&mut self, collector: &mut Collector) -> Result<(), ImageError> {
        for name in PLUGINS {
            if let Some(path) = self.find(name, &[], &[])? {
                self.add(&path, collector)?;
            }
        }
        Ok(())
    }

    /// Libraries that no program says the directory of, by name: what the loader's cache is for.
    pub fn by_name(&self) -> &BTreeMap<String, PathBuf> {
        &self.by_name
    }

    fn find(&mut self, name: &str, rpath: &[PathBuf], runpath: &[PathBuf]) -> Result<Option<PathBuf>, ImageError> {
        if name.contains('/') {
            let path = PathBuf::from(name);
            return Ok(if path.is_absolute() && self.is_library(&path)? { Some(path) } else { None });
        }
        if let Some(path) = self.first(name, rpath)? {
            return Ok(Some(path));
        }
        let preferred = self.preferred.clone();
        if let Some(path) = self.first(name, &preferred)? {
            self.by_name.insert(name.to_owned(), path.clone());
            return Ok(Some(path));
        }
        if let Some(path) = self.first(name, runpath)? {
            return Ok(Some(path));
        }
        if let Some(path) = self.by_name.get(name) {
            return Ok(Some(path.clone()));
        }
        let system = self.system.clone();
        let found = self.first(name, &system)?;
        if let Some(path) = &found {
            self.by_name.insert(name.to_owned(), path.clone());
        }
        Ok(found)
    }

    fn first(&mut self, name: &str, directories: &[PathBuf]) -> Result<Option<PathBuf>, ImageError> {
        for directory in directories {
            let path = directory.join(name);
            if self.is_library(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Whether the loader would take the file at `path`: a library of another architecture it passes by.
    fn is_library(&mut self, path: &Path) -> Result<bool, ImageError> {
        Ok(self.examine(path)?.is_some())
    }

    fn examine(&mut self, path: &Path) -> Result<Option<Rc<Dynamic>>, ImageError> {
        if let Some(dynamic) = self.examined.get(path) {
            return Ok(dynamic.clone());
        }
        let dynamic = if path.is_file() { elf::read(path)?.map(Rc::new) } else { None };
        self.examined.insert(path.to_owned(), dynamic.clone());
        Ok(dynamic)
    }
}

/// The directories of a `DT_RPATH` or `DT_RUNPATH` of the file at `path`.
fn own_directories(path: &Path, list: Option<&str>) -> Vec<PathBuf> {
    let Some(list) = list else { return Vec::new() };
    let mut origins: Vec<PathBuf> = path.parent().map(Path::to_owned).into_iter().collect();
    // The loader takes the path it loaded a library by; for a program the one without symbolic links.
    if list.contains("ORIGIN")
        && let Ok(real) = fs::canonicalize(path)
    {
        origins.extend(real.parent().map(Path::to_owned));
    }
    let mut directories = Vec::new();
    for entry in list.split(':') {
        for origin in &origins {
            let entry = replace_token(entry, "ORIGIN", &origin.to_string_lossy());
            let entry = replace_token(&entry, "PLATFORM", "x86_64");
            for lib in LIB_NAMES {
                let directory = PathBuf::from(replace_token(&entry, "LIB", lib));
                if directory.is_absolute() && !directories.contains(&directory) {
                    directories.push(directory);
                }
            }
        }
    }
    directories
}

/// `$TOKEN` and `${TOKEN}` mean the same.
fn replace_token(text: &str, token: &str, value: &str) -> String {
    text.replace(&format!("${{{token}}}"), value).replace(&format!("${token}"), value)
}

/// The directories in a file like `/etc/ld.so.conf`; a file that is not there has none.
fn read_configuration(path: &Path, directories: &mut Vec<PathBuf>, depth: usize) -> Result<(), ImageError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.map_err(ImageError::io("read", path))?,
    };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(patterns) = line.strip_prefix("include ").filter(|_| depth < MAX_INCLUDES) {
            for pattern in patterns.split_whitespace() {
                for file in matching_files(&path.with_file_name(""), pattern) {
                    read_configuration(&file, directories, depth.saturating_add(1))?;
                }
            }
        } else if line.starts_with('/') {
            directories.push(PathBuf::from(line));
        }
    }
    Ok(())
}

/// Files for a pattern with at most one "*", in its last part: all that is found in these files in practice.
fn matching_files(base: &Path, pattern: &str) -> Vec<PathBuf> {
    let pattern = base.join(pattern);
    let name = pattern.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((start, end)) = name.split_once('*') else { return vec![pattern] };
    let entries = pattern.parent().and_then(|directory| fs::read_dir(directory).ok());
    let names = entries.into_iter().flatten().flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        !name.starts_with('.') && name.starts_with(start) && name.ends_with(end)
    });
    let mut files: Vec<PathBuf> = names.map(|entry| entry.path()).collect();
    files.sort();
    files
}
