//! What every system has besides programs: mount points, users, names, terminals, time zone.

use super::collector::Collector;
use super::ld_cache;
use super::libraries::Libraries;
use crate::ImageError;
use std::path::Path;

/// Directories that may be symbolic links on the host; programs name them, so they stay what they are.
const ROOT_DIRECTORIES: [&str; 6] = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/usr/lib64"];

/// Empty directories with their modes.
const DIRECTORIES: [(&str, u16); 22] = [
    ("/dev", 0o755),
    ("/proc", 0o555),
    ("/sys", 0o555),
    ("/run", 0o755),
    ("/tmp", 0o1777),
    ("/root", 0o700),
    ("/home", 0o755),
    ("/mnt", 0o755),
    ("/media", 0o755),
    ("/opt", 0o755),
    ("/srv", 0o755),
    ("/boot", 0o755),
    ("/etc", 0o755),
    ("/usr/bin", 0o755),
    ("/usr/sbin", 0o755),
    ("/usr/local/bin", 0o755),
    ("/usr/local/sbin", 0o755),
    ("/var/cache", 0o755),
    ("/var/lib", 0o755),
    ("/var/log", 0o755),
    ("/var/spool", 0o755),
    ("/var/tmp", 0o1777),
];

/// Files that are the same in every image.
const FILES: [(&str, &str); 9] = [
    ("/etc/hostname", "microvm\n"),
    ("/etc/hosts", "127.0.0.1 localhost microvm\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("/etc/host.conf", "multi on\n"),
    ("/etc/resolv.conf", ""),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\n"),
    ("/etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("/etc/gshadow", "root:*::\ntty:*::\nnogroup:*::\n"),
    ("/etc/shadow", "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n"),
    ("/etc/fstab", ""),
];

/// Small files of the host that programs look for. Those it does not have are left out.
const HOST_FILES: [&str; 14] = [
    "/etc/ld.so.conf",
    "/etc/mime.types",
    "/etc/os-release",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/gai.conf",
    "/usr/lib/ssl/cert.pem",
    "/usr/lib/ssl/certs",
    "/usr/lib/ssl/openssl.cnf",
    "/usr/share/zoneinfo/UTC",
    "/usr/share/zoneinfo/Etc/UTC",
];

/// Descriptions of terminals, and where they can be.
const TERMINALS: [&str; 13] = [
    "ansi",
    "dumb",
    "linux",
    "rxvt",
    "rxvt-unicode-256color",
    "screen",
    "screen-256color",
    "tmux",
    "tmux-256color",
    "vt100",
    "vt220",
    "xterm",
    "xterm-256color",
];
const TERMINAL_DIRECTORIES: [&str; 3] = ["/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"];

/// Directories whose files all come along: the locale C.UTF-8, under the names distributions give it.
const LOCALES: [&str; 2] = ["/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8"];

/// Directories and links every path goes through. Comes first: the tree cannot insert below what is not there.
pub fn directories(collector: &mut Collector) -> Result<(), ImageError> {
    for path in ROOT_DIRECTORIES {
        collector.add(Path::new(path))?;
    }
    for (path, mode) in DIRECTORIES {
        collector.add(Path::new(path))?;
        // On some systems one of these is a link.
        if collector.tree().get(path).is_none_or(|node| node.is_directory()) {
            collector.tree_mut().add_directory(path, mode)?;
        }
    }
    Ok(())
}

/// Files; comes last, because it writes down which libraries there are.
pub fn files(collector: &mut Collector, libraries: &Libraries) -> Result<(), ImageError> {
    for path in HOST_FILES {
        collector.add(Path::new(path))?;
    }
    for terminal in TERMINALS {
        for directory in TERMINAL_DIRECTORIES {
            let folder = terminal.get(..1).unwrap_or_default();
            collector.add(&Path::new(directory).join(folder).join(terminal))?;
        }
    }
    for locale in LOCALES {
        add_all(Path::new(locale), collector)?;
    }
    let tree = collector.tree_mut();
    for (path, text) in FILES {
        let mode = if path.ends_with("shadow") { 0o640 } else { 0o644 };
        tree.add_file(path, mode, text.as_bytes())?;
    }
    let shell = if tree.get("/usr/bin/bash").is_some() || tree.get("/bin/bash").is_some() { "bash" } else { "sh" };
    let passwd =
        format!("root:x:0:0:root:/root:/bin/{shell}\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n");
    tree.add_file("/etc/passwd", 0o644, passwd.into_bytes())?;
    tree.add_file("/etc/ld.so.cache", 0o644, ld_cache::encode(libraries.by_name()))?;
    tree.add_symlink("/etc/mtab", "/proc/self/mounts")?;
    tree.add_symlink("/var/run", "/run")?;
    tree.add_symlink("/var/lock", "/run/lock")?;
    if tree.get("/usr/share/zoneinfo/UTC").is_some() {
        tree.add_symlink("/etc/localtime", "/usr/share/zoneinfo/UTC")?;
    }
    Ok(())
}

/// Takes a directory with everything below it, if the host has it.
fn add_all(directory: &Path, collector: &mut Collector) -> Result<(), ImageError> {
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        if collector.add(&directory)?.is_none() {
            continue;
        }
        let entries = std::fs::read_dir(&directory).map_err(ImageError::io("list", &directory))?;
        for entry in entries {
            let entry = entry.map_err(ImageError::io("list", &directory))?;
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(entry.path()),
                _ => {
                    collector.add(&entry.path())?;
                }
            }
        }
    }
    Ok(())
}
