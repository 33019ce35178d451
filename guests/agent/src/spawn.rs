//! Starts a process the way `vfork` and `execve` do: no page of the agent is copied for it.
//!
//! `posix_spawn` would do nearly that, but it cannot put the child into a control group from its first moment
//! (`CLONE_INTO_CGROUP`) and does not say which step failed. So `clone3` is called directly, with
//! `CLONE_VM | CLONE_VFORK` and a stack for the child: the child shares the agent's memory, and the agent stands
//! still until the child has executed its program or ended. Until then the child makes system calls and nothing
//! else: no allocation, no locks, no panics.

use crate::group::Group;
use crate::mounts::last_error;
use crate::request::Prepared;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Stack of the child until it executes its program; two pages of it are used.
const STACK: usize = 64 * 1024;

// Wider than the `c_int` that libc gives them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Resource limits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `RLIMIT_NOFILE` of commands: the agent's own is raised as far as it goes.
    commands: libc::rlimit,
}

/// A process that was started.
#[derive(Debug)]
pub struct Child {
    /// Its process id, which is also that of its group and session.
    pub pid: i32,
    /// Writes its standard input, if that is not `/dev/null`.
    pub stdin: Option<OwnedFd>,
    /// Reads its standard output.
    pub stdout: OwnedFd,
    /// Reads its standard error.
    pub stderr: OwnedFd,
}

/// Why a process was not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnError {
    /// No pipe, process or memory.
    Resources(Errno),
    /// The working directory cannot be entered.
    WorkingDirectory(Errno),
    /// No candidate could be executed.
    Execute {
        /// Of the candidate that says most: the first that exists, as `execvp` has it.
        errno: Errno,
        /// Its place in the list.
        candidate: usize,
    },
}

/// What is made once and used for every process.
#[derive(Debug)]
pub struct Spawner {
    null: OwnedFd,
    /// Capacity only: zeroing it would touch all of its pages.
    stack: Vec<u8>,
    limits: Limits,
}

/// The step at which a child failed.
const STEP_NONE: c_int = 0;
const STEP_RESOURCES: c_int = 1;
const STEP_DIRECTORY: c_int = 2;
const STEP_EXECUTE: c_int = 3;

/// What the child needs, all of it prepared by the parent, and what it says when it fails.
#[repr(C)]
struct Plan {
    stdin: c_int,
    stdout: c_int,
    stderr: c_int,
    directory: *const c_char,
    candidates: *const *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    open_files: libc::rlimit,
    failed_step: c_int,
    failed_errno: c_int,
    failed_candidate: usize,
}

impl Limits {
    /// The limits of a machine of our own: many descriptors for the agent, a distribution's for commands.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn of_a_machine() -> Result<Limits, Errno> {
        let hard = 1 << 20;
        set_open_files(libc::rlimit { rlim_cur: hard, rlim_max: hard })?;
        Ok(Limits { commands: libc::rlimit { rlim_cur: 1024, rlim_max: hard } })
    }

    /// The limits this process was started with, for commands; its own are raised to what it may have.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn of_this_process() -> Result<Limits, Errno> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel stores one rlimit through the pointer.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
            return Err(last_error());
        }
        set_open_files(libc::rlimit { rlim_cur: limit.rlim_max, ..limit })?;
        Ok(Limits { commands: limit })
    }
}

fn set_open_files(limit: libc::rlimit) -> Result<(), Errno> {
    // SAFETY: the kernel reads one rlimit through the pointer.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

impl Spawner {
    /// Opens `/dev/null` and sets memory aside.
    ///
    /// # Errors
    /// There is no `/dev/null`.
    pub fn new(limits: Limits) -> Result<Spawner, Errno> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Spawner { null, stack: Vec::with_capacity(STACK), limits })
    }

    /// Starts a process in a session of its own, and in `group` if there is one.
    ///
    /// # Errors
    /// The step that failed; no process is left behind then.
    pub fn spawn(&mut self, request: &Prepared, group: Option<&Group>) -> Result<Child, SpawnError> {
        let resources = SpawnError::Resources;
        let stdin = if request.stdin { Some(pipe().map_err(resources)?) } else { None };
        let (stdout, child_stdout) = pipe().map_err(resources)?;
        let (stderr, child_stderr) = pipe().map_err(resources)?;
        let (child_stdin, stdin) = match stdin {
            Some((read, write)) => (Some(read), Some(write)),
            None => (None, None),
        };
        for ours in [Some(&stdout), Some(&stderr), stdin.as_ref()].into_iter().flatten() {
            rustix::fs::fcntl_setfl(ours, OFlags::NONBLOCK).map_err(resources)?;
        }

        let argv = pointers(&request.argv);
        let envp = pointers(&request.env);
        let candidates = pointers(&request.candidates);
        let mut plan = Plan {
            stdin: child_stdin.as_ref().unwrap_or(&self.null).as_raw_fd(),
            stdout: child_stdout.as_raw_fd(),
            stderr: child_stderr.as_raw_fd(),
            directory: request.directory.as_ref().map_or(std::ptr::null(), |path| path.as_ptr()),
            candidates: candidates.as_ptr(),
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            open_files: self.limits.commands,
            failed_step: STEP_NONE,
            failed_errno: 0,
            failed_candidate: 0,
        };
        // SAFETY: the plan and all that it points to live until the end of this function, and the stack is used
        // by nobody else: the call returns when the child is done with both.
        let pid = unsafe { clone_and_run(&mut plan, self.stack.spare_capacity_mut(), group) }.map_err(resources)?;
        if plan.failed_step == STEP_NONE {
            return Ok(Child { pid, stdin, stdout, stderr });
        }
        reap(pid);
        let errno = Errno::from_raw_os_error(plan.failed_errno);
        Err(match plan.failed_step {
            STEP_DIRECTORY => SpawnError::WorkingDirectory(errno),
            STEP_EXECUTE => SpawnError::Execute { errno, candidate: plan.failed_candidate },
            _ => SpawnError::Resources(errno),
        })
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
}

/// The list that `execve` takes: pointers, then a null pointer.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

fn reap(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ =
            rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()));
    }
}

/// `clone3`, with [`run_child`] on `stack` in the child. Returns in the parent alone, when the child has executed
/// a program or ended.
///
/// # Safety
/// `plan` must satisfy [`run_child`], and `stack` must not be in use.
unsafe fn clone_and_run(plan: &mut Plan, stack: &mut [MaybeUninit<u8>], group: Option<&Group>) -> Result<i32, Errno> {
    // The end of the stack must be a multiple of 16.
    let bottom = stack.as_mut_ptr() as u64;
    let size = (stack.len() as u64).saturating_sub(16) & !15;
    let bottom = bottom.saturating_add(15) & !15;
    let into_group = if group.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let shared = u64::try_from(libc::CLONE_VM | libc::CLONE_VFORK).unwrap_or_default();
    let arguments = libc::clone_args {
        flags: shared | CLONE_CLEAR_SIGHAND | into_group,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::try_from(libc::SIGCHLD).unwrap_or_default(),
        stack: bottom,
        stack_size: size,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: group.map_or(0, |group| u64::try_from(group.as_fd().as_raw_fd()).unwrap_or_default()),
    };
    let result: isize;
    // SAFETY: `arguments` is a valid clone_args of the given size. The parent comes out behind the system call
    // with RAX, RCX and R11 changed, as declared. The child, for which RAX is 0, has its own stack, aligned as
    // the ABI wants it at a call, calls a function that never returns, and touches no register of the parent.
    // Shared memory is changed only through `plan`; asm! without options assumes any memory may change.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") run_child as unsafe extern "C" fn(*mut Plan) -> !,
            in("r13") std::ptr::from_mut(plan),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Ok(pid),
        Ok(error) => Err(Errno::from_raw_os_error(error.saturating_neg())),
        Err(_) => Err(Errno::INVAL),
    }
}

/// The child, up to its program.
///
/// # Safety
/// All pointers of the plan are valid, its lists end with null, and the caller stands still meanwhile.
unsafe extern "C" fn run_child(plan: *mut Plan) -> ! {
    // SAFETY: as the caller promises. Every function called here is a bare system call; `errno` is shared with the
    // parent, which does not look at it.
    unsafe {
        libc::setsid();
        // None of the three is below 3, so none overwrites another, and each copy stays open in the program.
        for (from, to) in [((*plan).stdin, 0), ((*plan).stdout, 1), ((*plan).stderr, 2)] {
            if libc::dup2(from, to) < 0 {
                fail(plan, STEP_RESOURCES);
            }
        }
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const (*plan).open_files) != 0 {
            fail(plan, STEP_RESOURCES);
        }
        // The parent has all signals blocked, and handlers for none.
        let nothing: u64 = 0;
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const nothing,
            std::ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        );
        if !(*plan).directory.is_null() && libc::chdir((*plan).directory) != 0 {
            fail(plan, STEP_DIRECTORY);
        }
        // As `execvp` and Python's subprocess do: the first error that is not "no such file" is the one to tell.
        let mut errno = 0;
        let mut index = 0;
        let mut candidate = (*plan).candidates;
        while !(*candidate).is_null() {
            libc::execve(*candidate, (*plan).argv, (*plan).envp);
            let error = *libc::__errno_location();
            if errno == 0 && error != libc::ENOENT && error != libc::ENOTDIR {
                errno = error;
                (*plan).failed_candidate = index;
            }
            candidate = candidate.add(1);
            index = index.wrapping_add(1);
        }
        if errno != 0 {
            *libc::__errno_location() = errno;
        }
        fail(plan, STEP_EXECUTE)
    }
}

/// Ends the child, telling the parent the step and `errno`.
///
/// # Safety
/// As [`run_child`].
unsafe fn fail(plan: *mut Plan, step: c_int) -> ! {
    // SAFETY: as the caller promises.
    unsafe {
        (*plan).failed_step = step;
        (*plan).failed_errno = *libc::__errno_location();
        libc::_exit(127)
    }
}
