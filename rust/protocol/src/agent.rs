//! Agent link: one vsock stream per command, from the client to [`EXEC_PORT`] in the guest.
//!
//! The client sends one [`ToAgent::Exec`], then standard input and signals; the agent answers
//! [`FromAgent::Started`] or [`FromAgent::Failed`], then output, then [`FromAgent::Exited`], and closes.
//! Closing the stream early kills the command and everything it started.

use serde::{Deserialize, Serialize};

/// Guest port on which the agent takes commands.
pub const EXEC_PORT: u32 = 1024;

/// Host port to which the agent connects once, when it is ready; it then sends [`FromAgent::Hello`]
/// and later, just before an orderly end of the machine, [`FromAgent::Goodbye`].
pub const READY_PORT: u32 = 1025;

/// A command to run. Semantics are those of `subprocess.Popen(argv, env=…, cwd=…)`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments, as bytes without NUL; a program without a slash is looked up in `PATH` of `env`.
    pub argv: Vec<serde_bytes::ByteBuf>,
    /// The whole environment, as (name, value) without NUL.
    pub env: Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>,
    /// Working directory; `None` is `/`.
    pub cwd: Option<serde_bytes::ByteBuf>,
    /// Kill the whole process tree after this many milliseconds.
    pub timeout_ms: Option<u64>,
    /// Whether standard input will come; otherwise it is `/dev/null`.
    pub stdin: bool,
}

/// Client to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// First message on a stream.
    Exec(ExecRequest),
    /// Bytes for standard input, at most [`crate::frame::MAX_CHUNK`].
    Stdin(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Standard input ends.
    StdinEnd,
    /// Deliver a signal (Linux number) to the command's process group.
    Signal(i32),
    /// First message on a stream: end the machine in order (sync, kill, power off).
    PowerOff,
}

/// Agent to client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// On the ready stream only: the agent serves [`EXEC_PORT`] from now on.
    Hello {
        /// Guest kernel release (`uname -r`).
        kernel: String,
        /// Nanoseconds of guest CLOCK_BOOTTIME when the agent started.
        started_ns: u64,
    },
    /// On the ready stream only: the machine ends in order.
    Goodbye,
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Bytes of standard output, at most [`crate::frame::MAX_CHUNK`].
    Stdout(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Bytes of standard error, at most [`crate::frame::MAX_CHUNK`].
    Stderr(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The command ended and its output is complete. Last message.
    Exited(ExitStatus),
    /// The command could not be started. Last message.
    Failed(ExecFailure),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It called exit with this code.
    Code(u8),
    /// This signal ended it.
    Signal(i32),
    /// Its time was over; the process tree was killed.
    TimedOut,
}

/// Why a command could not be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFailure {
    /// Which step failed.
    pub kind: ExecFailureKind,
    /// The guest's errno.
    pub errno: i32,
    /// One line for a person: names the file or limit.
    pub message: String,
}

/// The step at which starting a command failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecFailureKind {
    /// The program does not exist (exit code 127).
    NotFound,
    /// The program exists and cannot be executed (exit code 126).
    NotExecutable,
    /// The working directory is missing or not a directory (exit code 126).
    WorkingDirectory,
    /// The request is not valid: empty argv, NUL byte, over a limit (exit code 125).
    Invalid,
    /// The guest is out of processes, memory or descriptors (exit code 125).
    Resources,
}
