//! The sockets to the host: the listener for commands, and the stream on which the machine says that it is
//! ready and, later, that it ends.

use crate::boot::BootError;
use crate::mounts::last_error;
use microvm_protocol::agent::{EXEC_PORT, FromAgent, READY_PORT};
use microvm_protocol::frame;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// Most streams that wait to be accepted.
const BACKLOG: i32 = 256;
/// How long the host may take to accept the ready stream.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the host may take to end the machine after Goodbye, before the machine ends itself.
const FAREWELL: Duration = Duration::from_millis(100);

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// Listens for the host's commands.
///
/// # Errors
/// No vsock in this kernel, or the port is taken.
pub fn listen() -> Result<OwnedFd, BootError> {
    let failed =
        |error| BootError::new(format!("listen on vsock port {EXEC_PORT}"), error).with_hint(vsock_hint(error));
    let socket = vsock_socket().map_err(failed)?;
    let address = vsock_address(libc::VMADDR_CID_ANY, EXEC_PORT);
    // SAFETY: the pointer and the length describe `address`, which the kernel only reads.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_LENGTH) };
    if result != 0 {
        return Err(failed(last_error()));
    }
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(socket)
}

/// Listens on a Unix socket, for tests.
///
/// # Errors
/// The kernel's.
pub fn listen_unix(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts one stream. A vsock stream from inside the guest is closed at once: commands come from the host alone.
///
/// # Errors
/// The kernel's; `AGAIN` when there is none.
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    loop {
        // SAFETY: all zeroes is a valid sockaddr_vm.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        let mut length = VSOCK_LENGTH;
        // SAFETY: the kernel stores at most `length` bytes through the pointer, the size of `address`. A Unix
        // socket's address is cut to that; only its family is then looked at.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                (&raw mut address).cast(),
                &raw mut length,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            )
        };
        if fd < 0 {
            match last_error() {
                Errno::INTR | Errno::CONNABORTED => continue,
                error => return Err(error),
            }
        }
        // SAFETY: a descriptor the kernel has just made, owned by nobody else.
        let stream = unsafe { OwnedFd::from_raw_fd(fd) };
        let is_vsock = libc::c_int::from(address.svm_family) == libc::AF_VSOCK;
        if !is_vsock || address.svm_cid == libc::VMADDR_CID_HOST {
            return Ok(stream);
        }
    }
}

/// The ready stream, on its way.
#[derive(Debug)]
pub struct Connecting(OwnedFd);

/// The ready stream after Hello. What the host does with it is of no further interest, until the end.
#[derive(Debug)]
pub struct Ready(OwnedFd);

impl Connecting {
    /// Asks for the stream; does not wait for the answer.
    ///
    /// # Errors
    /// No vsock device.
    pub fn start() -> Result<Connecting, BootError> {
        let socket = vsock_socket().map_err(not_reached)?;
        let address = vsock_address(libc::VMADDR_CID_HOST, READY_PORT);
        // SAFETY: the pointer and the length describe `address`, which the kernel only reads.
        let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_LENGTH) };
        match if result == 0 { Errno::INPROGRESS } else { last_error() } {
            Errno::INPROGRESS | Errno::INTR => Ok(Connecting(socket)),
            error => Err(not_reached(error)),
        }
    }

    /// Waits for the host and says Hello.
    ///
    /// # Errors
    /// The host does not take the stream.
    pub fn say_hello(self, started_ns: u64) -> Result<Ready, BootError> {
        let Connecting(socket) = self;
        if !wait_for(&socket, PollFlags::OUT, ANSWER) {
            return Err(not_reached(Errno::TIMEDOUT));
        }
        rustix::net::sockopt::socket_error(&socket).and_then(|result| result).map_err(not_reached)?;
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        send(&socket, &FromAgent::Hello { kernel, started_ns }).map_err(not_reached)?;
        Ok(Ready(socket))
    }
}

impl Ready {
    /// Says that the machine ends in order, and gives the host a moment to end it.
    pub fn say_goodbye(self) {
        let Ready(socket) = self;
        if send(&socket, &FromAgent::Goodbye).is_ok() {
            wait_for(&socket, PollFlags::RDHUP, FAREWELL);
        }
    }
}

fn not_reached(error: Errno) -> BootError {
    BootError::new(format!("connect to the host (vsock port {READY_PORT})"), error).with_hint(vsock_hint(error))
}

fn vsock_hint(error: Errno) -> &'static str {
    match error {
        Errno::AFNOSUPPORT => "; hint: the kernel has no vsock, built in or in /modules/order",
        Errno::NODEV | Errno::NETUNREACH => "; hint: no driver has taken a vsock device",
        _ => "",
    }
}

/// Sends one small message on a stream whose buffer is empty.
fn send(socket: &OwnedFd, message: &FromAgent) -> Result<(), Errno> {
    let bytes = frame::encode_prefixed(message).map_err(|_| Errno::MSGSIZE)?;
    let sent = rustix::io::retry_on_intr(|| rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::AGAIN) }
}

/// Whether one of the events (or an error) came in time.
fn wait_for(socket: &OwnedFd, events: PollFlags, limit: Duration) -> bool {
    let start = Instant::now();
    loop {
        let rest = limit.saturating_sub(start.elapsed());
        let timeout = Timespec::try_from(rest).ok();
        let mut poll = [PollFd::new(socket, events)];
        match rustix::event::poll(&mut poll, timeout.as_ref()) {
            Ok(count) => return count > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn vsock_socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, FLAGS, None)
}

/// Size of an address, as the kernel wants it.
#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const VSOCK_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}
