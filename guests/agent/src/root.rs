//! The root file system: a read-only image under a writable overlay in memory.

use crate::boot::BootError;
use crate::{modules, mounts};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::time::{Duration, Instant};

/// How long the disk may take to appear. Built-in drivers have found it before PID 1 runs.
const DISK_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks.
const DISK_POLL: Duration = Duration::from_millis(1);

const IMAGE: &str = "/image";
const WRITABLE: &str = "/writable";
const MERGED: &str = "/merged";

/// Where the root file system is, as the kernel command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// `microvm.root=initramfs`: stay where we are.
    Initramfs,
    /// `microvm.root=DEVICE microvm.rootfstype=KIND`; the defaults are `/dev/vda` and `erofs`.
    Disk {
        /// Device node.
        device: String,
        /// Name of the file system, as in /proc/filesystems. Stated, never guessed.
        kind: String,
    },
}

impl Root {
    /// Reads the words of a kernel command line; the last of each kind counts.
    pub fn from_command_line(line: &str) -> Root {
        let word = |name: &str| {
            let mut values = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(name));
            values.next_back().filter(|value| !value.is_empty())
        };
        match word("microvm.root=") {
            Some("initramfs") => Root::Initramfs,
            device => Root::Disk {
                device: device.unwrap_or("/dev/vda").to_owned(),
                kind: word("microvm.rootfstype=").unwrap_or("erofs").to_owned(),
            },
        }
    }
}

/// The initramfs after it was left: what it still holds is memory.
#[derive(Debug)]
pub struct Left(OwnedFd);

/// Mounts the disk, puts a writable layer over it and makes that the root. `/proc` and `/dev` move along.
///
/// # Errors
/// The step that failed.
pub fn switch(device: &str, kind: &str) -> Result<Left, BootError> {
    let failed = |step: &str| {
        let step = step.to_owned();
        move |error| BootError::new(step, error)
    };
    let old = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open the initramfs"))?;
    mounts::make_directory(IMAGE).map_err(failed("make /image"))?;
    mount_disk(device, kind)?;
    mounts::mount_at("tmpfs", WRITABLE, "tmpfs", MountFlags::empty(), c"mode=0755")
        .map_err(failed("mount the writable layer (tmpfs)"))?;
    mounts::make_directory("/writable/upper").map_err(failed("make the writable layer"))?;
    mounts::make_directory("/writable/work").map_err(failed("make the writable layer"))?;
    // With redirect_dir, renaming a directory of the image works as on any file system.
    let layers = c"lowerdir=/image,upperdir=/writable/upper,workdir=/writable/work,redirect_dir=on";
    mounts::mount_at("overlay", MERGED, "overlay", MountFlags::empty(), layers).map_err(failed("mount the overlay"))?;
    for (from, to) in [("/dev", "/merged/dev"), ("/proc", "/merged/proc")] {
        move_mount(from, to).map_err(failed(&format!("move {from} to the new root")))?;
    }
    rustix::process::chdir(MERGED).map_err(failed("enter the new root"))?;
    rustix::mount::mount_move(".", "/").map_err(failed("move the new root"))?;
    rustix::process::chroot(".").map_err(failed("change root"))?;
    rustix::process::chdir("/").map_err(failed("enter the new root"))?;
    Ok(Left(old))
}

fn mount_disk(device: &str, kind: &str) -> Result<(), BootError> {
    let start = Instant::now();
    loop {
        match rustix::mount::mount(device, IMAGE, kind, MountFlags::RDONLY, None) {
            Ok(()) => return Ok(()),
            // No device node yet, or a node whose driver is not ready.
            Err(Errno::NOENT | Errno::NXIO) if start.elapsed() < DISK_WAIT => std::thread::sleep(DISK_POLL),
            Err(error) => {
                let hint = match error {
                    Errno::NOENT | Errno::NXIO => "; hint: the machine has no such disk, or no driver for it",
                    Errno::NODEV => "; hint: the kernel does not know this file system",
                    Errno::INVAL => "; hint: the disk holds something else, see microvm.rootfstype=",
                    _ => "",
                };
                return Err(BootError::new(format!("mount {device} as {kind}"), error).with_hint(hint));
            }
        }
    }
}

fn move_mount(from: &str, to: &str) -> Result<(), Errno> {
    match rustix::mount::mount_move(from, to) {
        Err(Errno::NOENT) => {
            mounts::make_directory(to)?;
            rustix::mount::mount_move(from, to)
        }
        other => other,
    }
}

impl Left {
    /// Deletes what the initramfs brought: drivers are loaded, and this program keeps itself in memory.
    pub fn delete(self) {
        let Left(old) = self;
        let modules = modules::DIRECTORY.trim_start_matches('/');
        let _ = rustix::fs::unlinkat(&old, "init", AtFlags::empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::openat(&old, modules, flags, Mode::empty()) else {
            return;
        };
        if let Ok(entries) = rustix::fs::Dir::read_from(&directory) {
            for entry in entries.flatten() {
                let _ = rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty());
            }
        }
        let _ = rustix::fs::unlinkat(&old, modules, AtFlags::REMOVEDIR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(device: &str, kind: &str) -> Root {
        Root::Disk { device: device.into(), kind: kind.into() }
    }

    #[test]
    fn from_command_line_defaults_and_last_word_counts() {
        let cases = [
            ("", disk("/dev/vda", "erofs")),
            ("root=/dev/sda quiet", disk("/dev/vda", "erofs")),
            ("microvm.rootfstype=ext4\n", disk("/dev/vda", "ext4")),
            ("microvm.root=/dev/vdb microvm.rootfstype=", disk("/dev/vdb", "erofs")),
            ("microvm.root=/dev/vdb microvm.root=initramfs", Root::Initramfs),
            ("xmicrovm.root=initramfs", disk("/dev/vda", "erofs")),
        ];
        for (line, root) in cases {
            assert_eq!(Root::from_command_line(line), root, "{line:?}");
        }
    }
}
