//! The one background thread of a sandbox, and the state it keeps for everybody who waits.
//!
//! The thread polls the control socket, the process and its standard error. It is the only reader of all three
//! and the only one who reaps, so that the death of the VMM wakes every waiter at once and leaves no zombie.
//! It ends with the VMM; the VMM ends when the control socket does.

use crate::Check;
use crate::deadline::Deadline;
use crate::error::{Interrupted, SandboxError, VmmCrash};
use crate::process::{VmmProcess, with_signals_blocked};
use microvm_link::{ControlSocket, LinkError};
use microvm_protocol::control::{CONSOLE_TAIL, EndReport, Event};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Longest wait between two calls of the caller's check.
const SLICE: Duration = Duration::from_millis(50);

/// How long the VMM may take to exit once its control socket is closed; then it is killed.
const EXIT_GRACE: Duration = Duration::from_millis(500);

/// Most bytes of the VMM's standard error kept for a crash report.
const STDERR_TAIL: usize = 16 * 1024;

/// What all threads of one sandbox share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub control: ControlSocket,
    pub process: VmmProcess,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the VMM has said so far.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub ready: Option<Ready>,
    /// The last message of the VMM.
    pub report: Option<EndReport>,
    /// Set when the process has been reaped, whatever it said before.
    pub exit: Option<VmmCrash>,
    /// What the VMM sent that is not in the protocol; it has been killed for it.
    broken: Option<String>,
    /// Streams asked for, by id: the answer once it came.
    streams: HashMap<u32, Option<Result<OwnedFd, String>>>,
    stderr: Vec<u8>,
}

/// The agent's first words.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub kernel: String,
    pub started: Duration,
    pub ready: Duration,
}

impl State {
    /// The error for everybody who still wants something from the machine, once it has ended.
    pub fn end(&self) -> Option<SandboxError> {
        if let Some(message) = &self.broken {
            return Some(SandboxError::Protocol { peer: "the VMM", message: message.clone() });
        }
        if let Some(report) = &self.report {
            return Some(SandboxError::ended(report, self.ready.is_some()));
        }
        self.exit.clone().map(SandboxError::VmmCrashed)
    }

    /// Announces that an answer for stream `id` is wanted.
    pub fn expect_stream(&mut self, id: u32) {
        self.streams.insert(id, None);
    }

    /// No answer is wanted any more; one that came is closed.
    pub fn forget_stream(&mut self, id: u32) {
        self.streams.remove(&id);
    }

    /// Takes the answer for stream `id`.
    pub fn take_stream(&mut self, id: u32) -> Option<Result<OwnedFd, String>> {
        self.streams.get_mut(&id).and_then(Option::take)
    }

    /// Notes one event; an error describes what was wrong with it.
    fn note(&mut self, event: Event, mut descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let descriptor = descriptors.pop();
        let wants_descriptor = matches!(event, Event::Connected { .. });
        if descriptor.is_some() != wants_descriptor {
            return Err(format!("a message {} descriptor", if wants_descriptor { "without its" } else { "with a" }));
        }
        match (event, descriptor) {
            (Event::Started, _) => {}
            (Event::Ready { kernel, started_us, ready_us }, _) => {
                self.ready = Some(Ready {
                    kernel,
                    started: Duration::from_micros(started_us),
                    ready: Duration::from_micros(ready_us),
                });
            }
            (Event::Connected { id }, Some(descriptor)) => self.answer(id, Ok(descriptor)),
            (Event::Connected { .. }, None) => {}
            (Event::ConnectFailed { id, reason }, _) => self.answer(id, Err(reason)),
            (Event::Ended(mut report), _) => {
                let skipped = report.console.len().saturating_sub(CONSOLE_TAIL);
                report.console.drain(..skipped);
                self.report = Some(report);
            }
        }
        Ok(())
    }

    /// An answer nobody waits for any more is dropped, and its stream closed.
    fn answer(&mut self, id: u32, answer: Result<OwnedFd, String>) {
        if let Some(slot) = self.streams.get_mut(&id) {
            *slot = Some(answer);
        }
    }
}

impl Shared {
    /// Starts the thread that watches `process`; if that fails, the process is ended.
    pub fn watch(control: ControlSocket, process: VmmProcess) -> io::Result<Arc<Shared>> {
        let shared = Arc::new(Shared { control, process, state: Mutex::default(), changed: Condvar::new() });
        let watched = Arc::clone(&shared);
        let started = with_signals_blocked(|| {
            thread::Builder::new()
                .name("microvm-monitor".into())
                .stack_size(256 << 10)
                .spawn(move || Monitor::new(&watched).run())
        });
        match started {
            Ok(_detached) => Ok(shared),
            Err(error) => {
                shared.process.kill();
                shared.process.reap();
                Err(error)
            }
        }
    }

    /// The state now.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held leaves plain data behind, each field of it valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `probe` finds what it looks for, the deadline passes (`None`) or the check gives up.
    /// The check is called without the lock.
    pub fn wait<T>(
        &self,
        deadline: Deadline,
        check: Check<'_>,
        mut probe: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>, Interrupted> {
        let mut state = self.state();
        loop {
            if let Some(found) = probe(&mut state) {
                return Ok(Some(found));
            }
            if deadline.passed() {
                return Ok(None);
            }
            let waited = self.changed.wait_timeout(state, deadline.left().min(SLICE));
            let (held, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = held;
            if timeout.timed_out() {
                drop(state);
                check()?;
                state = self.state();
            }
        }
    }

    /// Waits for the end of the machine, which is certain or probable: `None` if it does not come in time.
    pub fn wait_end(&self, limit: Duration, check: Check<'_>) -> Result<Option<SandboxError>, Interrupted> {
        self.wait(Deadline::after(limit), check, |state| state.end())
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }
}

/// The thread's own view.
struct Monitor<'a> {
    shared: &'a Shared,
    scratch: Vec<u8>,
    control_open: bool,
    stderr_open: bool,
    /// When to kill a VMM that was told to go.
    kill_at: Option<Deadline>,
}

impl<'a> Monitor<'a> {
    fn new(shared: &'a Shared) -> Self {
        Monitor { shared, scratch: Vec::new(), control_open: true, stderr_open: true, kill_at: None }
    }

    fn run(mut self) {
        loop {
            let ended = match self.poll() {
                Ok(ended) => ended,
                // Out of kernel memory: nothing can be watched, so nothing may go on.
                Err(_) => {
                    self.shared.process.kill();
                    true
                }
            };
            self.read_control();
            self.read_stderr();
            if ended {
                break;
            }
            if self.kill_at.is_some_and(|at| at.passed()) {
                self.shared.process.kill();
                self.kill_at = None;
            }
        }
        let mut exit = self.shared.process.reap();
        self.shared.control.shutdown();
        self.shared.update(|state| {
            exit.stderr = std::mem::take(&mut state.stderr);
            state.exit = Some(exit);
        });
    }

    /// Waits for anything to do; true once the process has ended.
    fn poll(&self) -> io::Result<bool> {
        let timeout = self.kill_at.map(|at| {
            let left = at.left();
            Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() }
        });
        let wanted = |open: bool| if open { PollFlags::IN } else { PollFlags::empty() };
        let process = self.shared.process.pidfd();
        let mut fds = vec![PollFd::from_borrowed_fd(process, PollFlags::IN)];
        if self.control_open {
            fds.push(PollFd::from_borrowed_fd(self.shared.control.as_fd(), wanted(true)));
        }
        if self.stderr_open {
            fds.push(PollFd::from_borrowed_fd(self.shared.process.stderr(), wanted(true)));
        }
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => return Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read_control(&mut self) {
        while self.control_open {
            let noted = match self.shared.control.receive::<Event>(&mut self.scratch, 1) {
                Ok(Some((event, descriptors))) => {
                    let last = matches!(event, Event::Ended(_));
                    let mut noted = Ok(());
                    self.shared.update(|state| noted = state.note(event, descriptors));
                    if last {
                        self.close_control();
                    }
                    noted
                }
                Ok(None) => {
                    self.close_control();
                    Ok(())
                }
                Err(error) if error.is_would_block() => return,
                Err(LinkError::Io(error)) => Err(error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(message) = noted {
                // What speaks nonsense may be in the hands of its guest.
                self.shared.process.kill();
                self.shared.update(|state| state.broken = Some(message));
                self.close_control();
            }
        }
    }

    fn close_control(&mut self) {
        self.control_open = false;
        self.kill_at = Some(Deadline::after(EXIT_GRACE));
    }

    fn read_stderr(&mut self) {
        let mut buffer = [0; 4096];
        while self.stderr_open {
            match rustix::io::read(self.shared.process.stderr(), &mut buffer) {
                Ok(0) => self.stderr_open = false,
                Ok(length) => self.shared.update(|state| {
                    state.stderr.extend_from_slice(buffer.get(..length).unwrap_or_default());
                    let skipped = state.stderr.len().saturating_sub(STDERR_TAIL);
                    state.stderr.drain(..skipped);
                }),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => self.stderr_open = false,
            }
        }
    }
}
