//! What the process gives up before it reads its first request.
//!
//! The one place for confinement: whatever is added (a system call filter, a file system filter) belongs here.

use microvm_protocol::control::CONTROL_FD;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use std::io;

/// Most descriptors the process asks for; every open stream to the guest is one.
const MAX_OPEN_FILES: u64 = 16 * 1024;

/// Confines the process.
///
/// # Errors
/// The system's; the process must not go on then.
pub fn enter() -> io::Result<()> {
    close_inherited()?;
    // No set-user-id program, should guest code ever come to execute one.
    rustix::thread::set_no_new_privs(true)?;
    // Guest memory goes into no core file, and no process of the same user attaches to this one.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    raise_open_files()?;
    // No directory of the client stays busy.
    rustix::process::chdir(c"/")?;
    Ok(())
}

/// Closes what a client may have left open without close-on-exec; the spawning code cannot know of it.
fn close_inherited() -> io::Result<()> {
    let first = CONTROL_FD.unsigned_abs().saturating_add(1);
    // SAFETY: this runs before anything has been opened in this process, so nobody owns these numbers.
    if unsafe { libc::close_range(first, u32::MAX, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The usual soft limit of 1024 is for programs that use `select`.
fn raise_open_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(MAX_OPEN_FILES).min(MAX_OPEN_FILES);
    if limit.current.is_some_and(|current| current < wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum })?;
    }
    Ok(())
}
