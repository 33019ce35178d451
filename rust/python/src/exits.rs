//! Why a vCPU left guest code, as Python values: comparable, printable, usable in `match`.

use microvm_machine::Exit;
use pyo3::prelude::*;

/// Defines one frozen class for each kind of exit.
macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* } ($($positional:literal),*))*) => {$(
        $(#[$doc])*
        #[pyclass(frozen, eq, get_all, module = "microvm.vm")]
        #[derive(Debug, PartialEq, Eq)]
        pub struct $name { $(pub $field: $type),* }

        #[pymethods]
        impl $name {
            #[new]
            fn new($($field: $type),*) -> Self {
                Self { $($field),* }
            }

            #[classattr]
            #[pyo3(name = "__match_args__")]
            fn match_args(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyTuple>> {
                pyo3::types::PyTuple::new(py, { let names: &[&str] = &[$($positional),*]; names })
            }

            fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
                let names: &[&str] = &[$(stringify!($field)),*];
                let field = |name: &&str| Ok(format!("{name}={}", slf.getattr(*name)?.repr()?.to_str()?));
                let fields = names.iter().map(field).collect::<PyResult<Vec<String>>>()?;
                Ok(format!("{}({})", stringify!($name), fields.join(", ")))
            }
        }
    )*};
}

exits! {
    /// The guest reads a port; answer with `size * count` bytes.
    IoIn { port: u16, size: u8, count: u32 } ("port", "size")
    /// The guest writes a port.
    IoOut { port: u16, data: Vec<u8>, size: u8 } ("port", "data")
    /// The guest reads where there is no memory; answer with `size` bytes.
    MmioRead { address: u64, size: u8 } ("address", "size")
    /// The guest writes where there is no memory.
    MmioWrite { address: u64, data: Vec<u8> } ("address", "data")
    /// HLT.
    Halt { } ()
    /// Triple fault.
    Shutdown { } ()
    /// The guest asked KVM for an end or a reset.
    SystemEvent { kind: u32 } ("kind")
    /// A breakpoint or single step of the host.
    Debug { address: u64, exception: u32 } ("address", "exception")
    /// KVM cannot go on with this guest.
    InternalError { suberror: u32, data: Vec<u64>, instruction: Option<Vec<u8>>, message: String } ("suberror", "message")
    /// The processor refused the guest's state.
    FailEntry { reason: u64, cpu: u32 } ("reason")
    /// Guest memory could not be given.
    MemoryFault { flags: u64, address: u64, size: u64 } ("address", "size")
    /// `kick` was called, or a signal came whose handler did not raise.
    Interrupted { } ()
    /// The time given to `run` is over.
    Timeout { } ()
    /// An exit that this library never asks for.
    Unexpected { what: String } ("what")
}

/// The Python value of an exit.
pub fn to_python(py: Python<'_>, exit: Exit) -> PyResult<Py<PyAny>> {
    Ok(match exit {
        Exit::IoIn { port, size, count } => Py::new(py, IoIn { port, size, count })?.into_any(),
        Exit::IoOut { port, size, data } => Py::new(py, IoOut { port, data, size })?.into_any(),
        Exit::MmioRead { address, size } => Py::new(py, MmioRead { address, size })?.into_any(),
        Exit::MmioWrite { address, data } => Py::new(py, MmioWrite { address, data })?.into_any(),
        Exit::Halt => Py::new(py, Halt {})?.into_any(),
        Exit::Shutdown => Py::new(py, Shutdown {})?.into_any(),
        Exit::SystemEvent { kind } => Py::new(py, SystemEvent { kind })?.into_any(),
        Exit::Debug { address, exception } => Py::new(py, Debug { address, exception })?.into_any(),
        Exit::InternalError(error) => {
            let message = error.to_string();
            let instruction = error.instruction();
            let error = InternalError { suberror: error.suberror, data: error.data, instruction, message };
            Py::new(py, error)?.into_any()
        }
        Exit::FailEntry { reason, cpu } => Py::new(py, FailEntry { reason, cpu })?.into_any(),
        Exit::MemoryFault { flags, address, size } => Py::new(py, MemoryFault { flags, address, size })?.into_any(),
        Exit::Interrupted => Py::new(py, Interrupted {})?.into_any(),
        Exit::Timeout => Py::new(py, Timeout {})?.into_any(),
        Exit::Unexpected { what } => Py::new(py, Unexpected { what })?.into_any(),
        other => Py::new(py, Unexpected { what: format!("{other:?}") })?.into_any(),
    })
}
