//! The file systems every program expects, and the loopback device.

use crate::boot::BootError;
use crate::console;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CStr;

/// Where the unified control groups are, and so the commands' own groups.
pub const CGROUPS: &str = "/sys/fs/cgroup";

struct FileSystem {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static CStr,
    /// Whether a guest without it is of no use.
    needed: bool,
}

const HIDDEN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Needed to find the root file system.
const EARLY: [FileSystem; 2] = [
    FileSystem { kind: "proc", target: "/proc", flags: HIDDEN, data: c"", needed: true },
    FileSystem { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: c"mode=0755", needed: true },
];

/// Needed by commands only: mounted while the host already reacts to Hello.
const LATE: [FileSystem; 7] = [
    FileSystem { kind: "tmpfs", target: "/tmp", flags: PLAIN, data: c"mode=1777", needed: true },
    FileSystem { kind: "tmpfs", target: "/run", flags: PLAIN, data: c"mode=0755", needed: true },
    FileSystem { kind: "sysfs", target: "/sys", flags: HIDDEN, data: c"", needed: false },
    FileSystem { kind: "cgroup2", target: CGROUPS, flags: HIDDEN, data: c"nsdelegate", needed: false },
    FileSystem {
        kind: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: c"gid=5,mode=620,ptmxmode=666",
        needed: false,
    },
    FileSystem { kind: "tmpfs", target: "/dev/shm", flags: PLAIN, data: c"mode=1777", needed: false },
    FileSystem { kind: "mqueue", target: "/dev/mqueue", flags: HIDDEN, data: c"", needed: false },
];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts `/proc` and `/dev`.
///
/// # Errors
/// The first that fails.
pub fn early() -> Result<(), BootError> {
    EARLY.iter().try_for_each(mount)
}

/// Mounts everything else and brings up the loopback device.
///
/// # Errors
/// A file system without which commands cannot run. Others are reported on the console.
pub fn late() -> Result<(), BootError> {
    LATE.iter().try_for_each(mount)?;
    for (target, link) in LINKS {
        match rustix::fs::symlink(target, link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => console::report(&format!("link {link}: {}", std::io::Error::from(error))),
        }
    }
    if let Err(error) = loopback_up() {
        console::report(&format!("loopback device: {}", std::io::Error::from(error)));
    }
    Ok(())
}

fn mount(what: &FileSystem) -> Result<(), BootError> {
    match mount_at(what.kind, what.target, what.kind, what.flags, what.data) {
        Ok(()) => Ok(()),
        // The kernel was built without it.
        Err(Errno::NODEV | Errno::NOENT) if !what.needed => Ok(()),
        Err(error) => {
            let error = BootError::new(format!("mount {} on {}", what.kind, what.target), error);
            if what.needed {
                return Err(error);
            }
            console::report(&error.to_string());
            Ok(())
        }
    }
}

/// Mounts, making the mount point if the image lacks it. Already mounted counts as done.
///
/// # Errors
/// The kernel's.
pub fn mount_at(source: &str, target: &str, kind: &str, flags: MountFlags, data: &CStr) -> Result<(), Errno> {
    let attempt = || rustix::mount::mount(source, target, kind, flags, data);
    let result = match attempt() {
        Err(Errno::NOENT) => {
            make_directory(target)?;
            attempt()
        }
        other => other,
    };
    match result {
        Err(Errno::BUSY) => Ok(()),
        other => other,
    }
}

/// Makes a directory that may exist already.
///
/// # Errors
/// The kernel's.
pub fn make_directory(path: &str) -> Result<(), Errno> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Sets `lo` up; the kernel gives it its addresses itself. A kernel without IP has none.
fn loopback_up() -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::os::fd::AsRawFd;
    let socket = match rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None) {
        Ok(socket) => socket,
        Err(Errno::AFNOSUPPORT) => return Ok(()),
        Err(error) => return Err(error),
    };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = libc::c_char::from_ne_bytes([*byte]);
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| Errno::INVAL)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq through the pointer.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// The calling thread's `errno`.
pub(crate) fn last_error() -> Errno {
    let raw = std::io::Error::last_os_error().raw_os_error();
    Errno::from_raw_os_error(raw.unwrap_or(libc::EIO))
}

/// Makes sure that descriptors 0 to 2 are in use: a pipe of a command that got such a number would be
/// overwritten when its child arranges its own. The kernel opens them unless there is no console.
pub fn occupy_standard_descriptors() {
    while let Ok(fd) = rustix::fs::open("/", OFlags::PATH, Mode::empty()) {
        use std::os::fd::{AsRawFd, IntoRawFd};
        if fd.as_raw_fd() > 2 {
            break;
        }
        let _ = fd.into_raw_fd();
    }
}
