//! Rust errors as exceptions of `microvm.exceptions`.

use microvm_machine::{KvmError, VcpuError, VmError};
use microvm_protocol::spec::SpecError;
use microvm_sandbox::{EndReason, EndReport, ExecFailure, ExecFailureKind, SandboxError, VmmCrash};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// An error that knows its exception.
pub trait ToPython {
    /// The exception to raise.
    fn to_python(self, py: Python<'_>) -> PyErr;
}

/// What separates an error's words from the advice that follows.
const HINT: &str = "; hint: ";
/// What begins the console's lines in an error's words; the console has a field of its own.
const CONSOLE: &str = "\n  console: ";

/// The file that the errors about KVM are about.
const DEVICE: &str = "/dev/kvm";

/// An exception to be made: a class of `microvm.exceptions`, its message and its keyword arguments.
struct Exception<'py> {
    py: Python<'py>,
    class: &'static str,
    message: String,
    fields: Bound<'py, PyDict>,
    failed: Option<PyErr>,
}

impl<'py> Exception<'py> {
    fn new(py: Python<'py>, class: &'static str, words: &str) -> Self {
        let words = words.split_once(CONSOLE).map_or(words, |(words, _)| words);
        let (message, hint) = words.split_once(HINT).map_or((words, None), |(message, hint)| (message, Some(hint)));
        let exception = Self { py, class, message: message.to_owned(), fields: PyDict::new(py), failed: None };
        match hint {
            Some(hint) => exception.with("hint", hint),
            None => exception,
        }
    }

    fn with(mut self, name: &str, value: impl IntoPyObject<'py>) -> Self {
        if let Err(error) = self.fields.set_item(name, value) {
            self.failed = Some(error);
        }
        self
    }

    fn with_console(self, console: &[u8]) -> Self {
        if console.is_empty() { self } else { self.with("log_tail", String::from_utf8_lossy(console)) }
    }

    fn make(self) -> PyErr {
        let made = || {
            let class = self.py.import("microvm.exceptions")?.getattr(self.class)?;
            class.call((self.message,), Some(&self.fields))
        };
        match self.failed.map_or_else(made, Err) {
            Ok(exception) => PyErr::from_value(exception),
            // The package is broken; this says how.
            Err(error) => error,
        }
    }
}

impl ToPython for PyErr {
    fn to_python(self, _: Python<'_>) -> PyErr {
        self
    }
}

impl ToPython for std::convert::Infallible {
    fn to_python(self, _: Python<'_>) -> PyErr {
        match self {}
    }
}

impl ToPython for SpecError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        config(py, self.field, &self.value, &self.allowed)
    }
}

/// A `ConfigError`, whose arguments are not those of the others.
pub fn config(py: Python<'_>, field: &str, value: &str, allowed: &str) -> PyErr {
    let made = || py.import("microvm.exceptions")?.getattr("ConfigError")?.call1((field, value, allowed));
    made().map_or_else(|error| error, PyErr::from_value)
}

impl ToPython for KvmError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        let new = |class| Exception::new(py, class, &self.to_string());
        match self {
            KvmError::Missing(_) => new("KvmMissing").with("path", DEVICE).make(),
            KvmError::Permission => new("KvmPermission").with("path", DEVICE).make(),
            KvmError::Busy | KvmError::ApiVersion { .. } | KvmError::Capability { .. } | KvmError::Unusable(_) => {
                new("KvmUnavailable").make()
            }
        }
    }
}

impl ToPython for SandboxError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        let words = self.to_string();
        let new = |class| Exception::new(py, class, &words);
        match self {
            SandboxError::Kvm { .. } => new("KvmUnavailable").make(),
            SandboxError::Config { field, .. } => refused(py, field, &words),
            SandboxError::Spawn { .. } => new("BootError").make(),
            SandboxError::Boot(report) => new("BootError").with_console(&report.console).make(),
            SandboxError::BootTimeout { console, .. } => new("BootError").with_console(&console).make(),
            SandboxError::Exec(failure) => not_started(py, &failure),
            SandboxError::Ended(report) => ended(py, &words, &report),
            SandboxError::VmmCrashed(crash) => crashed(py, &words, &crash),
            SandboxError::Protocol { .. } | SandboxError::Timeout { .. } | SandboxError::Connect { .. } => {
                new("SandboxExited").make()
            }
            SandboxError::OutputLimit { .. }
            | SandboxError::Interrupted
            | SandboxError::Forked { .. }
            | SandboxError::Io { .. } => new("MicrovmError").make(),
        }
    }
}

/// A refusal by the machine's process, which found the field out of the words alone.
fn refused(py: Python<'_>, field: Option<&'static str>, words: &str) -> PyErr {
    let field = field.unwrap_or("machine");
    let made = || {
        let class = py.import("microvm.exceptions")?.getattr("ConfigError")?;
        let (message, hint) = words.split_once(HINT).map_or((words, None), |(message, hint)| (message, Some(hint)));
        class.call_method1("refused", (field, message, hint))
    };
    made().map_or_else(|error| error, PyErr::from_value)
}

fn ended(py: Python<'_>, words: &str, report: &EndReport) -> PyErr {
    let class = match report.reason {
        EndReason::Reset | EndReason::GuestFault => "GuestFault",
        EndReason::Stopped | EndReason::Config | EndReason::Kvm | EndReason::Host => "SandboxExited",
    };
    Exception::new(py, class, words).with_console(&report.console).make()
}

fn crashed(py: Python<'_>, words: &str, crash: &VmmCrash) -> PyErr {
    Exception::new(py, "VmCrashed", words)
        .with("exit_code", crash.exit_code)
        .with("signal", crash.signal)
        .with_console(&crash.stderr)
        .make()
}

fn not_started(py: Python<'_>, failure: &ExecFailure) -> PyErr {
    let class = match (failure.kind, rustix::io::Errno::from_raw_os_error(failure.errno)) {
        (ExecFailureKind::NotFound, _) => "CommandNotFound",
        (ExecFailureKind::NotExecutable, rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => "CommandNotExecutable",
        (ExecFailureKind::NotExecutable, _) => "CommandNotLoadable",
        (ExecFailureKind::WorkingDirectory, rustix::io::Errno::NOTDIR) => "WorkdirNotADirectory",
        (ExecFailureKind::WorkingDirectory, rustix::io::Errno::NOENT) => "WorkdirNotFound",
        (ExecFailureKind::WorkingDirectory, _) => "WorkdirError",
        (ExecFailureKind::Invalid | ExecFailureKind::Resources, _) => "ExecError",
    };
    Exception::new(py, class, &failure.message).with("number", failure.errno).make()
}

impl ToPython for VmError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        Exception::new(py, "MicrovmError", &self.to_string()).make()
    }
}

impl ToPython for VcpuError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        Exception::new(py, "MicrovmError", &self.to_string()).make()
    }
}

impl ToPython for microvm_machine::CallError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        Exception::new(py, "MicrovmError", &self.to_string()).make()
    }
}

/// A plain `MicrovmError`.
pub fn other(py: Python<'_>, words: &str) -> PyErr {
    Exception::new(py, "MicrovmError", words).make()
}

/// An `ImageError`.
pub fn image(py: Python<'_>, words: &str) -> PyErr {
    Exception::new(py, "ImageError", words).make()
}
