//! The event loop: one thread that serves the client until the machine or the client ends.

use crate::notes::{self, Note, Notes, Notifier};
use crate::ready::{ReadyStream, Said};
use crate::start::{Start, StartError};
use microvm_link::ControlSocket;
use microvm_protocol::control::{EndReason, EndReport, Event, Request};
use microvm_virtio::vsock::VsockHandle;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getppid, pidfd_open};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the client may leave its end unread before it counts as gone.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Most streams that wait for the agent or for the guest's answer at one time.
const MAX_PENDING: usize = 1024;

/// Most samples of a profile, and most bytes of a message, in the report of an end, so that it fits a frame.
const MAX_SAMPLES: usize = 4096;
const MAX_MESSAGE: usize = 16 * 1024;

/// The client's side of this process.
pub struct Server {
    control: ControlSocket,
    born: Instant,
    /// Readable when the client's process has ended: a fork of it may keep the control socket open.
    client: Option<OwnedFd>,
    notifier: Notifier,
    notes: Notes,
}

/// Why the loop ends.
enum End {
    /// Nobody is left to tell.
    ClientGone,
    /// The client is told.
    Machine { reason: EndReason, message: String },
}

impl End {
    fn new(reason: EndReason, message: impl Into<String>) -> End {
        End::Machine { reason, message: message.into() }
    }
}

impl Server {
    /// A server without a machine. `born` is when the process started.
    ///
    /// # Errors
    /// The system's, for want of descriptors.
    pub fn new(control: ControlSocket, born: Instant) -> Result<Server, StartError> {
        control.set_send_timeout(SEND_LIMIT)?;
        // Without a parent in sight (another process namespace), the end of the socket has to do.
        let client = getppid().and_then(|parent| pidfd_open(parent, PidfdFlags::empty()).ok());
        let (notifier, notes) = notes::pair()?;
        Ok(Server { control, born, client, notifier, notes })
    }

    /// Serves one machine to its end.
    pub fn run(self) -> ExitCode {
        let started = Start::receive(&self.control).and_then(|start| {
            let with_console = start.spec.console;
            Ok((start.assemble(&self.notifier)?, with_console))
        });
        let ((mut machine, vsock), with_console) = match started {
            Ok(started) => started,
            Err(StartError::NoRequest) => return ExitCode::SUCCESS,
            Err(error) => {
                self.report(EndReport {
                    reason: error.reason(),
                    message: shortened(error.to_string()),
                    console: Vec::new(),
                    profile: Vec::new(),
                });
                return ExitCode::SUCCESS;
            }
        };
        let notifier = self.notifier.clone();
        let end = match machine.start(Box::new(move |end| notifier.send(Note::Ended(end)))) {
            Ok(()) => Session::new(&self, vsock).serve(),
            Err(error) => End::new(error.reason(), error.to_string()),
        };
        if let End::Machine { reason, message } = end {
            let mut profile = machine.profile();
            profile.truncate(MAX_SAMPLES);
            self.report(EndReport { reason, message: shortened(message), console: machine.console_tail(), profile });
        }
        if with_console {
            // The console's reader gets the last words; a second at most.
            let _ = machine.stop();
        }
        exit_at_once()
    }

    fn report(&self, report: EndReport) {
        // If the client does not take it, nobody does.
        let _ = self.control.send(&Event::Ended(report), &[]);
    }
}

/// Ends the process without the teardown of its threads, devices and VM: closing a VM takes the kernel 15 to 25 ms,
/// and joining threads takes time as well, while the client may be waiting for this process.
fn exit_at_once() -> ! {
    // SAFETY: ends the process; the threads that still run own nothing outside of it.
    unsafe { libc::_exit(0) }
}

/// Cut at a character's end, to fit into a frame.
fn shortened(mut message: String) -> String {
    let end = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
    message.truncate(end);
    message
}

/// A machine that runs.
struct Session<'a> {
    server: &'a Server,
    vsock: VsockHandle,
    scratch: Vec<u8>,
    started: Duration,
    ready: Option<ReadyStream>,
    /// Whether the agent serves commands.
    greeted: bool,
    /// Requests for streams that came before the agent was ready: (id, port).
    waiting: Vec<(u32, u32)>,
    /// Our ends of streams the guest has not accepted yet, by id.
    connecting: HashMap<u32, UnixStream>,
}

type Step = Result<(), End>;

impl<'a> Session<'a> {
    fn new(server: &'a Server, vsock: VsockHandle) -> Self {
        Session {
            server,
            vsock,
            scratch: Vec::new(),
            started: server.born.elapsed(),
            ready: None,
            greeted: false,
            waiting: Vec::new(),
            connecting: HashMap::new(),
        }
    }

    fn serve(&mut self) -> End {
        let mut step = self.send(&Event::Started);
        loop {
            if let Err(end) = step {
                return end;
            }
            step = self.step();
        }
    }

    /// Waits, and handles whatever there is. Every source is read once, so that none starves the others.
    fn step(&mut self) -> Step {
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![readable(self.server.control.as_fd()), readable(self.server.notes.wake())];
        fds.extend(self.server.client.as_ref().map(|client| readable(client.as_fd())));
        fds.extend(self.ready.as_ref().map(|ready| readable(ready.fd())));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(End::new(EndReason::Host, format!("poll: {error}"))),
        }
        let client_ended = self.server.client.is_some() && fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if client_ended {
            return Err(End::ClientGone);
        }
        self.take_notes()?;
        self.read_ready()?;
        self.read_control()
    }

    fn take_notes(&mut self) -> Step {
        for note in self.server.notes.take() {
            match note {
                Note::Connected { id, result } => self.connected(id, result)?,
                Note::Ready(stream) => self.ready = Some(ReadyStream::new(stream)),
                Note::Ended(end) => return Err(End::new(end.reason, end.message)),
            }
        }
        Ok(())
    }

    fn read_ready(&mut self) -> Step {
        while let Some(said) = self.ready.as_mut().and_then(ReadyStream::read) {
            self.heard(said)?;
        }
        Ok(())
    }

    fn heard(&mut self, said: Said) -> Step {
        match said {
            Said::Hello(kernel) => {
                self.greeted = true;
                self.send(&Event::Ready {
                    kernel,
                    started_us: micros(self.started),
                    ready_us: micros(self.server.born.elapsed()),
                })?;
                let waiting = std::mem::take(&mut self.waiting);
                waiting.into_iter().try_for_each(|(id, port)| self.connect(id, port))
            }
            Said::Goodbye => Err(End::new(EndReason::Stopped, "the agent ended the machine in order")),
            Said::Nonsense(words) if !self.greeted => Err(End::new(EndReason::GuestFault, words)),
            Said::End | Said::Nonsense(_) => {
                self.ready = None;
                Ok(())
            }
        }
    }

    fn read_control(&mut self) -> Step {
        match self.server.control.receive::<Request>(&mut self.scratch, 0) {
            Ok(Some((Request::Connect { id, port }, _))) => self.request_stream(id, port),
            Ok(Some((Request::Kill, _))) => Err(End::new(EndReason::Stopped, "killed")),
            Ok(Some((Request::Start(_), _))) => Err(End::new(EndReason::Config, "the machine was started before")),
            Ok(None) => Err(End::ClientGone),
            Err(error) if error.is_would_block() => Ok(()),
            Err(error) => Err(End::new(EndReason::Config, error.to_string())),
        }
    }

    fn request_stream(&mut self, id: u32, port: u32) -> Step {
        if self.waiting.len().saturating_add(self.connecting.len()) >= MAX_PENDING {
            let reason = format!("more than {MAX_PENDING} streams wait for the guest");
            return self.send(&Event::ConnectFailed { id, reason });
        }
        if self.greeted {
            return self.connect(id, port);
        }
        self.waiting.push((id, port));
        Ok(())
    }

    fn connect(&mut self, id: u32, port: u32) -> Step {
        let notifier = self.server.notifier.clone();
        let done = move |result: Result<(), _>| {
            let result = result.map_err(|error: microvm_virtio::vsock::ConnectError| error.to_string());
            notifier.send(Note::Connected { id, result });
        };
        match self.vsock.connect(port, Box::new(done)) {
            Ok(stream) => {
                self.connecting.insert(id, stream);
                Ok(())
            }
            Err(error) => self.send(&Event::ConnectFailed { id, reason: error.to_string() }),
        }
    }

    fn connected(&mut self, id: u32, result: Result<(), String>) -> Step {
        // The stream is closed here at the end: the client has its own descriptor by then.
        let Some(stream) = self.connecting.remove(&id) else { return Ok(()) };
        match result {
            Ok(()) => {
                let sent = self.server.control.send(&Event::Connected { id }, &[stream.as_fd()]);
                sent.map_err(|_| End::ClientGone)
            }
            Err(reason) => self.send(&Event::ConnectFailed { id, reason }),
        }
    }

    /// A client that does not read for [`SEND_LIMIT`] is as good as gone.
    fn send(&self, event: &Event) -> Step {
        self.server.control.send(event, &[]).map_err(|_| End::ClientGone)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        assert_eq!(shortened("short".into()), "short");
        let long = shortened("ä".repeat(MAX_MESSAGE));
        assert!(long.len() <= MAX_MESSAGE && long.len() > MAX_MESSAGE - 4, "{}", long.len());
    }
}
