//! From a request and its descriptors to a machine.

use crate::notes::{Note, Notifier};
use microvm_link::{ControlSocket, LinkError, MAX_DESCRIPTORS};
use microvm_machine::{Backend, Files, KvmError, Machine, MachineError, NewDevice, Origin};
use microvm_protocol::agent::READY_PORT;
use microvm_protocol::control::{EndReason, Request};
use microvm_protocol::spec::{MachineSpec, SpecError};
use microvm_virtio::block::{Block, BlockError};
use microvm_virtio::rng::Rng;
use microvm_virtio::vsock::{Vsock, VsockHandle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The guest's vsock address. Each VM has its own VMM and its own vsock, so one number serves them all.
const GUEST_CID: u64 = 3;

/// How long the client may take to send its first request.
const START_LIMIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The client is gone, or does not speak.
    #[error("the client did not ask for a machine")]
    NoRequest,
    /// The control socket or a message on it.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Something else came first.
    #[error("the first request is not a start")]
    NotStart,
    /// The files do not match the specification.
    #[error("{found} descriptors beside the specification, which needs {expected}")]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many the specification stands for.
        expected: usize,
    },
    /// A field is out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// KVM is not usable.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A disk was refused.
    #[error("drive {index}: {source}")]
    Drive {
        /// Its position, 0 first.
        index: usize,
        /// Why.
        source: BlockError,
    },
    /// The machine could not be assembled.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl StartError {
    /// The kind of end that this is for the client.
    pub fn reason(&self) -> EndReason {
        match self {
            StartError::NoRequest
            | StartError::Link(_)
            | StartError::NotStart
            | StartError::Descriptors { .. }
            | StartError::Spec(_)
            | StartError::Drive { .. } => EndReason::Config,
            StartError::Kvm(_) => EndReason::Kvm,
            StartError::Machine(error) => error.reason(),
            StartError::Host(_) => EndReason::Host,
        }
    }
}

/// What the client wants.
#[derive(Debug)]
pub struct Start {
    /// The machine, not validated yet.
    pub spec: MachineSpec,
    /// Its files, as many as the specification stands for.
    descriptors: Vec<OwnedFd>,
}

impl Start {
    /// Waits for the first request.
    ///
    /// # Errors
    /// [`StartError::NoRequest`] at the end of the socket, or what is wrong with the request.
    pub fn receive(control: &ControlSocket) -> Result<Start, StartError> {
        poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&START_LIMIT)).map_err(io::Error::from)?;
        let received = match control.receive::<Request>(&mut Vec::new(), MAX_DESCRIPTORS) {
            Err(error) if error.is_would_block() => None,
            other => other?,
        };
        let (request, descriptors) = received.ok_or(StartError::NoRequest)?;
        let Request::Start(spec) = request else { return Err(StartError::NotStart) };
        if descriptors.len() != spec.descriptors() {
            return Err(StartError::Descriptors { found: descriptors.len(), expected: spec.descriptors() });
        }
        Ok(Start { spec, descriptors })
    }

    /// Makes the machine. Nothing runs yet.
    ///
    /// # Errors
    /// Any [`StartError`].
    pub fn assemble(self, notifier: &Notifier) -> Result<(Machine, VsockHandle), StartError> {
        let backend = Backend::detect()?;
        self.spec.validate(backend.max_vcpus())?;
        let mut descriptors = self.descriptors.into_iter();
        let missing = StartError::Descriptors { found: 0, expected: self.spec.descriptors() };
        let kernel = File::from(descriptors.next().ok_or(missing)?);
        let initrd = if self.spec.initrd { descriptors.next().map(File::from) } else { None };

        let mut devices = Vec::new();
        for (index, (drive, file)) in self.spec.drives.iter().zip(descriptors.by_ref()).enumerate() {
            let device =
                Block::new(File::from(file), drive.read_only).map_err(|source| StartError::Drive { index, source })?;
            devices.push(NewDevice { name: format!("drive{index}"), device: Box::new(device) });
        }
        let (vsock, handle) = Vsock::new(GUEST_CID, Box::new(ready_port(notifier.clone())))?;
        devices.push(NewDevice { name: "vsock".into(), device: Box::new(vsock) });
        devices.push(NewDevice { name: "rng".into(), device: Box::new(Rng::new()) });

        let console = if self.spec.console { descriptors.next() } else { None };
        let origin = Origin::Boot(Files { kernel, initrd, console });
        let machine = Machine::assemble(&backend, &self.spec, devices, origin)?;
        Ok((machine, handle))
    }
}

/// Takes the guest's first connection to the ready port and refuses every other.
fn ready_port(notifier: Notifier) -> impl FnMut(u32) -> Option<UnixStream> + Send {
    let mut notifier = Some(notifier);
    move |port| {
        if port != READY_PORT {
            return None;
        }
        let notifier = notifier.take()?;
        let (here, there) = UnixStream::pair().ok()?;
        notifier.send(Note::Ready(here));
        Some(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notes;
    use microvm_protocol::spec::DriveSpec;
    use std::os::fd::{AsFd, BorrowedFd};

    fn spec() -> MachineSpec {
        MachineSpec {
            vcpus: 1,
            memory: 64 << 20,
            initrd: true,
            command_line: String::new(),
            drives: vec![DriveSpec { read_only: true }],
            console: false,
            profile_us: None,
        }
    }

    fn received(request: Option<&Request>, descriptors: &[BorrowedFd<'_>]) -> Result<Start, StartError> {
        let (client, vmm) = ControlSocket::pair().unwrap();
        if let Some(request) = request {
            client.send(request, descriptors).unwrap();
        }
        drop(client);
        Start::receive(&ControlSocket::from_fd(vmm).unwrap())
    }

    #[test]
    fn a_start_needs_exactly_its_descriptors() {
        let input = io::stdin();
        let start = Request::Start(spec());
        assert_eq!(received(Some(&start), &[input.as_fd(); 3]).unwrap().spec, spec());
        for count in [0, 1, 2, 4] {
            let error = received(Some(&start), &vec![input.as_fd(); count]).unwrap_err();
            assert!(matches!(error, StartError::Descriptors { found, expected: 3 } if found == count), "{error:?}");
            assert_eq!(error.reason(), EndReason::Config);
        }
    }

    #[test]
    fn without_a_start_there_is_no_machine() {
        assert!(matches!(received(None, &[]), Err(StartError::NoRequest)));
        assert!(matches!(received(Some(&Request::Kill), &[]), Err(StartError::NotStart)));
    }

    #[test]
    fn the_ready_port_is_taken_once_and_no_other_port_is_served() {
        let (notifier, notes) = notes::pair().unwrap();
        let mut accept = ready_port(notifier);
        assert!(accept(READY_PORT + 1).is_none());
        assert!(accept(READY_PORT).is_some());
        assert!(accept(READY_PORT).is_none());
        assert_eq!(notes.take().count(), 1);
    }
}
