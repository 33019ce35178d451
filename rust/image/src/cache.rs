//! Images by content: each is built once and then found by its key.
//!
//! The key is a SHA-256 over the writer's version and, for every node, its path and attributes, and for
//! content on the host its path, size, inode, modification and status change times. It takes one `lstat`
//! per file and no reading. The change time is in it because a file can be rewritten with its size and
//! old modification time kept (archives unpacked with normalized times do that), and serving the wrong
//! image would be worse than building one again.

use crate::tree::{Content, Kind, Node, Timestamp, Tree};
use crate::{HostOptions, ImageError, Progress, Stage, Watch, erofs, host};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, Timestamps};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// How long another process may hold the same image's lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// How often a held lock is tried again.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);
/// Images unused for this long go when another one is built.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

/// The image of the host's userland, built if there is none yet.
///
/// # Errors
/// Those of [`host::tree`], [`Cache::from_environment`] and [`Cache::image`].
pub fn default_image(options: &HostOptions, watch: Watch<'_>) -> Result<PathBuf, ImageError> {
    Cache::from_environment()?.image(&host::tree(options)?, watch)
}

/// The image of the folder at `path`, built if there is none of its present content yet.
///
/// # Errors
/// Those of [`Tree::from_directory`], [`Cache::from_environment`] and [`Cache::image`].
pub fn from_directory(path: impl AsRef<Path>, watch: Watch<'_>) -> Result<PathBuf, ImageError> {
    Cache::from_environment()?.image(&Tree::from_directory(path)?, watch)
}

/// A directory of images.
#[derive(Debug, Clone)]
pub struct Cache {
    images: PathBuf,
}

impl Cache {
    /// The user's: `$MICROVM_CACHE/images`, `$XDG_CACHE_HOME/microvm/images` or `~/.cache/microvm/images`.
    ///
    /// # Errors
    /// [`ImageError::NoCacheDirectory`] if none of the variables holds an absolute path.
    pub fn from_environment() -> Result<Cache, ImageError> {
        let absolute = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        let directory = absolute("MICROVM_CACHE")
            .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("microvm")))
            .or_else(|| absolute("HOME").map(|path| path.join(".cache/microvm")));
        directory.map(Cache::at).ok_or(ImageError::NoCacheDirectory)
    }

    /// The one in `directory`, in its folder `images`. It is made when the first image is built.
    pub fn at(directory: impl AsRef<Path>) -> Cache {
        Cache { images: directory.as_ref().join("images") }
    }

    /// The image of `tree`. If there is none it is written beside its place, synced, made read-only and
    /// renamed, while a lock keeps other processes from doing the same; they wait for it.
    ///
    /// # Errors
    /// Those of [`erofs::write`]; [`ImageError::Io`] names what of the cache is not usable;
    /// [`ImageError::Busy`] after ten minutes of waiting; [`ImageError::Cancelled`] if `watch` says so.
    pub fn image(&self, tree: &Tree, watch: Watch<'_>) -> Result<PathBuf, ImageError> {
        let key = key(tree)?;
        let image = self.images.join(format!("{key}.erofs"));
        if use_existing(&image) {
            return Ok(image);
        }
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.images).map_err(ImageError::io("create", &self.images))?;
        let partial = self.images.join(format!("{key}.partial"));
        let Some(file) = lock(&partial, &image, watch)? else { return Ok(image) };
        let result = build(tree, file, &partial, &image, watch);
        if result.is_err() {
            // Best effort: what stays is overwritten by the next build.
            let _ = fs::remove_file(&partial);
        }
        result?;
        self.remove_unused();
        Ok(image)
    }

    /// Removes images and leftovers that nobody used for a month. Machines that run from one keep it open.
    /// Best effort: a file that cannot be removed costs only room.
    fn remove_unused(&self) {
        for entry in fs::read_dir(&self.images).into_iter().flatten().flatten() {
            let Ok(modified) = entry.metadata().and_then(|status| status.modified()) else { continue };
            let age = SystemTime::now().duration_since(modified).unwrap_or(Duration::ZERO);
            let ours = matches!(entry.path().extension(), Some(end) if end == "erofs" || end == "partial");
            if ours && age > UNUSED {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Whether `image` is there; notes that it was used.
fn use_existing(image: &Path) -> bool {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    match rustix::fs::utimensat(rustix::fs::CWD, image, &times, AtFlags::empty()) {
        Ok(()) => true,
        // Perhaps a cache on a read-only disk, or another user's.
        Err(_) => image.is_file(),
    }
}

/// The unfinished image, locked; `None` if the finished one is there by now.
fn lock(partial: &Path, image: &Path, watch: Watch<'_>) -> Result<Option<File>, ImageError> {
    let begin = Instant::now();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        let opened = rustix::fs::open(partial, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from);
        let file = File::from(opened.map_err(ImageError::io("create", partial))?);
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if !is_at(&file, partial) => {
                // The one before us renamed or removed the file we opened.
                if use_existing(image) {
                    return Ok(None);
                }
            }
            Ok(()) if use_existing(image) => {
                // We made a new file after the image was finished. It is ours to remove, we hold its lock.
                let _ = fs::remove_file(partial);
                return Ok(None);
            }
            Ok(()) => return Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                let progress = Progress { stage: Stage::Waiting, files: 0, files_total: 0, bytes: 0, bytes_total: 0 };
                if watch(progress).is_break() {
                    return Err(ImageError::Cancelled);
                }
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(error) => return Err(ImageError::io("lock", partial)(error.into())),
        }
        if begin.elapsed() > LOCK_PATIENCE {
            return Err(ImageError::Busy { path: partial.to_owned(), seconds: LOCK_PATIENCE.as_secs() });
        }
    }
}

/// Whether `path` still names the open `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn build(tree: &Tree, mut file: File, partial: &Path, image: &Path, watch: Watch<'_>) -> Result<(), ImageError> {
    file.set_len(0).map_err(ImageError::io("truncate", partial))?;
    let mut last = Progress { stage: Stage::Packing, files: 0, files_total: 0, bytes: 0, bytes_total: 0 };
    erofs::write(tree, &mut file, &mut |progress| {
        last = progress;
        watch(progress)
    })?;
    if watch(Progress { stage: Stage::Syncing, ..last }).is_break() {
        return Err(ImageError::Cancelled);
    }
    // Before the rename: after a power failure a name must not stand for half an image.
    file.sync_data().map_err(ImageError::io("write", partial))?;
    file.set_permissions(Permissions::from_mode(0o400)).map_err(ImageError::io("change the mode of", partial))?;
    fs::rename(partial, image).map_err(ImageError::io("rename", partial))
}

/// The name of the image of `tree`, in hexadecimal.
fn key(tree: &Tree) -> Result<String, ImageError> {
    let mut manifest = Manifest { bytes: Vec::new(), hash: Sha256::new() };
    let mut links: HashMap<*const Node, u64> = HashMap::new();
    manifest.number(u64::from(erofs::WRITER_VERSION));
    tree.walk(|path, node| {
        manifest.text(path);
        manifest.node(node);
        if Arc::strong_count(node) > 1 && !node.is_directory() {
            // Which names are one file.
            let next = links.len() as u64;
            let group = *links.entry(Arc::as_ptr(node)).or_insert(next);
            manifest.number(group);
        }
        manifest.flush_if_full();
        Ok::<(), ImageError>(())
    })?;
    manifest.hash.update(&manifest.bytes);
    Ok(manifest.hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// Feeds a hash with fields that cannot run into each other.
struct Manifest {
    bytes: Vec<u8>,
    hash: Sha256,
}

impl Manifest {
    fn number(&mut self, number: u64) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    fn text(&mut self, text: &[u8]) {
        self.number(text.len() as u64);
        self.bytes.extend_from_slice(text);
    }

    fn time(&mut self, time: Timestamp) {
        self.number(time.seconds as u64);
        self.number(u64::from(time.nanoseconds));
    }

    fn node(&mut self, node: &Node) {
        let metadata = &node.metadata;
        self.number(u64::from(metadata.mode));
        self.number(u64::from(metadata.uid));
        self.number(u64::from(metadata.gid));
        self.time(metadata.modified);
        match &node.kind {
            Kind::Directory(_) => self.bytes.push(b'd'),
            Kind::Fifo => self.bytes.push(b'p'),
            Kind::Symlink(target) => {
                self.bytes.push(b'l');
                self.text(target);
            }
            Kind::CharacterDevice(number) | Kind::BlockDevice(number) => {
                self.bytes.push(if matches!(node.kind, Kind::BlockDevice(_)) { b'b' } else { b'c' });
                self.number(u64::from(number.major));
                self.number(u64::from(number.minor));
            }
            Kind::File(Content::Bytes(bytes)) => {
                self.bytes.push(b'm');
                self.text(bytes);
            }
            Kind::File(Content::Host(file)) => {
                self.bytes.push(b'f');
                self.text(file.path.as_os_str().as_bytes());
                self.number(file.size);
                self.number(file.inode);
                self.time(file.modified);
                self.time(file.changed);
            }
        }
    }

    fn flush_if_full(&mut self) {
        if self.bytes.len() >= 1 << 16 {
            self.hash.update(&self.bytes);
            self.bytes.clear();
        }
    }
}
