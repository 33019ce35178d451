//! Running one command over one stream to the agent.
//!
//! The pump moves bytes both ways at once and never holds more than a few chunks: while a local output does not
//! take bytes, the guest is not read; while the guest takes none, local input is not read.
//!
//! * **Descriptors of the caller** stay as they are: their open file descriptions may be shared (a terminal is,
//!   with the shell), so `O_NONBLOCK` is never set on them. The pump reads and writes only after `poll` says so, and
//!   writes at most `PIPE_BUF` bytes at a time, which then does not wait unless somebody else writes there too.
//! * **Standard input** is read ahead by up to a few chunks; what the command did not take is lost, as with
//!   `docker run -i`. An error reading it ends it.
//! * **A closed local output** (`microvm run … | head`) ends the command as `SIGPIPE` would: the stream is closed,
//!   the agent kills the process tree, and the status is [`ExitStatus::Signal`] with `SIGPIPE`.
//! * **Captured output** is limited to [`CAPTURE_LIMIT`] bytes per stream, since the guest chooses how much it writes.

mod ends;
mod pump;

use crate::Check;
use crate::error::SandboxError;
use crate::signals::SignalSender;
use microvm_protocol::agent::{ExecRequest, ExitStatus, ToAgent};
use microvm_protocol::frame;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Most bytes captured from one output of one command.
pub const CAPTURE_LIMIT: usize = 1 << 30;

/// How much later than the guest the host enforces a command's time limit.
pub const TIMEOUT_GRACE: Duration = Duration::from_secs(2);

/// Where a command's standard input comes from.
#[derive(Debug, Default)]
pub enum Input {
    /// `/dev/null` in the guest.
    #[default]
    Null,
    /// These bytes, then the end.
    Bytes(Vec<u8>),
    /// Read from a descriptor until its end.
    Fd(OwnedFd),
}

/// Where a command's output goes.
#[derive(Debug, Default)]
pub enum Output {
    /// Read and dropped.
    #[default]
    Null,
    /// Kept for [`Exited`].
    Buffer,
    /// Written to a descriptor.
    Fd(OwnedFd),
}

/// What a command reads and writes.
#[derive(Debug, Default)]
pub struct Streams {
    /// Standard input.
    pub stdin: Input,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// Signals for the command.
    pub signals: Option<SignalSender>,
}

/// A command that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exited {
    /// How.
    pub status: ExitStatus,
    /// Standard output, if it was captured ([`Output::Buffer`]); with [`ExitStatus::TimedOut`] what came until then.
    pub stdout: Vec<u8>,
    /// Standard error, likewise.
    pub stderr: Vec<u8>,
    /// From the request until the status came.
    pub duration: Duration,
}

impl Exited {
    /// A command whose time was over before the guest took it.
    pub(crate) fn never_begun(begun: Instant) -> Exited {
        Exited { status: ExitStatus::TimedOut, stdout: Vec::new(), stderr: Vec::new(), duration: begun.elapsed() }
    }
}

/// How a pump ended, if not with an error.
#[derive(Debug)]
pub(crate) enum Ending {
    Exited(Exited),
    /// The stream ended before the command did.
    Lost,
}

/// A command that may be sent to an agent: valid, and short enough for a frame.
pub(crate) struct Command {
    /// The encoded request.
    opening: Vec<u8>,
    /// When the host enforces the time limit.
    limit: Option<Duration>,
    streams: Streams,
}

impl Command {
    pub fn new(mut request: ExecRequest, streams: Streams) -> Result<Command, SandboxError> {
        validate(&request)?;
        request.stdin = !matches!(streams.stdin, Input::Null);
        let limit = request.timeout_ms.map(|ms| Duration::from_millis(ms).saturating_add(TIMEOUT_GRACE));
        let opening = frame::encode_prefixed(&ToAgent::Exec(request)).map_err(|error| SandboxError::Config {
            field: Some("argv"),
            message: format!(
                "argv, env and cwd are too long together: {error}; hint: pass long input as standard input"
            ),
        })?;
        Ok(Command { opening, limit, streams })
    }

    /// When the host enforces the time limit, if there is one.
    pub fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// Runs it over `stream`, which is closed at the end. `begun` is when the caller asked for it.
    pub fn run(self, stream: OwnedFd, begun: Instant, check: Check<'_>) -> Result<Ending, SandboxError> {
        pump::Pump::new(stream, self, begun).run(check)
    }
}

/// Refuses what no guest could run. (The agent checks again.)
fn validate(request: &ExecRequest) -> Result<(), SandboxError> {
    let refuse = |field: &'static str, message: String| Err(SandboxError::Config { field: Some(field), message });
    if request.argv.is_empty() {
        return refuse("argv", "argv is empty: at least the program's name".into());
    }
    if let Some(bad) = request.argv.iter().find(|word| word.contains(&0)) {
        return refuse(
            "argv",
            format!("argv has a NUL byte in {:?}: arguments end at one", String::from_utf8_lossy(bad)),
        );
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
            let name = String::from_utf8_lossy(name);
            return refuse("env", format!("env has the name {name:?}: not empty, no '=' and no NUL byte"));
        }
        if value.contains(&0) {
            let name = String::from_utf8_lossy(name);
            return refuse("env", format!("env has a NUL byte in the value of {name:?}: values end at one"));
        }
    }
    if request.cwd.as_ref().is_some_and(|path| path.contains(&0)) {
        return refuse("cwd", "cwd has a NUL byte: paths end at one".into());
    }
    Ok(())
}
