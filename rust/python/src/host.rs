//! What this host's KVM can do, and the limits of a machine.

use crate::enter::enter;
use crate::error::ToPython;
use microvm_machine::Kind;
use microvm_protocol::spec::{MAX_VCPUS, MachineSpec};
use pyo3::prelude::*;

/// `check_spec(cpus, memory, cmdline, profile_us, max_cpus)`: the machine's own limits.
#[pyfunction]
#[pyo3(signature = (cpus, memory, cmdline, profile_us, max_cpus, /))]
pub fn check_spec(
    py: Python<'_>,
    cpus: &Bound<'_, PyAny>,
    memory: u64,
    cmdline: String,
    profile_us: Option<u32>,
    max_cpus: Option<u8>,
) -> PyResult<()> {
    // A number that does not even fit is out of range like any other.
    let Ok(vcpus) = cpus.extract::<u8>() else {
        let allowed = format!("1 to {MAX_VCPUS}");
        return Err(crate::error::config(py, "cpus", &cpus.to_string(), &allowed));
    };
    machine_spec(vcpus, memory, cmdline, profile_us)
        .validate(max_cpus.unwrap_or(MAX_VCPUS))
        .map_err(|error| error.to_python(py))
}

/// A spec without files.
pub fn machine_spec(vcpus: u8, memory: u64, command_line: String, profile_us: Option<u32>) -> MachineSpec {
    MachineSpec { vcpus, memory, initrd: false, command_line, drives: Vec::new(), console: false, profile_us }
}

/// What `/dev/kvm` can do.
#[pyclass(frozen, module = "microvm._microvm", name = "Backend")]
pub struct Backend(pub microvm_machine::Backend);

#[pymethods]
impl Backend {
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.kind() {
            Kind::Hardware => "hardware",
            Kind::Software => "software",
        }
    }

    #[getter]
    fn flavour(&self) -> &'static str {
        self.0.kernel_flavour()
    }

    #[getter]
    fn max_cpus(&self) -> u8 {
        self.0.max_vcpus()
    }

    #[getter]
    fn command_line(&self) -> &'static str {
        self.0.base_command_line()
    }

    fn __repr__(&self) -> String {
        format!("Backend(kind={:?}, max_cpus={})", self.kind(), self.max_cpus())
    }
}

/// `detect_backend()`: opens `/dev/kvm`.
#[pyfunction]
pub fn detect_backend(py: Python<'_>) -> PyResult<Backend> {
    enter(py, |_| microvm_machine::Backend::detect()).map(Backend)
}
