//! The tree of the default image: this host's Python, shell and tools, with their libraries.
//!
//! Everything is at the path it has on the host, reached through the same symbolic links, so paths that
//! are built into programs hold. Files belong to root and keep their modification times (compiled Python
//! files are only valid beside sources with their old times); directories carry the fixed time, so
//! that what else is installed beside a chosen file does not make another image.

mod collector;
mod elf;
mod ld_cache;
mod libraries;
mod python;
mod skeleton;

use crate::ImageError;
use crate::tree::{Metadata, Node, Timestamp, Tree};
use collector::Collector;
use libraries::Libraries;
use std::env;
use std::path::{Path, PathBuf};

/// Programs of the default image, where the host has them. The first one is required.
#[rustfmt::skip]
pub const DEFAULT_TOOLS: &[&str] = &[
    "sh", "bash", "[", "arch", "awk", "b2sum", "base32", "base64", "basename", "basenc", "bunzip2", "bzip2", "cat",
    "chgrp", "chmod", "chown", "chroot", "cksum", "clear", "cmp", "comm", "cp", "csplit", "cut", "date", "dd",
    "df", "diff", "dir", "dircolors", "dirname", "dmesg", "du", "echo", "egrep", "env", "expand", "expr", "factor",
    "false", "fgrep", "file", "find", "flock", "fmt", "fold", "free", "getconf", "getent", "getopt", "grep",
    "groups", "gunzip", "gzip", "head", "hexdump", "hostid", "hostname", "id", "install", "ip", "join", "kill",
    "ldconfig", "ldd", "less", "link", "ln", "locale", "logname", "ls", "lsblk", "mawk", "md5sum", "mkdir",
    "mkfifo", "mknod", "mktemp", "more", "mount", "mountpoint", "mv", "nice", "nl", "nohup", "nproc", "nsenter",
    "numfmt", "od", "paste", "pathchk", "pgrep", "pidof", "pkill", "pr", "printenv", "printf", "ps", "ptx", "pwd",
    "readlink", "realpath", "rev", "rm", "rmdir", "runcon", "sed", "seq", "setpriv", "setsid", "sha1sum",
    "sha224sum", "sha256sum", "sha384sum", "sha512sum", "shred", "shuf", "sleep", "sort", "split", "stat",
    "stdbuf", "strace", "stty", "sum", "sync", "sysctl", "tac", "tail", "tar", "taskset", "tee", "test", "timeout",
    "top", "touch", "tput", "tr", "true", "truncate", "tsort", "tty", "umount", "uname", "unexpand", "uniq",
    "unlink", "unshare", "unxz", "uptime", "users", "vdir", "vmstat", "watch", "wc", "which", "who", "whoami",
    "xargs", "xxd", "xz", "xzcat", "yes", "zcat", "zstd",
];

/// Where programs are looked for besides the caller's `PATH`.
const SYSTEM_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What of the host goes into the default image.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// The Python to take, if any.
    pub python: Option<Python>,
    /// Programs to take, by name, or by absolute path. Those the host does not have, or that
    /// this user may not read, are left out, but for "sh".
    pub tools: Vec<String>,
    /// Directories to look for programs in, after the system's own.
    pub search_path: Vec<PathBuf>,
    /// Directories to look for libraries in, before the system's own: what `LD_LIBRARY_PATH` says.
    pub library_path: Vec<PathBuf>,
}

/// A Python installation.
#[derive(Debug, Clone)]
pub struct Python {
    /// The interpreter: `sys._base_executable`. Symbolic links and virtual environments lead to the interpreter behind.
    pub executable: PathBuf,
    /// `sysconfig` paths `stdlib` and `platstdlib`, and where `lib-dynload` is if it is elsewhere.
    pub standard_library: Vec<PathBuf>,
    /// `sys.implementation.cache_tag`, as in `os.cpython-311.pyc`; compiled files of others stay out.
    pub cache_tag: String,
}

impl HostOptions {
    /// `python` with [`DEFAULT_TOOLS`], found through `PATH` and `LD_LIBRARY_PATH` of this process.
    pub fn new(python: Option<Python>) -> HostOptions {
        HostOptions {
            python,
            tools: DEFAULT_TOOLS.iter().map(|name| (*name).to_owned()).collect(),
            search_path: path_list("PATH"),
            library_path: path_list("LD_LIBRARY_PATH"),
        }
    }
}

/// The absolute paths of a variable.
fn path_list(variable: &str) -> Vec<PathBuf> {
    let value = env::var_os(variable).unwrap_or_default();
    env::split_paths(&value).filter(|path| path.is_absolute()).collect()
}

/// The tree of the default image. It examines files and reads the headers of programs and libraries; content is
/// read when the image is written.
///
/// # Errors
/// [`ImageError::MissingProgram`] without a shell or the named Python; [`ImageError::Malformed`] if a library
/// one of them needs is missing; [`ImageError::Io`] names what cannot be examined.
pub fn tree(options: &HostOptions) -> Result<Tree, ImageError> {
    let mut collector = Collector::new();
    skeleton::directories(&mut collector)?;
    let mut libraries = Libraries::new(&options.library_path)?;
    if let Some(python) = &options.python {
        python::add(python, &mut collector, &mut libraries)?;
    }
    add_tools(options, &mut collector, &mut libraries)?;
    libraries.add_plugins(&mut collector)?;
    skeleton::files(&mut collector, &libraries)?;
    Ok(collector.into_tree())
}

fn add_tools(options: &HostOptions, collector: &mut Collector, libraries: &mut Libraries) -> Result<(), ImageError> {
    let mut pending: Vec<(String, bool)> = options.tools.iter().map(|name| (name.clone(), name == "sh")).collect();
    // The system's own first: version managers put wrappers first in PATH, which are of no use in a guest.
    let mut directories: Vec<PathBuf> = SYSTEM_PATH.map(PathBuf::from).to_vec();
    directories.extend(options.search_path.iter().cloned());
    while let Some((name, required)) = pending.pop() {
        let Some(path) = directories.iter().map(|directory| directory.join(&name)).find(|path| is_program(path)) else {
            if required {
                let searched: Vec<String> = directories.iter().map(|path| path.display().to_string()).collect();
                let hint = "the default image needs a shell; or give a root folder with --rootfs";
                return Err(ImageError::MissingProgram { name, searched: searched.join(":"), hint });
            }
            continue;
        };
        if collector.add(&path)?.is_none() {
            continue;
        }
        if let Some(interpreter) = elf::interpreter_of_script(&path)? {
            // A script is worth what its interpreter is: that one is found like a tool.
            let known = collector.tree().get(&interpreter).is_some();
            if let Some(name) = interpreter.to_str().filter(|_| !known) {
                pending.push((name.to_owned(), false));
            }
        }
        let missing = libraries.add(&path, collector)?;
        if let Some(library) = missing.first().filter(|_| required) {
            let reason = format!("it needs the library {library}, which is not on this host");
            return Err(ImageError::Malformed { path, reason });
        }
    }
    Ok(())
}

/// Whether there is a program that this user may run, and read, which packing needs.
fn is_program(path: &Path) -> bool {
    let access = rustix::fs::Access::EXEC_OK | rustix::fs::Access::READ_OK;
    path.is_file() && rustix::fs::access(path, access).is_ok()
}

/// A node of root's with the fixed time, for what is made up or only leads somewhere.
fn fixed(node: Node) -> Node {
    let metadata = Metadata { uid: 0, gid: 0, modified: Timestamp::FIXED, ..node.metadata };
    Node { metadata, ..node }
}
