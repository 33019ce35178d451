//! One running command: its pipes, its end, and the end of everything it started.
//!
//! A command has ended when its process was reaped **and** its output came to an end, as in
//! `subprocess.run(capture_output=True)`: a process in the background that keeps the pipes open keeps the command
//! running. The timeout counts for that too, and then ends such processes as well. Processes that closed the
//! pipes (daemons) outlive their command.

use crate::connection::{Context, Output};
use crate::group::Group;
use crate::request::Prepared;
use crate::spawn::SpawnError;
use crate::tree;
use crate::watch::{Source, Token, Watched};
use microvm_protocol::agent::{ExitStatus, FromAgent};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// Above this many bytes that wait for the command to read them, no more are taken from the host.
const MAX_UNREAD: usize = 256 * 1024;
/// How long output may take to end after the processes were killed on timeout. It ends at once, unless one of them
/// hangs in the kernel, or the host does not take the output.
const DRAIN: Duration = Duration::from_secs(1);

/// A running command.
#[derive(Debug)]
pub struct Command {
    pid: i32,
    stdin: Stdin,
    stdout: Option<Watched>,
    stderr: Option<Watched>,
    group: Option<Group>,
    /// When its time is over; later, when even waiting for its output is.
    deadline: Option<Instant>,
    timed_out: bool,
    status: Option<ExitStatus>,
}

/// The way from the host to the command's standard input.
#[derive(Debug)]
struct Stdin {
    /// `None` when it is `/dev/null`, has ended, or the command has closed it.
    pipe: Option<Watched>,
    unread: Vec<u8>,
    start: usize,
    /// Whether the host has said that no more comes.
    ended: bool,
}

impl Command {
    /// Starts it, as command of connection `connection`.
    ///
    /// # Errors
    /// The step that failed.
    pub fn start(
        request: &Prepared,
        timeout: Option<Duration>,
        connection: u64,
        context: &mut Context,
    ) -> Result<Command, SpawnError> {
        let mut group = context.groups.take();
        let mut spawned = context.spawner.spawn(request, group.as_ref());
        // The group can be unusable because a process in the machine removed or changed it.
        if group.is_some()
            && matches!(spawned, Err(SpawnError::Resources(Errno::NODEV | Errno::BUSY | Errno::OPNOTSUPP)))
        {
            group = None;
            spawned = context.spawner.spawn(request, None);
        }
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                if let Some(group) = group {
                    context.groups.retire(group);
                }
                return Err(error);
            }
        };
        let watched = |fd: OwnedFd, source| Watched::new(fd, Token { connection, source });
        let mut command = Command {
            pid: child.pid,
            stdin: Stdin {
                pipe: child.stdin.map(|fd| watched(fd, Source::Stdin)),
                unread: Vec::new(),
                start: 0,
                ended: false,
            },
            stdout: Some(watched(child.stdout, Source::Stdout)),
            stderr: Some(watched(child.stderr, Source::Stderr)),
            group,
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            timed_out: false,
            status: None,
        };
        context.leaders.insert(command.pid, connection);
        if let Err(error) = command.watch(false, context) {
            command.abandon(context);
            return Err(SpawnError::Resources(error));
        }
        Ok(command)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When [`Command::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Brings the event loop's interest in the pipes up to date. While `full`, output is left in them, and the
    /// command waits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&mut self, full: bool, context: &Context) -> Result<(), Errno> {
        let output = if full { EventFlags::empty() } else { EventFlags::IN };
        for pipe in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            pipe.watch(&context.epoll, output)?;
        }
        let input = if self.stdin.waiting() > 0 { EventFlags::OUT } else { EventFlags::empty() };
        self.stdin.pipe.as_mut().map_or(Ok(()), |pipe| pipe.watch(&context.epoll, input))
    }

    /// Whether more standard input may come from the host.
    pub fn takes_input(&self) -> bool {
        self.stdin.waiting() <= MAX_UNREAD
    }

    /// Standard input from the host. Ignored if there is nobody (any more) to read it.
    pub fn input(&mut self, bytes: &[u8]) {
        if self.stdin.pipe.is_some() && !self.stdin.ended {
            self.stdin.unread.extend_from_slice(bytes);
            self.stdin.write();
        }
    }

    /// The end of standard input.
    pub fn end_input(&mut self) {
        self.stdin.ended = true;
        self.stdin.write();
    }

    /// Signals the process group, as `Popen.send_signal` does: not any more once the command itself has ended,
    /// because its number may by then be another's.
    pub fn signal(&self, signal: i32) {
        if self.status.is_none() {
            // SAFETY: kill touches no memory of this process. A signal number that does not exist is refused.
            unsafe { libc::kill(self.pid.saturating_neg(), signal) };
        }
    }

    /// One of the pipes is ready.
    pub fn pipe_ready(&mut self, source: Source, flags: EventFlags, output: &mut Output, scratch: &mut Vec<u8>) {
        let (pipe, wrap): (_, fn(Vec<u8>) -> FromAgent) = match source {
            Source::Stdout => (&mut self.stdout, FromAgent::Stdout),
            Source::Stderr => (&mut self.stderr, FromAgent::Stderr),
            Source::Stdin | Source::Socket => return self.stdin.write(),
        };
        while let Some(watched) = pipe {
            scratch.clear();
            match rustix::io::read(watched.fd(), spare_capacity(scratch)) {
                Ok(0) => *pipe = None,
                Ok(_) => {
                    // The message borrows the buffer by owning it for a moment.
                    let message = wrap(std::mem::take(scratch));
                    output.push(&message);
                    if let FromAgent::Stdout(bytes) | FromAgent::Stderr(bytes) = message {
                        *scratch = bytes;
                    }
                    // One piece, for fairness, except when nobody can write any more: then up to the end.
                    if !flags.contains(EventFlags::HUP) || output.is_full() {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => *pipe = None,
            }
        }
    }

    /// Its process was reaped.
    pub fn reaped(&mut self, status: ExitStatus) {
        self.status = Some(status);
    }

    /// Its time may be over: kills everything, and in the end stops waiting for output.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.kill_all();
        if self.timed_out {
            self.deadline = None;
            self.stdout = None;
            self.stderr = None;
            self.status = Some(ExitStatus::TimedOut);
        } else {
            self.timed_out = true;
            self.deadline = now.checked_add(DRAIN);
        }
    }

    /// How it ended, once it has, with all of its output.
    pub fn end(&self) -> Option<ExitStatus> {
        let status = self.status.filter(|_| self.stdout.is_none() && self.stderr.is_none())?;
        Some(if self.timed_out { ExitStatus::TimedOut } else { status })
    }

    /// Lets go of a command that has ended.
    pub fn finish(self, context: &mut Context) {
        context.leaders.remove(&self.pid);
        if let Some(group) = self.group {
            context.groups.retire(group);
        }
    }

    /// Kills a command nobody waits for, and everything it started.
    pub fn abandon(self, context: &mut Context) {
        self.kill_all();
        self.finish(context);
    }

    /// Kills the command and everything it started.
    pub fn kill_all(&self) {
        if self.group.as_ref().is_none_or(|group| group.kill().is_err()) {
            tree::kill(self.pid);
        }
    }
}

impl Stdin {
    fn waiting(&self) -> usize {
        self.unread.len().saturating_sub(self.start)
    }

    /// Writes what the pipe takes.
    fn write(&mut self) {
        while let Some(pipe) = &self.pipe {
            let unread = self.unread.get(self.start..).unwrap_or_default();
            if unread.is_empty() {
                self.unread.clear();
                self.start = 0;
                if self.ended {
                    self.pipe = None;
                }
                return;
            }
            match rustix::io::write(pipe.fd(), unread) {
                Ok(length) => self.start = self.start.saturating_add(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // The command has closed it: what still comes is for nobody.
                Err(_) => {
                    self.pipe = None;
                    self.unread = Vec::new();
                    self.start = 0;
                }
            }
        }
        if self.start > MAX_UNREAD / 4 {
            self.unread.drain(..self.start.min(self.unread.len()));
            self.start = 0;
        }
    }
}
