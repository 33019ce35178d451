//! The extension module `microvm._microvm`: converts, detaches from the interpreter, maps errors. No logic.
//!
//! * [`enter`]: the one way into a wait: detached, with a look for signals every 100 ms.
//! * [`error`]: each Rust error as its exception of `microvm.exceptions`.
//! * [`host`]: what this host's KVM can do, and the limits of a machine.
//! * [`image`]: images and the initial file system.
//! * [`sandbox`]: a machine in its own process.
//! * [`vm`], [`exits`]: the low-level machine in this process.

mod enter;
mod error;
mod exits;
mod host;
mod image;
mod sandbox;
mod vm;

use pyo3::prelude::pymodule;

#[pymodule(gil_used = false)]
mod _microvm {
    #[pymodule_export]
    use crate::exits::{
        Debug, FailEntry, Halt, InternalError, Interrupted, IoIn, IoOut, MemoryFault, MmioRead, MmioWrite, Shutdown,
        SystemEvent, Timeout, Unexpected,
    };
    #[pymodule_export]
    use crate::host::{Backend, check_spec, detect_backend};
    #[pymodule_export]
    use crate::image::{default_image, directory_image, initramfs, kernel_modules, kernel_release};
    #[pymodule_export]
    use crate::sandbox::{Exited, Sandbox, SignalSender};
    #[pymodule_export]
    use crate::vm::{Vcpu, Vm};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name Python knows")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
