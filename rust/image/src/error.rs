//! Everything that can go wrong while an image is made.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why an image, a tree or an initial ramdisk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused something.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was tried: a verb, as in "cannot read /etc/shadow".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The image could not be written.
    #[error("cannot write the image: {source}{}", hint(source))]
    Write {
        /// The system's reason.
        source: io::Error,
    },
    /// A file changed between the moment it was listed and the moment it was copied.
    #[error("{} changed while it was packed ({what}); hint: try again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        what: &'static str,
    },
    /// A path that cannot be in an image.
    #[error("{} cannot be a path in an image: {reason}", path.display())]
    InvalidPath {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A number outside what the format or this crate allows.
    #[error("{what}{} is {value}, over the limit of {limit}", In(path))]
    Limit {
        /// What is too large, with its unit.
        what: &'static str,
        /// Where, if it is about one path.
        path: Option<PathBuf>,
        /// How large it is.
        value: u64,
        /// How large it may be.
        limit: u64,
    },
    /// A program that the image cannot do without is not on this host.
    #[error("no {name} found in {searched}; hint: {hint}")]
    MissingProgram {
        /// Its name or path.
        name: String,
        /// Where it was looked for.
        searched: String,
        /// What to do.
        hint: &'static str,
    },
    /// A file is not what it should be.
    #[error("{} is not usable: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is no such kernel's modules directory.
    #[error(
        "no modules for kernel {release} under {}; hint: install the kernel's package, or name the \
         directory that holds {release}/modules.dep",
        root.display()
    )]
    NoModules {
        /// The kernel's release, as `uname -r` would print it.
        release: String,
        /// Where modules were looked for.
        root: PathBuf,
    },
    /// A kernel module is neither built in nor in the modules directory.
    #[error(
        "kernel {release} has no module {name}; hint: a guest needs it, choose a kernel that has it \
         (CONFIG_{} is the likely option)",
        name.to_ascii_uppercase()
    )]
    MissingModule {
        /// The module's name.
        name: String,
        /// The kernel's release.
        release: String,
    },
    /// The cache directory cannot be named.
    #[error("no place for the image cache; hint: set MICROVM_CACHE, XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheDirectory,
    /// Another process held the lock of the same image for too long.
    #[error("another process has been building {} for {seconds} s; hint: end it, or remove that file", path.display())]
    Busy {
        /// The unfinished image, which is also the lock.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// The [`crate::Watch`] asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl ImageError {
    /// For `map_err`: names what was tried on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
        move |source| ImageError::Io { action, path: path.to_owned(), source }
    }

    /// For `ok_or_else` on arithmetic: an image that would not fit its own numbers.
    pub(crate) fn image_too_large() -> ImageError {
        ImageError::Limit {
            what: "size of the image in 4 KiB blocks",
            path: None,
            value: u64::MAX,
            limit: u64::from(u32::MAX),
        }
    }
}

/// " of /path", or nothing.
struct In<'a>(&'a Option<PathBuf>);

impl fmt::Display for In<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(path) => write!(formatter, " of {}", path.display()),
            None => Ok(()),
        }
    }
}

/// What a user can do about the system's reason, where that is clear.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; hint: make it readable for this user, or leave it out of the folder",
        io::ErrorKind::StorageFull => "; hint: make room, or set MICROVM_CACHE to a larger disk",
        io::ErrorKind::ReadOnlyFilesystem => "; hint: set MICROVM_CACHE to a writable directory",
        _ => "",
    }
}
