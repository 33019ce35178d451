//! Kernel modules with their dependencies, for kernels that do not have everything built in.

use crate::ImageError;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest module, in bytes, before and after decompression.
const MAX_MODULE: u64 = 64 << 20;

/// The modules `wanted` and all they depend on, in load order: name and decompressed content. `root` is a
/// directory like `/lib/modules`, `release` what `uname -r` would print. "-" and "_" in names are the
/// same. Modules built into the kernel are left out. Soft dependencies (`modules.softdep`, "pre:") are
/// taken along where they exist.
///
/// # Errors
/// [`ImageError::NoModules`] without `modules.dep`; [`ImageError::MissingModule`] names one that is neither there
/// nor built in; [`ImageError::Io`], [`ImageError::Malformed`] and [`ImageError::Limit`] name a file.
pub fn for_release(root: &Path, release: &str, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>, ImageError> {
    let index = Index::read(root, release)?;
    let mut modules = Vec::new();
    for (name, path) in index.load_order(wanted, release)? {
        modules.push((name, read_module(&path)?));
    }
    Ok(modules)
}

/// A module that is a file.
struct Module {
    path: PathBuf,
    /// Names of the modules it needs, to be loaded from the last to the first.
    dependencies: Vec<String>,
}

/// What depmod wrote down about one kernel.
struct Index {
    modules: HashMap<String, Module>,
    builtin: HashSet<String>,
    /// Names or aliases that should be loaded before a module.
    soft: HashMap<String, Vec<String>>,
    /// Modules by alias; only aliases that soft dependencies use.
    aliases: HashMap<String, Vec<String>>,
}

impl Index {
    fn read(root: &Path, release: &str) -> Result<Index, ImageError> {
        let directory = root.join(release);
        let dependencies = match fs::read_to_string(directory.join("modules.dep")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::NoModules { release: release.to_owned(), root: root.to_owned() });
            }
            result => result.map_err(ImageError::io("read", &directory.join("modules.dep")))?,
        };
        let mut modules = HashMap::new();
        for line in dependencies.lines() {
            let Some((path, dependencies)) = line.split_once(':') else { continue };
            let dependencies = dependencies.split_whitespace().map(name_of_path).collect();
            modules.insert(name_of_path(path), Module { path: directory.join(path), dependencies });
        }
        let builtin = optional(&directory.join("modules.builtin"))?.lines().map(name_of_path).collect();
        let soft: HashMap<String, Vec<String>> =
            optional(&directory.join("modules.softdep"))?.lines().filter_map(soft_dependency).collect();
        let mut aliases: HashMap<String, Vec<String>> =
            soft.values().flatten().map(|alias| (alias.clone(), Vec::new())).collect();
        for line in optional(&directory.join("modules.alias"))?.lines() {
            let mut words = line.split_whitespace().skip(1);
            if let (Some(alias), Some(module)) = (words.next(), words.next())
                && let Some(modules) = aliases.get_mut(&normalize(alias))
            {
                modules.push(normalize(module));
            }
        }
        Ok(Index { modules, builtin, soft, aliases })
    }

    /// Depth first, without recursion, each module once and after all it depends on.
    fn load_order(&self, wanted: &[&str], release: &str) -> Result<Vec<(String, PathBuf)>, ImageError> {
        enum Task {
            Visit(String),
            Emit(String),
        }
        let mut order = Vec::new();
        let mut visited = HashSet::new();
        let mut tasks: Vec<Task> = wanted.iter().rev().map(|name| Task::Visit(normalize(name))).collect();
        while let Some(task) = tasks.pop() {
            match task {
                Task::Emit(name) => {
                    if let Some(module) = self.modules.get(&name) {
                        order.push((name, module.path.clone()));
                    }
                }
                Task::Visit(name) if visited.contains(&name) => {}
                Task::Visit(name) => {
                    let Some(module) = self.modules.get(&name) else {
                        if self.builtin.contains(&name) {
                            continue;
                        }
                        return Err(ImageError::MissingModule { name, release: release.to_owned() });
                    };
                    visited.insert(name.clone());
                    // The stack turns the order around: the last dependency is loaded first, and soft
                    // ones, which the module's own start needs, right before it.
                    let soft = self.soft_modules(&name);
                    tasks.push(Task::Emit(name));
                    tasks.extend(soft.into_iter().map(Task::Visit));
                    tasks.extend(module.dependencies.iter().cloned().map(Task::Visit));
                }
            }
        }
        Ok(order)
    }

    /// The modules that stand for the soft dependencies of `name`. Of several implementations of an
    /// algorithm only the generic one runs on every processor, so it alone is taken where there is one.
    fn soft_modules(&self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        for alias in self.soft.get(name).into_iter().flatten() {
            if self.modules.contains_key(alias) {
                found.push(alias.clone());
                continue;
            }
            let modules = self.aliases.get(alias).into_iter().flatten().filter(|name| self.modules.contains_key(*name));
            let modules: Vec<&String> = modules.collect();
            match modules.iter().find(|name| name.ends_with("_generic")) {
                Some(generic) => found.push((*generic).clone()),
                None => found.extend(modules.into_iter().cloned()),
            }
        }
        found
    }
}

/// A line like `softdep libcrc32c pre: crc32c post: other`.
fn soft_dependency(line: &str) -> Option<(String, Vec<String>)> {
    let mut words = line.strip_prefix("softdep ")?.split_whitespace();
    let name = normalize(words.next()?);
    let before = words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| *word != "post:");
    Some((name, before.map(normalize).collect()))
}

fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

/// `kernel/fs/erofs/erofs.ko.xz` is the module `erofs`.
fn name_of_path(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normalize(file.split(".ko").next().unwrap_or(file))
}

/// The text of a file that may be absent.
fn optional(path: &Path) -> Result<String, ImageError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result.map_err(ImageError::io("read", path)),
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>, ImageError> {
    let file = fs::File::open(path).map_err(ImageError::io("read", path))?;
    let malformed =
        |error: &dyn std::fmt::Display| ImageError::Malformed { path: path.to_owned(), reason: error.to_string() };
    let file = io::BufReader::new(file.take(MAX_MODULE));
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => bounded(path, file),
        Some("gz") => bounded(path, flate2::bufread::MultiGzDecoder::new(file)),
        Some("xz") => bounded(path, lzma_rust2::XzReader::new(file, true)),
        Some("zst") => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(file).map_err(|error| malformed(&error))?;
            bounded(path, decoder)
        }
        _ => Err(malformed(&"not a .ko, .ko.gz, .ko.xz or .ko.zst file")),
    }
}

/// Everything `reader` gives, if it is an ELF file of a size a module can have.
fn bounded(path: &Path, reader: impl Read) -> Result<Vec<u8>, ImageError> {
    let mut content = Vec::new();
    let malformed = |reason: String| ImageError::Malformed { path: path.to_owned(), reason };
    // One byte more than allowed tells "at the limit" from "over it".
    let result = reader.take(MAX_MODULE.saturating_add(1)).read_to_end(&mut content);
    result.map_err(|error| malformed(format!("it cannot be decompressed: {error}")))?;
    if content.len() as u64 > MAX_MODULE {
        let (value, limit) = (content.len() as u64, MAX_MODULE);
        return Err(ImageError::Limit { what: "size in bytes", path: Some(path.to_owned()), value, limit });
    }
    if !content.starts_with(b"\x7fELF") {
        return Err(malformed("it is no ELF file".to_owned()));
    }
    Ok(content)
}
