//! The loop that moves one command's bytes, signals and status.

use super::ends::{Chunk, Sink, SinkError, Source};
use super::{CAPTURE_LIMIT, Command, Ending, Exited};
use crate::Check;
use crate::deadline::Deadline;
use crate::error::SandboxError;
use crate::signals::SignalSender;
use microvm_protocol::agent::{ExitStatus, FromAgent, ToAgent};
use microvm_protocol::frame::{self, FrameBuffer, MAX_CHUNK};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest wait, and longest time between two calls of the check.
const SLICE: Duration = Duration::from_millis(50);

/// Bytes read from the stream at once.
const READ_AT_ONCE: usize = 2 * MAX_CHUNK;

/// What the pump waits for; the order is that of [`Pump::interests`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Stream,
    Stdin,
    Stdout,
    Stderr,
    Signals,
}

pub(super) struct Pump {
    stream: OwnedFd,
    /// Encoded frames for the agent, from `sent` on.
    outgoing: Vec<u8>,
    sent: usize,
    /// False once the agent takes no more: it may have ended the command already.
    writable: bool,
    incoming: FrameBuffer,
    scratch: Vec<u8>,
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
    signals: Option<SignalSender>,
    begun: Instant,
    /// When the guest should have enforced the time limit long ago.
    deadline: Option<Deadline>,
    /// The status and when it came: output may still be held back then.
    exited: Option<(ExitStatus, Duration)>,
}

/// What reading the stream found.
enum Read {
    Something,
    Nothing,
    End,
}

impl Pump {
    pub fn new(stream: OwnedFd, command: Command, begun: Instant) -> Pump {
        let Command { opening, limit, streams } = command;
        Pump {
            stream,
            outgoing: opening,
            sent: 0,
            writable: true,
            incoming: FrameBuffer::default(),
            scratch: vec![0; READ_AT_ONCE],
            stdin: Source::new(streams.stdin),
            stdout: Sink::new(streams.stdout),
            stderr: Sink::new(streams.stderr),
            signals: streams.signals,
            begun,
            deadline: limit.map(Deadline::after),
            exited: None,
        }
    }

    pub fn run(mut self, check: Check<'_>) -> Result<Ending, SandboxError> {
        let mut checked = Instant::now();
        loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(ending)) => return Ok(ending),
                Err(Stop::Closed) => return Ok(self.finish(ExitStatus::Signal(libc::SIGPIPE))),
                Err(Stop::Error(error)) => return Err(*error),
            }
            if let (Some((status, _)), true) = (self.exited, self.is_flushed()) {
                return Ok(self.finish(status));
            }
            if self.deadline.is_some_and(|deadline| deadline.passed()) {
                return Ok(self.finish(ExitStatus::TimedOut));
            }
            if checked.elapsed() >= SLICE {
                check()?;
                checked = Instant::now();
            }
        }
    }

    /// Waits once and does what can be done then.
    fn step(&mut self) -> Result<Option<Ending>, Stop> {
        self.fill_outgoing()?;
        // Sending first saves a wait: the stream almost always takes bytes.
        self.send()?;
        for wanted in self.wait()? {
            match wanted {
                Wanted::Stream => match self.receive()? {
                    Read::End => return Ok(Some(Ending::Lost)),
                    Read::Something | Read::Nothing => {}
                },
                Wanted::Stdin => self.take_stdin()?,
                Wanted::Stdout => self.stdout.flush().map_err(|error| stop("standard output", error))?,
                Wanted::Stderr => self.stderr.flush().map_err(|error| stop("standard error", error))?,
                Wanted::Signals => self.take_signals()?,
            }
        }
        Ok(None)
    }

    /// What can be waited for now: (descriptor, events).
    fn interests(&self) -> Vec<(Wanted, BorrowedFd<'_>, PollFlags)> {
        let mut interests = Vec::with_capacity(5);
        let mut stream = PollFlags::empty();
        stream.set(PollFlags::IN, self.exited.is_none() && self.stdout.has_room() && self.stderr.has_room());
        stream.set(PollFlags::OUT, self.writable && self.unsent() > 0);
        if !stream.is_empty() {
            interests.push((Wanted::Stream, self.stream.as_fd(), stream));
        }
        if let Some(fd) = self.stdin.fd().filter(|_| self.takes_stdin()) {
            interests.push((Wanted::Stdin, fd, PollFlags::IN));
        }
        if let Some(fd) = self.stdout.blocked_fd() {
            interests.push((Wanted::Stdout, fd, PollFlags::OUT));
        }
        if let Some(fd) = self.stderr.blocked_fd() {
            interests.push((Wanted::Stderr, fd, PollFlags::OUT));
        }
        if let Some(signals) = self.signals.as_ref().filter(|_| self.takes_signals()) {
            interests.push((Wanted::Signals, signals.wake(), PollFlags::IN));
        }
        interests
    }

    /// Waits for at most one slice.
    fn wait(&self) -> Result<Vec<Wanted>, Stop> {
        let interests = self.interests();
        let mut fds: Vec<_> = interests.iter().map(|(_, fd, events)| PollFd::from_borrowed_fd(*fd, *events)).collect();
        let left = self.deadline.map_or(SLICE, |deadline| deadline.left().min(SLICE));
        let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(Stop::io("poll", error)),
        }
        let ready = fds.iter().zip(&interests).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(ready.map(|(_, (wanted, ..))| *wanted).collect())
    }

    fn unsent(&self) -> usize {
        self.outgoing.len().saturating_sub(self.sent)
    }

    fn takes_stdin(&self) -> bool {
        self.writable && self.exited.is_none() && self.unsent() < MAX_CHUNK
    }

    fn takes_signals(&self) -> bool {
        self.writable && self.exited.is_none() && self.unsent() < 4 * MAX_CHUNK
    }

    /// Input that is at hand needs no waiting.
    fn fill_outgoing(&mut self) -> Result<(), Stop> {
        while self.stdin.has_bytes() && self.takes_stdin() {
            self.take_stdin()?;
        }
        Ok(())
    }

    fn take_stdin(&mut self) -> Result<(), Stop> {
        match self.stdin.read() {
            Chunk::Bytes(bytes) => self.queue(&ToAgent::Stdin(bytes)),
            Chunk::End => self.queue(&ToAgent::StdinEnd),
            Chunk::Later => Ok(()),
        }
    }

    fn take_signals(&mut self) -> Result<(), Stop> {
        let signals = self.signals.as_ref().map(SignalSender::take).unwrap_or_default();
        signals.into_iter().try_for_each(|signal| self.queue(&ToAgent::Signal(signal)))
    }

    fn queue(&mut self, message: &ToAgent) -> Result<(), Stop> {
        let bytes = frame::encode_prefixed(message)
            .map_err(|error| SandboxError::Protocol { peer: "the client", message: error.to_string() })?;
        if self.unsent() == 0 {
            self.outgoing = bytes;
        } else {
            self.outgoing.drain(..self.sent);
            self.outgoing.extend_from_slice(&bytes);
        }
        self.sent = 0;
        Ok(())
    }

    fn send(&mut self) -> Result<(), Stop> {
        while self.writable && self.unsent() > 0 {
            let bytes = self.outgoing.get(self.sent..).unwrap_or_default();
            match rustix::net::send(&self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(length) => self.sent = self.sent.saturating_add(length),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                // What the agent had sent before it closed is still there to be read, the status above all.
                Err(Errno::PIPE | Errno::CONNRESET) => self.writable = false,
                Err(error) => return Err(Stop::io("stream to the agent", error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Read, Stop> {
        if !(self.exited.is_none() && self.stdout.has_room() && self.stderr.has_room()) {
            return Ok(Read::Nothing);
        }
        match rustix::net::recv(&self.stream, &mut self.scratch[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(Read::End),
            Ok((_, length)) => self.incoming.extend(self.scratch.get(..length).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Read::Nothing),
            Err(error) => return Err(Stop::io("stream to the agent", error)),
        }
        while self.exited.is_none() {
            let next = self.incoming.next().map_err(|error| broken(error.to_string()))?;
            let Some(message) = next else { break };
            self.handle(message)?;
        }
        Ok(Read::Something)
    }

    fn handle(&mut self, message: FromAgent) -> Result<(), Stop> {
        match message {
            FromAgent::Started { .. } => Ok(()),
            FromAgent::Stdout(bytes) => self.stdout.accept(bytes).map_err(|error| stop("standard output", error)),
            FromAgent::Stderr(bytes) => self.stderr.accept(bytes).map_err(|error| stop("standard error", error)),
            FromAgent::Exited(status) => {
                self.exited = Some((status, self.begun.elapsed()));
                Ok(())
            }
            FromAgent::Failed(failure) => Err(SandboxError::Exec(failure).into()),
            FromAgent::Hello { .. } | FromAgent::Goodbye => {
                Err(broken("a message of the ready stream on the stream of a command".into()))
            }
        }
    }

    fn is_flushed(&self) -> bool {
        self.stdout.blocked_fd().is_none() && self.stderr.blocked_fd().is_none()
    }

    /// The end, with the command's own status if it came, whatever made the pump stop.
    fn finish(self, otherwise: ExitStatus) -> Ending {
        let (status, duration) = self.exited.unwrap_or_else(|| (otherwise, self.begun.elapsed()));
        Ending::Exited(Exited {
            status,
            stdout: self.stdout.into_captured(),
            stderr: self.stderr.into_captured(),
            duration,
        })
    }
}

/// Why the loop stops before the command's end.
enum Stop {
    /// A local output's reader is gone.
    Closed,
    Error(Box<SandboxError>),
}

impl Stop {
    fn io(what: &'static str, error: Errno) -> Stop {
        SandboxError::io(what)(error.into()).into()
    }
}

impl From<SandboxError> for Stop {
    fn from(error: SandboxError) -> Self {
        Stop::Error(Box::new(error))
    }
}

fn stop(stream: &'static str, error: SinkError) -> Stop {
    match error {
        SinkError::Closed => Stop::Closed,
        SinkError::Full => SandboxError::OutputLimit { stream, limit: CAPTURE_LIMIT }.into(),
        SinkError::Io(source) => SandboxError::Io { what: stream, source }.into(),
    }
}

fn broken(message: String) -> Stop {
    SandboxError::Protocol { peer: "the agent", message }.into()
}
