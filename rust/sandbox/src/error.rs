//! Everything that can go wrong between a client and its machine.

use microvm_protocol::agent::ExecFailure;
use microvm_protocol::control::{EndReason, EndReport};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The caller's [`crate::Check`] asked to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Why a machine could not be started or a command could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The VMM program could not be started.
    #[error("cannot start {}: {source}; hint: the program comes with microvm, reinstall it or set MICROVM_VMM", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// `/dev/kvm` is missing or not usable.
    #[error("{message}")]
    Kvm {
        /// What is wrong and how to fix it.
        message: String,
    },
    /// A field, or a file given with the machine, was refused.
    #[error("{message}")]
    Config {
        /// The field, where the client found it out itself; else the message names it.
        field: Option<&'static str>,
        /// The field or file, the value and what is allowed.
        message: String,
    },
    /// The machine ended before its agent was ready.
    #[error("the machine did not boot: {}", Report(.0))]
    Boot(Box<EndReport>),
    /// The agent was not ready in time.
    #[error("the machine did not boot within {} s{}", limit.as_secs_f32(), ConsoleTail(console))]
    BootTimeout {
        /// The limit that was set.
        limit: Duration,
        /// The last bytes of the serial console.
        console: Vec<u8>,
    },
    /// The command could not be started.
    #[error("{}", .0.message)]
    Exec(ExecFailure),
    /// The machine ended while something was asked of it, or before.
    #[error("the machine has ended: {}", Report(.0))]
    Ended(Box<EndReport>),
    /// The VMM process ended without a report.
    #[error("{0}")]
    VmmCrashed(VmmCrash),
    /// The VMM or the agent sent something that is not in the protocol.
    #[error("{peer} broke the protocol: {message}")]
    Protocol {
        /// `"the VMM"` or `"the agent"`.
        peer: &'static str,
        /// What it sent.
        message: String,
    },
    /// The guest gave no answer in time.
    #[error("{what}: no answer within {} s", limit.as_secs_f32())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The guest refused a stream: its agent does not listen, or too many streams are open.
    #[error("no stream to the agent: {reason}")]
    Connect {
        /// The VMM's words.
        reason: String,
    },
    /// A command wrote more than can be captured.
    #[error("{stream} is longer than {limit} bytes; hint: write it to a file instead of capturing it")]
    OutputLimit {
        /// `"standard output"` or `"standard error"`.
        stream: &'static str,
        /// The limit in bytes.
        limit: usize,
    },
    /// The caller's check asked to give up.
    #[error("interrupted")]
    Interrupted,
    /// The machine belongs to the process that started it, and this is a fork of that process.
    #[error("this machine belongs to process {owner}; hint: start machines after the fork, in the child")]
    Forked {
        /// Process id of the owner.
        owner: u32,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl SandboxError {
    /// For `map_err`: names what was tried.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
        move |source| SandboxError::Io { what, source }
    }

    /// The error for a machine that ended with `report`, before or after its agent was ready.
    pub(crate) fn ended(report: &EndReport, ready: bool) -> SandboxError {
        match report.reason {
            EndReason::Kvm => SandboxError::Kvm { message: report.message.clone() },
            EndReason::Config => SandboxError::Config { field: None, message: report.message.clone() },
            _ if ready => SandboxError::Ended(Box::new(report.clone())),
            _ => SandboxError::Boot(Box::new(report.clone())),
        }
    }

    /// The serial console's last bytes, where a machine was involved.
    pub fn console_tail(&self) -> Option<&[u8]> {
        match self {
            SandboxError::Boot(report) | SandboxError::Ended(report) => Some(&report.console),
            SandboxError::BootTimeout { console, .. } => Some(console),
            _ => None,
        }
    }
}

impl From<Interrupted> for SandboxError {
    fn from(Interrupted: Interrupted) -> Self {
        SandboxError::Interrupted
    }
}

/// How the VMM process ended, if not with a report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmCrash {
    /// Its exit code, unless a signal ended it. Both are `None` if somebody else reaped the process.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The last bytes of its standard error.
    pub stderr: Vec<u8>,
}

impl fmt::Display for VmmCrash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.signal, self.exit_code) {
            (Some(signal), _) => write!(f, "the VMM process was ended by signal {signal}")?,
            (None, Some(code)) => write!(f, "the VMM process exited with code {code} and no report")?,
            (None, None) => write!(f, "the VMM process is gone")?,
        }
        let words = String::from_utf8_lossy(&self.stderr);
        match words.trim() {
            "" => Ok(()),
            words => write!(f, ": {words}"),
        }
    }
}

/// Shows reason, message and the end of the console.
struct Report<'a>(&'a EndReport);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.0.reason {
            EndReason::Stopped => "stopped",
            EndReason::Reset => "the guest reset itself (kernel panic or reboot)",
            EndReason::GuestFault => "guest fault",
            EndReason::Config => "refused",
            EndReason::Kvm => "KVM",
            EndReason::Host => "the host refused something",
        };
        f.write_str(reason)?;
        if !self.0.message.is_empty() {
            write!(f, ": {}", self.0.message)?;
        }
        ConsoleTail(&self.0.console).fmt(f)
    }
}

/// Shows the last lines of a console, without control characters, on lines of their own.
struct ConsoleTail<'a>(&'a [u8]);

/// Lines of the console shown in a message; the whole tail is in the error's field.
const SHOWN_LINES: usize = 20;

impl fmt::Display for ConsoleTail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let skipped = lines.len().saturating_sub(SHOWN_LINES);
        for line in lines.iter().skip(skipped) {
            let printable: String = line.chars().filter(|c| !c.is_control()).collect();
            write!(f, "\n  console: {printable}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(reason: EndReason) -> EndReport {
        EndReport {
            reason,
            message: "words".into(),
            console: b"first\r\n\x1b[31mKernel panic\r\n".to_vec(),
            profile: Vec::new(),
        }
    }

    #[test]
    fn each_reason_becomes_its_error() {
        assert!(matches!(SandboxError::ended(&report(EndReason::Kvm), false), SandboxError::Kvm { .. }));
        assert!(matches!(SandboxError::ended(&report(EndReason::Config), false), SandboxError::Config { .. }));
        assert!(matches!(SandboxError::ended(&report(EndReason::Reset), false), SandboxError::Boot(_)));
        assert!(matches!(SandboxError::ended(&report(EndReason::Reset), true), SandboxError::Ended(_)));
    }

    #[test]
    fn messages_carry_the_console_without_control_characters() {
        let shown = SandboxError::ended(&report(EndReason::Reset), true).to_string();
        assert!(shown.contains("words"), "{shown}");
        assert!(shown.contains("console: [31mKernel panic"), "{shown}");
        assert!(!shown.contains('\x1b'), "{shown}");
    }

    #[test]
    fn a_crash_names_the_signal_or_the_code_and_the_last_words() {
        let killed = VmmCrash { exit_code: None, signal: Some(9), stderr: Vec::new() };
        assert_eq!(killed.to_string(), "the VMM process was ended by signal 9");
        let exited = VmmCrash { exit_code: Some(3), signal: None, stderr: b"oh no\n".to_vec() };
        assert_eq!(exited.to_string(), "the VMM process exited with code 3 and no report: oh no");
    }
}
