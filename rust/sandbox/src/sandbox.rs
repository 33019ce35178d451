//! One machine in one VMM process.

use crate::deadline::Deadline;
use crate::error::SandboxError;
use crate::exec::{Command, Ending, Exited, Streams};
use crate::monitor::{Ready, Shared, State};
use crate::process::VmmProcess;
use crate::{Check, Interrupted, VmmCrash};
use microvm_link::{ControlSocket, LinkError};
use microvm_protocol::agent::{EXEC_PORT, ExecRequest, ToAgent};
use microvm_protocol::control::{EndReport, Request};
use microvm_protocol::frame;
use microvm_protocol::spec::{MAX_VCPUS, MachineSpec};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long the VMM may take to answer a request for a stream; its own limit for the guest is shorter.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long the VMM may leave a request unread. Its loop never waits for anything else.
const SEND_LIMIT: Duration = Duration::from_secs(2);

/// One try of a send: the longest time without a call of the check.
const SEND_SLICE: Duration = Duration::from_millis(50);

/// How long the report of an end may come after the first sign of it.
const REPORT_LIMIT: Duration = Duration::from_millis(800);

/// How long the VMM may take to report after it was told to kill the machine.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// A machine to start.
#[derive(Debug)]
pub struct Launch {
    /// The VMM program.
    pub vmm: PathBuf,
    /// What the machine is made of. `initrd` and `console` in it are set from the fields below.
    pub spec: MachineSpec,
    /// The guest's kernel.
    pub kernel: File,
    /// Its initrd.
    pub initrd: Option<File>,
    /// One file for each drive of the spec.
    pub drives: Vec<File>,
    /// Where the serial console's output goes besides the tail that is kept for errors.
    pub console: Option<OwnedFd>,
    /// How long the agent may take until it is ready.
    pub boot_timeout: Duration,
}

/// How long each step of a start took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From the call of [`Sandbox::launch`] until the VMM process was spawned.
    pub spawned: Duration,
    /// From the start of the VMM process until its vCPUs ran.
    pub started: Duration,
    /// From the start of the VMM process until the agent's first words.
    pub ready: Duration,
    /// From the call of [`Sandbox::launch`] until it returned.
    pub launched: Duration,
}

/// Whether a machine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It runs.
    Running,
    /// It ended, and the VMM reported how.
    Ended(EndReport),
    /// The VMM ended without a report.
    Crashed(VmmCrash),
}

/// A running machine whose agent takes commands. Dropping it ends the machine at once and does not wait.
#[derive(Debug)]
pub struct Sandbox {
    shared: Arc<Shared>,
    next_stream: AtomicU32,
    owner: u32,
    kernel: String,
    timings: Timings,
}

/// The check of somebody who never gives up.
fn never() -> Result<(), Interrupted> {
    Ok(())
}

impl Sandbox {
    /// Starts a VMM process and a machine in it, and returns when its agent is ready.
    ///
    /// # Errors
    /// [`SandboxError::Config`] and [`SandboxError::Kvm`] if the machine cannot be made, [`SandboxError::Boot`]
    /// and [`SandboxError::BootTimeout`] if its guest does not come up, [`SandboxError::Spawn`],
    /// [`SandboxError::VmmCrashed`] or [`SandboxError::Protocol`] if the VMM does not, and
    /// [`SandboxError::Interrupted`]. No process is left behind in any case.
    pub fn launch(launch: Launch, check: Check<'_>) -> Result<Sandbox, SandboxError> {
        let begun = Instant::now();
        let spec = MachineSpec { initrd: launch.initrd.is_some(), console: launch.console.is_some(), ..launch.spec };
        validate(&spec, launch.drives.len())?;

        let (control, vmm_end) = ControlSocket::pair().map_err(SandboxError::io("control socket"))?;
        control.set_send_timeout(SEND_SLICE).map_err(SandboxError::io("control socket"))?;
        let process = VmmProcess::spawn(&launch.vmm, &[], vmm_end.as_fd())
            .map_err(|source| SandboxError::Spawn { path: launch.vmm.clone(), source })?;
        // Our copy of the VMM's end would hide its death from us.
        drop(vmm_end);
        let shared = Shared::watch(control, process).map_err(SandboxError::io("monitor thread"))?;
        let mut sandbox = Sandbox::over(shared);
        sandbox.timings.spawned = begun.elapsed();

        let files = std::iter::once(launch.kernel.as_fd())
            .chain(launch.initrd.as_ref().map(AsFd::as_fd))
            .chain(launch.drives.iter().map(AsFd::as_fd))
            .chain(launch.console.as_ref().map(AsFd::as_fd));
        sandbox.send(&Request::Start(spec), &files.collect::<Vec<_>>(), check)?;
        let ready = sandbox.wait_ready(launch.boot_timeout, check)?;
        sandbox.kernel = ready.kernel;
        sandbox.timings.started = ready.started;
        sandbox.timings.ready = ready.ready;
        sandbox.timings.launched = begun.elapsed();
        Ok(sandbox)
    }

    /// Runs one command to its end. Any number of threads may do so at once.
    ///
    /// `request.stdin` is set from `streams`. A time limit is enforced in the guest, and here as well, a grace
    /// later, in case the guest does not. See [`crate::exec`] for what happens to the streams.
    ///
    /// # Errors
    /// [`SandboxError::Exec`] if the command cannot be started; [`SandboxError::Config`] if the request is not
    /// valid; [`SandboxError::Ended`] or [`SandboxError::VmmCrashed`] if the machine ends meanwhile;
    /// [`SandboxError::Interrupted`] after which the command is killed; or the error of a local stream.
    pub fn exec(&self, request: ExecRequest, streams: Streams, check: Check<'_>) -> Result<Exited, SandboxError> {
        let begun = Instant::now();
        self.owned()?;
        let command = Command::new(request, streams)?;
        let limit = command.limit().filter(|limit| *limit <= CONNECT_LIMIT);
        let stream = match self.connect(EXEC_PORT, limit.unwrap_or(CONNECT_LIMIT), check) {
            // A guest that hangs keeps no time limit either.
            Err(SandboxError::Timeout { .. }) if limit.is_some() => return Ok(Exited::never_begun(begun)),
            connected => connected?,
        };
        match command.run(stream, begun, check)? {
            Ending::Exited(exited) => Ok(exited),
            Ending::Lost => Err(self.lost(check)?),
        }
    }

    /// Ends the machine in order: the agent ends the commands, writes everything out and powers off. If that
    /// takes longer than `timeout`, the machine is killed.
    ///
    /// # Errors
    /// [`SandboxError::Interrupted`] or [`SandboxError::Forked`]; a machine that is gone already is no error.
    pub fn stop(&self, timeout: Duration, check: Check<'_>) -> Result<Status, SandboxError> {
        self.owned()?;
        let deadline = Deadline::after(timeout);
        // Whatever else keeps the agent from doing it, killing is what remains.
        if let Err(SandboxError::Interrupted) = self.power_off(deadline, check) {
            return Err(SandboxError::Interrupted);
        }
        Ok(self.kill())
    }

    /// Ends the machine at once; what its disks hold is what the guest had written out. Takes at most two seconds.
    pub fn kill(&self) -> Status {
        if self.owned().is_ok() && self.shared.state().end().is_none() {
            // A VMM that does not listen is killed below.
            let _ = self.send(&Request::Kill, &[], &mut never);
            if !matches!(self.shared.wait_end(KILL_LIMIT, &mut never), Ok(Some(_))) {
                self.shared.process.kill();
                let _ = self.shared.wait_end(KILL_LIMIT, &mut never);
            }
        }
        self.status()
    }

    /// Whether the machine runs.
    pub fn status(&self) -> Status {
        let state = self.shared.state();
        match (&state.report, &state.exit) {
            (Some(report), _) => Status::Ended(report.clone()),
            (None, Some(exit)) => Status::Crashed(exit.clone()),
            (None, None) => Status::Running,
        }
    }

    /// Release of the guest's kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// How long the start took.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// The last bytes of the serial console, once the machine has ended.
    pub fn console_tail(&self) -> Vec<u8> {
        self.shared.state().report.as_ref().map(|report| report.console.clone()).unwrap_or_default()
    }

    /// Sampled instruction pointers, most frequent first, once the machine has ended and if the spec asked for them.
    pub fn profile(&self) -> Vec<(u64, u32)> {
        self.shared.state().report.as_ref().map(|report| report.profile.clone()).unwrap_or_default()
    }

    /// Opens a stream to a vsock port of the guest.
    ///
    /// # Errors
    /// [`SandboxError::Connect`] if nobody listens there, or the errors of a machine that has ended.
    pub fn open_stream(&self, port: u32, check: Check<'_>) -> Result<OwnedFd, SandboxError> {
        self.owned()?;
        self.connect(port, CONNECT_LIMIT, check)
    }

    /// A sandbox over a VMM that has not been asked for anything yet.
    pub(crate) fn over(shared: Arc<Shared>) -> Sandbox {
        Sandbox {
            shared,
            next_stream: AtomicU32::new(0),
            owner: std::process::id(),
            kernel: String::new(),
            timings: Timings::default(),
        }
    }

    pub(crate) fn wait_ready(&self, limit: Duration, check: Check<'_>) -> Result<Ready, SandboxError> {
        let probe = |state: &mut State| match state.end() {
            Some(error) => Some(Err(error)),
            None => state.ready.clone().map(Ok),
        };
        if let Some(found) = self.shared.wait(Deadline::after(limit), check, probe)? {
            return found;
        }
        let console = match self.kill() {
            Status::Ended(report) => report.console,
            Status::Running | Status::Crashed(_) => Vec::new(),
        };
        Err(SandboxError::BootTimeout { limit, console })
    }

    fn connect(&self, port: u32, limit: Duration, check: Check<'_>) -> Result<OwnedFd, SandboxError> {
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        self.shared.state().expect_stream(id);
        let answer = self.connect_as(id, port, limit, check);
        self.shared.state().forget_stream(id);
        answer
    }

    fn connect_as(&self, id: u32, port: u32, limit: Duration, check: Check<'_>) -> Result<OwnedFd, SandboxError> {
        self.send(&Request::Connect { id, port }, &[], check)?;
        let probe = |state: &mut State| match state.take_stream(id) {
            Some(Ok(stream)) => Some(Ok(stream)),
            Some(Err(reason)) => Some(Err(SandboxError::Connect { reason })),
            None => state.end().map(Err),
        };
        match self.shared.wait(Deadline::after(limit), check, probe)? {
            // The machine may be ending, which says more than the refused stream does.
            Some(Err(SandboxError::Connect { reason })) => match self.shared.wait_end(Duration::ZERO, check)? {
                Some(error) => Err(error),
                None => Err(SandboxError::Connect { reason }),
            },
            Some(found) => found,
            None => Err(SandboxError::Timeout { what: "a stream to the agent", limit }),
        }
    }

    fn power_off(&self, deadline: Deadline, check: Check<'_>) -> Result<(), SandboxError> {
        let stream = self.connect(EXEC_PORT, deadline.left(), check)?;
        let words = frame::encode_prefixed(&ToAgent::PowerOff)
            .map_err(|error| SandboxError::Protocol { peer: "the client", message: error.to_string() })?;
        // A few bytes into the empty buffer of a new stream.
        rustix::net::send(&stream, &words, rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT)
            .map_err(|error| SandboxError::io("stream to the agent")(error.into()))?;
        // The stream stays open until the end: closing it would take the request back.
        self.shared.wait(deadline, check, |state| state.end())?;
        Ok(())
    }

    fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>], check: Check<'_>) -> Result<(), SandboxError> {
        let deadline = Deadline::after(SEND_LIMIT);
        loop {
            match self.shared.control.send(request, descriptors) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_would_block() => check()?,
                Err(LinkError::Io(error)) if is_gone(&error) => return Err(self.lost(check)?),
                Err(LinkError::Io(error)) => return Err(SandboxError::io("control socket")(error)),
                Err(error) => {
                    return Err(SandboxError::Protocol { peer: "the client", message: error.to_string() });
                }
            }
            if deadline.passed() {
                return Err(SandboxError::Timeout { what: "the VMM", limit: SEND_LIMIT });
            }
        }
    }

    /// The error for a link that broke: the machine's end, if it is one.
    fn lost(&self, check: Check<'_>) -> Result<SandboxError, Interrupted> {
        let end = self.shared.wait_end(REPORT_LIMIT, check)?;
        Ok(end.unwrap_or_else(|| SandboxError::Protocol {
            peer: "the agent",
            message: "it closed the stream of a command before the command's end".into(),
        }))
    }

    /// A fork of the owner has copies of the descriptors and no monitor thread.
    fn owned(&self) -> Result<(), SandboxError> {
        if self.owner == std::process::id() { Ok(()) } else { Err(SandboxError::Forked { owner: self.owner }) }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.owned().is_ok() {
            // The VMM ends at the end of its control socket; the monitor thread sees to that and reaps.
            self.shared.control.shutdown();
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected)
}

/// What can be known to be wrong before a process is started; the VMM checks everything again.
fn validate(spec: &MachineSpec, drives: usize) -> Result<(), SandboxError> {
    spec.validate(MAX_VCPUS)
        .map_err(|error| SandboxError::Config { field: Some(error.field), message: error.to_string() })?;
    if spec.drives.len() != drives {
        let message = format!("drives is {} in the spec: as many as files, {drives}", spec.drives.len());
        return Err(SandboxError::Config { field: Some("drives"), message });
    }
    Ok(())
}
