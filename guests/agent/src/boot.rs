//! The recipe: from the first instruction of PID 1 to the end of the machine.

use crate::group::Groups;
use crate::root::Root;
use crate::server::{Role, Server};
use crate::spawn::Limits;
use crate::{console, link, modules, mounts, root};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::system::RebootCommand;
use rustix::time::ClockId;
use std::ffi::OsString;
use std::path::PathBuf;

/// Host name of every guest.
const HOST_NAME: &[u8] = b"microvm";

/// A step of the boot that failed, and with it the machine.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {}{hint}", std::io::Error::from(*source))]
pub struct BootError {
    step: String,
    source: Errno,
    hint: &'static str,
}

impl BootError {
    /// A failed step, named as in "mount /dev/vda as erofs".
    pub fn new(step: impl Into<String>, source: Errno) -> Self {
        BootError { step: step.into(), source, hint: "" }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_hint(self, hint: &'static str) -> Self {
        BootError { hint, ..self }
    }
}

/// Runs the machine to its end.
///
/// What fails is told on the console, and the machine then restarts: that ends it at once on the host's side,
/// with the console's last words, where a halted guest would leave the host waiting.
pub fn run() -> ! {
    let end = match serve() {
        Ok(()) => RebootCommand::PowerOff,
        Err(error) => {
            console::report_fatal(&error.to_string());
            RebootCommand::Restart
        }
    };
    let _ = rustix::system::reboot(end);
    // A machine that cannot be powered off can still be reset, and if not even that, PID 1 ends: a kernel panic.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::abort()
}

fn serve() -> Result<(), BootError> {
    let started_ns = nanoseconds(ClockId::Boottime);
    mounts::occupy_standard_descriptors();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    mounts::early()?;
    let command_line = std::fs::read_to_string("/proc/cmdline")
        .map_err(|error| BootError::new("read /proc/cmdline", errno_of(&error)))?;
    modules::load_all();

    // The host answers the connection while the root is being mounted.
    let listener = link::listen()?;
    let ready = link::Connecting::start()?;
    let left = match Root::from_command_line(&command_line) {
        Root::Initramfs => None,
        Root::Disk { device, kind } => Some(root::switch(&device, &kind)?),
    };
    let ready = ready.say_hello(started_ns)?;

    // The host reacts to Hello meanwhile.
    mounts::late()?;
    if let Some(left) = left {
        left.delete();
    }
    rustix::system::sethostname(HOST_NAME).map_err(|error| BootError::new("set the host name", error))?;
    let limits = Limits::of_a_machine().map_err(|error| BootError::new("set resource limits", error))?;
    let groups = Groups::in_directory(mounts::CGROUPS.into()).unwrap_or_else(|error| {
        let error = std::io::Error::from(error);
        console::report(&format!("no control groups, so daemons may outlive their command: {error}"));
        Groups::unavailable()
    });
    let mut server = Server::new(listener, Role::Machine, groups, limits)
        .map_err(|error| BootError::new("prepare the event loop", error))?;
    server.run().map_err(|error| BootError::new("event loop", error))?;

    // Everything has ended; what it wrote must be on the disks before the host is told.
    rustix::fs::sync();
    ready.say_goodbye();
    Ok(())
}

/// The test mode: serves a Unix socket as an ordinary process, until SIGTERM or `PowerOff`. Returns the exit code.
pub fn run_on_host(arguments: impl Iterator<Item = OsString>) -> i32 {
    match serve_on_host(arguments) {
        Ok(()) => 0,
        Err(error) => {
            console::report(&error.to_string());
            1
        }
    }
}

fn serve_on_host(mut arguments: impl Iterator<Item = OsString>) -> Result<(), BootError> {
    let usage = || {
        BootError::new("arguments", Errno::INVAL)
            .with_hint("; this is PID 1 of a microvm. For tests: --serve-unix PATH [--cgroup DIRECTORY]")
    };
    let (mut socket, mut cgroup) = (None, None);
    while let Some(word) = arguments.next() {
        let slot = match word.to_str() {
            Some("--serve-unix") => &mut socket,
            Some("--cgroup") => &mut cgroup,
            _ => return Err(usage()),
        };
        *slot = Some(PathBuf::from(arguments.next().ok_or_else(usage)?));
    }
    let socket = socket.ok_or_else(usage)?;
    mounts::occupy_standard_descriptors();
    let prepare = |error| BootError::new("prepare", error);
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(prepare)?;
    let listener = link::listen_unix(&socket).map_err(prepare)?;
    rustix::process::chdir("/").map_err(prepare)?;
    let groups = match cgroup {
        Some(directory) => Groups::in_directory(directory).map_err(prepare)?,
        None => Groups::unavailable(),
    };
    let limits = Limits::of_this_process().map_err(prepare)?;
    let mut server = Server::new(listener, Role::Process, groups, limits).map_err(prepare)?;
    server.run().map_err(|error| BootError::new("event loop", error))
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or_default())
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
