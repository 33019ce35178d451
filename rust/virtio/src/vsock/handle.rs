//! The host's side of the device: opening streams to the guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use vmm_sys_util::eventfd::EventFd;

/// Why the host got no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The guest's driver has not started the device.
    #[error("the guest has no vsock driver running; hint: connect after it is ready")]
    NotReady,
    /// The guest answered that nothing listens there, or that its backlog is full.
    #[error("the guest refused the connection: nothing listens on this vsock port, or its backlog is full")]
    Refused,
    /// The guest did not answer.
    #[error("the guest did not answer within {} s", super::CONNECT_PATIENCE.as_secs())]
    TimedOut,
    /// The device was reset, broke, or ended meanwhile.
    #[error("the vsock device was reset")]
    Reset,
    /// The table is full.
    #[error("{} vsock streams are open, which is the limit", super::MAX_STREAMS)]
    TooMany,
    /// The host refused to watch the socket.
    #[error("the host is out of descriptors or memory for another vsock stream")]
    Host,
}

/// Called once, from the device's worker thread; must not block.
pub type Done = Box<dyn FnOnce(Result<(), ConnectError>) + Send>;

/// Calls its [`Done`] exactly once, even when it is dropped on some unforeseen way.
pub(super) struct Completion(Option<Done>);

impl Completion {
    pub fn finish(mut self, result: Result<(), ConnectError>) {
        if let Some(done) = self.0.take() {
            done(result);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(ConnectError::Reset));
        }
    }
}

pub(super) struct ConnectRequest {
    pub port: u32,
    pub stream: UnixStream,
    pub completion: Completion,
}

/// Opens streams to the guest, from any thread.
#[derive(Clone)]
pub struct VsockHandle {
    requests: Sender<ConnectRequest>,
    wake: Arc<EventFd>,
}

impl VsockHandle {
    /// Asks the guest for a stream to `port`. The returned end may be written at once; what it holds is worth
    /// something only after `done` got `Ok`, which takes [`super::CONNECT_PATIENCE`] at most.
    ///
    /// # Errors
    /// If the host refuses a socket pair, or the device is gone; then `done` is not called.
    pub fn connect(&self, port: u32, done: Done) -> io::Result<UnixStream> {
        let (client, stream) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let completion = Completion(Some(done));
        let request = ConnectRequest { port, stream, completion };
        if let Err(mut refused) = self.requests.send(request) {
            refused.0.completion.0 = None;
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the vsock device is gone"));
        }
        // The only possible error is a full counter, and then the worker is awake.
        let _: io::Result<()> = self.wake.write(1);
        Ok(client)
    }
}

pub(super) fn pair() -> io::Result<(VsockHandle, Receiver<ConnectRequest>, Arc<EventFd>)> {
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let (requests, receiver) = channel();
    let handle = VsockHandle { requests, wake: Arc::clone(&wake) };
    Ok((handle, receiver, wake))
}
