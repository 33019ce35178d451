//! `microvm-vmm`: the process that runs one virtual machine.
//!
//! It is started by the client with a control socket as descriptor 3 and takes no other input: no arguments, no
//! environment, no configuration files. One thread serves the control socket; vCPUs and devices have their own.
//! It ends when its machine does, and when its client does.
//!
//! * [`jail`]: what the process gives up before it reads its first request.
//! * [`start`]: from a request and its descriptors to a machine.
//! * [`notes`]: what other threads tell the event loop.
//! * [`ready`]: the agent's own stream: hello and goodbye.
//! * [`server`]: the event loop.

mod jail;
mod notes;
mod ready;
mod server;
mod start;

use microvm_link::ControlSocket;
use microvm_protocol::control::CONTROL_FD;
use server::Server;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let born = Instant::now();
    if std::env::args_os().nth(1).is_some_and(|word| word == "--version") {
        println!("microvm-vmm {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let control = match inherited(CONTROL_FD).and_then(ControlSocket::from_fd) {
        Ok(control) => control,
        Err(error) => {
            eprintln!(
                "microvm-vmm: descriptor {CONTROL_FD} is no control socket ({error}); hint: this program is started by `microvm`, not by hand"
            );
            return ExitCode::from(2);
        }
    };
    match jail::enter().map_err(start::StartError::from).and_then(|()| Server::new(control, born)) {
        Ok(server) => server.run(),
        Err(error) => {
            eprintln!("microvm-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Takes a descriptor that the client left open for this process.
fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed for one call, which fails if the number is not open.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: it is open, and nothing has been opened in this process yet, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
