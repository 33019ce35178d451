//! Host side of a microvm: starts a `microvm-vmm` process and runs commands in its guest.
//!
//! Synchronous, and without Python types. Every wait has an end and calls the caller's [`Check`] at least
//! every 100 ms; whatever dies (the guest, its agent, the VMM), every pending call ends within a second
//! and says why.
//!
//! * [`Sandbox`]: one machine in one VMM process: [`Sandbox::launch`], [`Sandbox::exec`], [`Sandbox::stop`].
//! * [`exec`]: what a command reads and writes ([`Streams`], [`Input`], [`Output`]) and the pump that moves it.
//! * [`signals`]: signals for a running command, from another thread or a signal handler.
//! * `process`: spawns, watches and reaps the VMM; `monitor`: the thread that does so, and the state it keeps.
//! * [`error`]: everything that can go wrong.

mod deadline;
pub mod error;
pub mod exec;
mod monitor;
mod process;
mod sandbox;
pub mod signals;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use error::{Interrupted, SandboxError, VmmCrash};
pub use exec::{Exited, Input, Output, Streams};
pub use microvm_protocol::agent::{ExecFailure, ExecFailureKind, ExecRequest, ExitStatus};
pub use microvm_protocol::control::{EndReason, EndReport};
pub use microvm_protocol::spec::{DriveSpec, MachineSpec};
pub use sandbox::{Launch, Sandbox, Status, Timings};
pub use signals::SignalSender;

/// Called at least every 100 ms in every wait; an error ends the wait. (Python looks for signals here.)
pub type Check<'a> = &'a mut dyn FnMut() -> Result<(), Interrupted>;
