//! The VMM process: spawned without a copy of this process's memory, watched through a pidfd, always reaped.

use crate::error::VmmCrash;
use microvm_protocol::control::CONTROL_FD;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// A running (or ended, and not yet reaped) VMM process.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pidfd: OwnedFd,
    stderr: OwnedFd,
}

impl VmmProcess {
    /// Starts `path` with the control socket as descriptor 3, in a session of its own (so that Ctrl-C at
    /// the terminal reaches the client alone), with no environment, standard input and output at `/dev/null`
    /// and standard error in a pipe that is read through [`VmmProcess::stderr`].
    pub fn spawn(path: &Path, arguments: &[&CStr], control: BorrowedFd<'_>) -> io::Result<VmmProcess> {
        let program = CString::new(path.as_os_str().as_bytes())?;
        let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let (stderr, stderr_writer) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&stderr, true)?;

        // The copies are above every target number, so no dup2 below can close the source of a later one.
        let above_targets = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FREE_FD);
        let null = above_targets(null.as_fd())?;
        let stderr_writer = above_targets(stderr_writer.as_fd())?;
        let control = above_targets(control)?;

        let mut actions = FileActions::new()?;
        actions.dup2(null.as_raw_fd(), 0)?;
        actions.dup2(null.as_raw_fd(), 1)?;
        actions.dup2(stderr_writer.as_raw_fd(), 2)?;
        actions.dup2(control.as_raw_fd(), CONTROL_FD)?;
        let pid = posix_spawn(&program, arguments, &actions, &Attributes::new()?)?;

        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(VmmProcess { pidfd, stderr }),
            Err(error) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                Err(error.into())
            }
        }
    }

    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The read end of its standard error; never waits.
    pub fn stderr(&self) -> BorrowedFd<'_> {
        self.stderr.as_fd()
    }

    /// Ends the process at once. Cannot hit another process, even after it was reaped.
    pub fn kill(&self) {
        // Fails only when the process is gone, which is what was wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for the end of the process (it has ended, or was killed and will end now) and removes the zombie.
    pub fn reap(&self) -> VmmCrash {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    return VmmCrash {
                        exit_code: status.exit_status(),
                        signal: status.terminating_signal(),
                        stderr: Vec::new(),
                    };
                }
                Err(rustix::io::Errno::INTR) => {}
                // Somebody else reaped it: a `waitpid(-1)` in this process, or SIGCHLD is ignored.
                Ok(None) | Err(_) => return VmmCrash::default(),
            }
        }
    }
}

/// First descriptor number that no file action uses as a target.
const FIRST_FREE_FD: RawFd = CONTROL_FD + 1;

/// `posix_spawn_file_actions_t`, destroyed when dropped.
struct FileActions(libc::posix_spawn_file_actions_t);

impl FileActions {
    fn new() -> io::Result<FileActions> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: the pointer is to memory of the right type; on success it is initialised.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: initialised by the call above.
        Ok(FileActions(unsafe { actions.assume_init() }))
    }

    fn dup2(&mut self, from: RawFd, to: RawFd) -> io::Result<()> {
        // SAFETY: `self.0` is initialised; the numbers are only recorded.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, from, to) })
    }
}

impl Drop for FileActions {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, destroyed once.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

/// `posix_spawnattr_t`, destroyed when dropped: a new session, no signal blocked, none ignored.
struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    fn new() -> io::Result<Attributes> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the pointer is to memory of the right type; on success it is initialised.
        check(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: initialised by the call above.
        let mut attributes = Attributes(unsafe { attributes.assume_init() });
        let flags = i32::from(libc::POSIX_SPAWN_SETSID) | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
        let none = signal_set(false);
        let all = signal_set(true);
        // SAFETY: the attributes are initialised and the sets outlive the calls, which copy them.
        unsafe {
            check(libc::posix_spawnattr_setflags(&raw mut attributes.0, flags))?;
            check(libc::posix_spawnattr_setsigmask(&raw mut attributes.0, &raw const none))?;
            check(libc::posix_spawnattr_setsigdefault(&raw mut attributes.0, &raw const all))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, destroyed once.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

/// Spawns with vfork semantics: this process's memory is neither copied nor marked copy-on-write, which for a
/// large Python process would take longer than a VM needs to boot.
fn posix_spawn(program: &CStr, arguments: &[&CStr], actions: &FileActions, attributes: &Attributes) -> io::Result<Pid> {
    let mut argv: Vec<*mut libc::c_char> = vec![program.as_ptr().cast_mut()];
    argv.extend(arguments.iter().map(|argument| argument.as_ptr().cast_mut()));
    argv.push(ptr::null_mut());
    let environment: [*mut libc::c_char; 1] = [ptr::null_mut()];
    let mut pid = 0;
    // SAFETY: both vectors end with a null pointer and hold NUL-terminated strings, which posix_spawn does not
    // change; actions and attributes are initialised; everything outlives the call.
    check(unsafe {
        libc::posix_spawn(
            &raw mut pid,
            program.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            argv.as_ptr(),
            environment.as_ptr(),
        )
    })?;
    Pid::from_raw(pid).ok_or_else(|| io::Error::other("posix_spawn gave no process id"))
}

/// Runs `work` with every signal blocked in this thread: a thread that `work` starts inherits that, so that the
/// host program's handlers keep running where it expects them.
pub(crate) fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    let all = signal_set(true);
    let mut before = signal_set(false);
    // SAFETY: both sets are initialised and live through the call.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before) } == 0;
    let result = work();
    if blocked {
        // SAFETY: `before` was filled by the call above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    }
    result
}

fn signal_set(full: bool) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: either call initialises the set; neither can fail with a valid pointer.
    unsafe {
        if full {
            libc::sigfillset(set.as_mut_ptr());
        } else {
            libc::sigemptyset(set.as_mut_ptr());
        }
        set.assume_init()
    }
}

/// The `posix_spawn` family returns error numbers.
fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn shell(script: &CStr, control: &OwnedFd) -> VmmProcess {
        VmmProcess::spawn(Path::new("/bin/sh"), &[c"-c", script], control.as_fd()).unwrap()
    }

    fn control() -> OwnedFd {
        microvm_link::ControlSocket::pair().unwrap().1
    }

    fn read_stderr(process: &VmmProcess) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(process.stderr(), &mut buffer) {
                Ok(0) => return String::from_utf8(text).unwrap(),
                Ok(n) => text.extend_from_slice(&buffer[..n]),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    #[test]
    fn the_child_gets_the_control_socket_and_nothing_else_of_ours() {
        let secret = tempfile::tempfile().unwrap();
        let process = VmmProcess::spawn(Path::new("/bin/sleep"), &[c"60"], control().as_fd()).unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.pidfd().as_raw_fd())).unwrap();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim();
        let target = |number: &str| {
            let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
            link.into_os_string().into_string().unwrap()
        };
        let secret = std::fs::read_link(format!("/proc/self/fd/{}", secret.as_raw_fd())).unwrap();
        let open: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|fd| fd.unwrap().path()).collect();
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        let kinds = [target("0"), target("1"), target("2"), target("3")];
        let leaked = open.iter().any(|fd| std::fs::read_link(fd).is_ok_and(|target| target == secret));
        process.kill();
        process.reap();

        assert_eq!(kinds[..2], ["/dev/null", "/dev/null"]);
        assert!(kinds[2].starts_with("pipe:") && kinds[3].starts_with("socket:"), "{kinds:?}");
        assert!(!leaked, "{open:?}");
        assert_eq!(environment, b"");
    }

    #[test]
    fn the_child_blocks_and_ignores_no_signal() {
        let process = with_signals_blocked(|| shell(c"grep -e SigBlk -e SigIgn /proc/self/status >&2", &control()));
        let status = read_stderr(&process);
        process.reap();
        let mask = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        // Signals 32 and 33 belong to the C library, which leaves them ignored.
        assert_eq!((mask("SigBlk:"), mask("SigIgn:") & !(3 << 31)), (0, 0));
    }

    #[test]
    fn killed_and_reaped_it_reports_the_signal_and_leaves_no_zombie() {
        let process = shell(c"sleep 60", &control());
        process.kill();
        assert_eq!(process.reap().signal, Some(9));
        assert_eq!(process.reap(), VmmCrash::default());
    }

    #[test]
    fn a_missing_program_is_not_found() {
        let error = VmmProcess::spawn(Path::new("/no/such/vmm"), &[], control().as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
