//! One stream from the host: a request, then the life of its command.

use crate::command::Command;
use crate::group::Groups;
use crate::request::{self, Prepared};
use crate::spawn::Spawner;
use crate::watch::{Source, Token, Watched};
use microvm_protocol::agent::{ExecFailure, ExecRequest, ExitStatus, FromAgent, ToAgent};
use microvm_protocol::frame::{self, FrameBuffer, MAX_CHUNK};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Most commands at once.
pub const MAX_COMMANDS: usize = 512;
/// Above this many bytes that wait for the host, the command's output is left in its pipes.
const MAX_UNSENT: usize = 256 * 1024;

/// What connections share.
#[derive(Debug)]
pub struct Context {
    /// The event loop.
    pub epoll: OwnedFd,
    /// Starts processes.
    pub spawner: Spawner,
    /// Control groups of the commands.
    pub groups: Groups,
    /// Process ids of the commands, and their connections.
    pub leaders: BTreeMap<i32, u64>,
    /// Room to read into. Capacity only: zeroing it would touch all of its pages.
    pub scratch: Vec<u8>,
    /// Set when the host wants the machine to end.
    pub power_off: bool,
}

impl Context {
    /// With an empty table of commands.
    pub fn new(epoll: OwnedFd, spawner: Spawner, groups: Groups) -> Context {
        Context {
            epoll,
            spawner,
            groups,
            leaders: BTreeMap::new(),
            scratch: Vec::with_capacity(MAX_CHUNK),
            power_off: false,
        }
    }
}

/// A stream from the host.
#[derive(Debug)]
pub struct Connection {
    id: u64,
    socket: Watched,
    input: FrameBuffer,
    output: Output,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The first message has not come yet.
    Request,
    /// The command runs.
    Running(Box<Command>),
    /// The last message is on its way.
    Closing,
    /// The machine ends; the host sees it by the end of this stream.
    PowerOff,
    /// The host is gone, or talks nonsense.
    Broken,
}

/// Messages that wait for the host to take them.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    start: usize,
}

impl Connection {
    /// A stream just accepted.
    pub fn new(id: u64, socket: OwnedFd) -> Connection {
        Connection {
            id,
            socket: Watched::new(socket, Token { connection: id, source: Source::Socket }),
            input: FrameBuffer::default(),
            output: Output::default(),
            phase: Phase::Request,
        }
    }

    /// Its stream or one of its command's pipes is ready.
    pub fn ready(&mut self, source: Source, flags: EventFlags, context: &mut Context) {
        if source == Source::Socket {
            self.socket_ready(flags, context);
        } else if let Phase::Running(command) = &mut self.phase {
            command.pipe_ready(source, flags, &mut self.output, &mut context.scratch);
        }
    }

    /// Its command's process was reaped.
    pub fn reaped(&mut self, status: ExitStatus) {
        if let Phase::Running(command) = &mut self.phase {
            command.reaped(status);
        }
    }

    /// Its command's time may be over.
    pub fn expire(&mut self, now: Instant) {
        if let Phase::Running(command) = &mut self.phase {
            command.expire(now);
        }
    }

    /// When [`Connection::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.command().and_then(Command::deadline)
    }

    /// The command, while it runs.
    pub fn command(&self) -> Option<&Command> {
        match &self.phase {
            Phase::Running(command) => Some(command),
            _ => None,
        }
    }

    /// Whether a command runs or its end is still being told.
    pub fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Running(_) | Phase::Closing)
    }

    /// After all events of a round: tells the command's end, sends, and says what to watch for next.
    /// Returns whether the connection goes on; if not, its command must be [abandoned](Connection::abandon).
    pub fn settle(&mut self, context: &mut Context) -> bool {
        let mut ended = None;
        if let Some(status) = self.command().and_then(Command::end) {
            self.output.push(&FromAgent::Exited(status));
            ended = Some(std::mem::replace(&mut self.phase, Phase::Closing));
        }
        let sent = self.output.send(self.socket.fd());
        // The host has the news; now there is time to clean up.
        if let Some(Phase::Running(command)) = ended {
            command.finish(context);
        }
        if sent.is_err() {
            return false;
        }
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::OUT, !self.output.is_empty());
        match &mut self.phase {
            Phase::Request | Phase::PowerOff => interest |= EventFlags::IN | EventFlags::RDHUP,
            Phase::Running(command) => {
                // The end of the stream matters also while no input is wanted.
                interest |= EventFlags::RDHUP;
                interest.set(EventFlags::IN, command.takes_input());
                if command.watch(self.output.is_full(), context).is_err() {
                    return false;
                }
            }
            Phase::Closing => {
                if self.output.is_empty() {
                    return false;
                }
            }
            Phase::Broken => return false,
        }
        self.socket.watch(&context.epoll, interest).is_ok()
    }

    /// Ends the connection; a command that still runs is killed, with everything it started.
    pub fn abandon(self, context: &mut Context) {
        if let Phase::Running(command) = self.phase {
            command.abandon(context);
        }
    }

    fn socket_ready(&mut self, flags: EventFlags, context: &mut Context) {
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        match self.phase {
            // A host that has closed its end does not want the command any more, whatever it had sent before.
            Phase::Running(_) if gone || flags.contains(EventFlags::RDHUP) => self.abort(context),
            Phase::Running(_) | Phase::Request | Phase::PowerOff => {
                if flags.intersects(EventFlags::IN | EventFlags::RDHUP) || gone {
                    self.receive(context);
                }
            }
            Phase::Closing if gone => self.abort(context),
            Phase::Closing | Phase::Broken => {}
        }
    }

    fn receive(&mut self, context: &mut Context) {
        context.scratch.clear();
        let room = spare_capacity(&mut context.scratch);
        match rustix::net::recv(self.socket.fd(), room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.abort(context),
            Ok(_) => {
                self.input.extend(&context.scratch);
                loop {
                    match self.input.next::<ToAgent>() {
                        Ok(Some(message)) => self.handle(message, context),
                        Ok(None) => break,
                        Err(_) => self.abort(context),
                    }
                    if matches!(self.phase, Phase::Broken | Phase::Closing) {
                        break;
                    }
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.abort(context),
        }
    }

    fn handle(&mut self, message: ToAgent, context: &mut Context) {
        match (&mut self.phase, message) {
            (Phase::Request, ToAgent::Exec(request)) => self.start(request, context),
            (Phase::Request, ToAgent::PowerOff) => {
                self.phase = Phase::PowerOff;
                context.power_off = true;
            }
            (Phase::Running(command), ToAgent::Stdin(bytes)) => command.input(&bytes),
            (Phase::Running(command), ToAgent::StdinEnd) => command.end_input(),
            (Phase::Running(command), ToAgent::Signal(signal)) => command.signal(signal),
            // Out of turn.
            _ => self.abort(context),
        }
    }

    fn start(&mut self, request: ExecRequest, context: &mut Context) {
        let timeout = request.timeout_ms.map(Duration::from_millis);
        let started = if context.leaders.len() >= MAX_COMMANDS {
            Err(request::too_many(MAX_COMMANDS))
        } else {
            Prepared::new(request).and_then(|prepared| self.spawn(&prepared, timeout, context))
        };
        let (message, phase) = match started {
            Ok(command) => {
                let pid = u32::try_from(command.pid()).unwrap_or_default();
                (FromAgent::Started { pid }, Phase::Running(Box::new(command)))
            }
            Err(failure) => (FromAgent::Failed(failure), Phase::Closing),
        };
        self.output.push(&message);
        self.phase = phase;
    }

    fn spawn(
        &self,
        prepared: &Prepared,
        timeout: Option<Duration>,
        context: &mut Context,
    ) -> Result<Command, ExecFailure> {
        Command::start(prepared, timeout, self.id, context).map_err(|error| prepared.explain(error))
    }

    /// The host is gone or talks nonsense.
    fn abort(&mut self, context: &mut Context) {
        if let Phase::Running(command) = std::mem::replace(&mut self.phase, Phase::Broken) {
            command.abandon(context);
        }
    }
}

impl Output {
    /// Adds a message.
    pub fn push(&mut self, message: &FromAgent) {
        // A message of ours is never too long: output comes in pieces of MAX_CHUNK, names are cut in messages.
        if let Ok(bytes) = frame::encode_prefixed(message) {
            self.bytes.extend_from_slice(&bytes);
        }
    }

    /// Whether the host must take something before more is read from the command.
    pub fn is_full(&self) -> bool {
        self.bytes.len().saturating_sub(self.start) > MAX_UNSENT
    }

    fn is_empty(&self) -> bool {
        self.start >= self.bytes.len()
    }

    /// Sends what the stream takes.
    fn send(&mut self, socket: &OwnedFd) -> Result<(), Errno> {
        while !self.is_empty() {
            let waiting = self.bytes.get(self.start..).unwrap_or_default();
            match rustix::net::send(socket, waiting, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(length) => self.start = self.start.saturating_add(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        if self.is_empty() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > MAX_CHUNK {
            self.bytes.drain(..self.start.min(self.bytes.len()));
            self.start = 0;
        }
        Ok(())
    }
}
