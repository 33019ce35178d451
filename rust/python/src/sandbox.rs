//! A machine in its own process.

use crate::enter::enter;
use crate::error::config;
use crate::host::machine_spec;
use microvm_protocol::spec::DriveSpec;
use microvm_sandbox::{ExecRequest, ExitStatus, Input, Launch, Output, SandboxError, Status, Streams};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes};
use serde_bytes::ByteBuf;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

/// A copy of a descriptor that Python owns.
fn duplicate(py: Python<'_>, fd: RawFd, field: &str) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(config(py, field, &fd.to_string(), "an open descriptor"));
    }
    // SAFETY: the number is not -1, and the borrow ends with this call; a closed descriptor is an error of the call.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed
        .try_clone_to_owned()
        .map_err(|error| config(py, field, &fd.to_string(), &format!("an open descriptor ({error})")))
}

/// `timeout` seconds of Python, which has checked them already.
fn seconds(py: Python<'_>, timeout: f64, field: &str) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout).map_err(|error| config(py, field, &timeout.to_string(), &error.to_string()))
}

/// Signals for a running command.
#[pyclass(frozen, module = "microvm._microvm")]
pub struct SignalSender(microvm_sandbox::SignalSender);

#[pymethods]
impl SignalSender {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(microvm_sandbox::SignalSender::new()?))
    }

    #[pyo3(signature = (signal, /))]
    fn send(&self, signal: i32) {
        self.0.send(signal);
    }
}

/// How a command ended.
#[pyclass(frozen, module = "microvm._microvm")]
pub struct Exited(microvm_sandbox::Exited);

#[pymethods]
impl Exited {
    #[getter]
    fn code(&self) -> Option<u8> {
        match self.0.status {
            ExitStatus::Code(code) => Some(code),
            ExitStatus::Signal(_) | ExitStatus::TimedOut => None,
        }
    }

    #[getter]
    fn signal(&self) -> Option<i32> {
        match self.0.status {
            ExitStatus::Signal(signal) => Some(signal),
            ExitStatus::Code(_) | ExitStatus::TimedOut => None,
        }
    }

    #[getter]
    fn timed_out(&self) -> bool {
        matches!(self.0.status, ExitStatus::TimedOut)
    }

    #[getter]
    fn stdout<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.stdout)
    }

    #[getter]
    fn stderr<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.stderr)
    }

    #[getter]
    fn duration(&self) -> f64 {
        self.0.duration.as_secs_f64()
    }
}

fn input(given: &Bound<'_, PyAny>) -> PyResult<Input> {
    if given.is_none() {
        return Ok(Input::Null);
    }
    if let Ok(bytes) = given.cast::<PyBytes>() {
        return Ok(Input::Bytes(bytes.as_bytes().to_vec()));
    }
    Ok(Input::Fd(duplicate(given.py(), given.extract()?, "stdin")?))
}

fn output(given: &Bound<'_, PyAny>, field: &str) -> PyResult<Output> {
    if given.is_none() {
        return Ok(Output::Null);
    }
    if let Ok(capture) = given.cast::<PyBool>() {
        return if capture.is_true() { Ok(Output::Buffer) } else { Err(PyTypeError::new_err("True, not False")) };
    }
    Ok(Output::Fd(duplicate(given.py(), given.extract()?, field)?))
}

/// One machine.
#[pyclass(frozen, module = "microvm._microvm")]
pub struct Sandbox(microvm_sandbox::Sandbox);

#[pymethods]
impl Sandbox {
    #[staticmethod]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn launch(
        py: Python<'_>,
        vmm: PathBuf,
        kernel: RawFd,
        initrd: Option<RawFd>,
        drives: Vec<(RawFd, bool)>,
        cpus: u8,
        memory: u64,
        cmdline: String,
        console: Option<RawFd>,
        profile_us: Option<u32>,
        boot_timeout: f64,
    ) -> PyResult<Self> {
        let mut spec = machine_spec(cpus, memory, cmdline, profile_us);
        spec.drives = drives.iter().map(|(_, read_only)| DriveSpec { read_only: *read_only }).collect();
        let launch = Launch {
            vmm,
            spec,
            kernel: duplicate(py, kernel, "kernel")?.into(),
            initrd: initrd.map(|fd| duplicate(py, fd, "initrd").map(File::from)).transpose()?,
            drives: drives
                .iter()
                .map(|(fd, _)| duplicate(py, *fd, "drives").map(File::from))
                .collect::<PyResult<_>>()?,
            console: console.map(|fd| duplicate(py, fd, "console")).transpose()?,
            boot_timeout: seconds(py, boot_timeout, "boot_timeout")?,
        };
        enter(py, |check| microvm_sandbox::Sandbox::launch(launch, check)).map(Self)
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn exec(
        &self,
        py: Python<'_>,
        argv: Vec<Vec<u8>>,
        env: Vec<(Vec<u8>, Vec<u8>)>,
        cwd: Option<Vec<u8>>,
        timeout: Option<f64>,
        stdin: &Bound<'_, PyAny>,
        stdout: &Bound<'_, PyAny>,
        stderr: &Bound<'_, PyAny>,
        signals: Option<&Bound<'_, SignalSender>>,
    ) -> PyResult<Exited> {
        let timeout = timeout.map(|timeout| seconds(py, timeout, "timeout")).transpose()?;
        let request = ExecRequest {
            argv: argv.into_iter().map(ByteBuf::from).collect(),
            env: env.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            cwd: cwd.map(ByteBuf::from),
            timeout_ms: timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1)),
            stdin: false,
        };
        let streams = Streams {
            stdin: input(stdin)?,
            stdout: output(stdout, "stdout")?,
            stderr: output(stderr, "stderr")?,
            signals: signals.map(|signals| signals.get().0.clone()),
        };
        enter(py, |check| self.0.exec(request, streams, check)).map(Exited)
    }

    fn stop(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = seconds(py, timeout, "timeout")?;
        enter(py, |check| self.0.stop(timeout, check)).map(drop)
    }

    fn kill(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, |_| Ok::<_, SandboxError>(self.0.kill())).map(drop)
    }

    #[getter]
    fn status(&self) -> &'static str {
        match self.0.status() {
            Status::Running => "running",
            Status::Ended(_) => "ended",
            Status::Crashed(_) => "crashed",
        }
    }

    #[getter]
    fn kernel(&self) -> &str {
        self.0.kernel()
    }

    /// Seconds: (launch → spawned, VMM → started, VMM → ready, launch → launched).
    #[getter]
    fn timings(&self) -> (f64, f64, f64, f64) {
        let timings = self.0.timings();
        (
            timings.spawned.as_secs_f64(),
            timings.started.as_secs_f64(),
            timings.ready.as_secs_f64(),
            timings.launched.as_secs_f64(),
        )
    }

    fn console_tail<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.console_tail())
    }

    fn profile(&self) -> Vec<(u64, u32)> {
        self.0.profile()
    }
}
