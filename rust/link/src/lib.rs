//! The control socket between a client and `microvm-vmm`: one frame per message, descriptors beside it.
//!
//! Both ends use this type, and neither trusts the other: a message longer than
//! [`MAX_FRAME`], more descriptors than the caller allows, or bytes that do not decode are errors
//! after which the socket should be dropped. Every descriptor received is close-on-exec, and is closed
//! when it is not handed out.

use microvm_protocol::frame::{self, FrameError, MAX_FRAME};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, sockopt,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Most descriptors beside one message: kernel, initrd, console and the drives.
pub const MAX_DESCRIPTORS: usize = 3 + microvm_protocol::spec::MAX_DRIVES;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed; `WouldBlock` means nothing could be sent or received now.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// The bytes are not a frame of this version.
    #[error("control socket: {0}")]
    Frame(#[from] FrameError),
    /// More descriptors came than the message may carry.
    #[error("control socket: {found} descriptors beside a message, limit {limit}")]
    Descriptors {
        /// How many came, as far as the kernel delivered them.
        found: usize,
        /// How many the caller allows.
        limit: usize,
    },
}

impl LinkError {
    /// Whether trying again later may help: nothing was sent or received, and nothing is broken.
    pub fn is_would_block(&self) -> bool {
        matches!(self, LinkError::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// One end of the control link. Messages are atomic, so any number of threads may send.
#[derive(Debug)]
pub struct ControlSocket {
    socket: OwnedFd,
}

impl ControlSocket {
    /// A connected pair: the client's end, and the end to give to the VMM (close-on-exec as well).
    ///
    /// # Errors
    /// The system's, usually for want of descriptors.
    pub fn pair() -> io::Result<(ControlSocket, OwnedFd)> {
        let (here, there) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((ControlSocket { socket: here }, there))
    }

    /// Takes an inherited descriptor, which must be a `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// `InvalidInput` if it is anything else.
    pub fn from_fd(socket: OwnedFd) -> io::Result<ControlSocket> {
        let kind =
            sockopt::socket_type(&socket).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not a socket"))?;
        if kind != SocketType::SEQPACKET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a SOCK_SEQPACKET socket"));
        }
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        Ok(ControlSocket { socket })
    }

    /// Lets [`ControlSocket::send`] wait this long for a peer that does not read; then it fails with `WouldBlock`.
    ///
    /// # Errors
    /// The system's.
    pub fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.socket, sockopt::Timeout::Send, Some(timeout))?)
    }

    /// Sends one message with `descriptors` beside it: wholly or not at all.
    ///
    /// # Errors
    /// [`LinkError::Frame`] if the message is too long, [`LinkError::Descriptors`] if there are too many,
    /// else the system's; a peer that is gone is `BrokenPipe`.
    pub fn send<M: Serialize>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let bytes = frame::encode(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(LinkError::Descriptors { found: descriptors.len(), limit: MAX_DESCRIPTORS });
        }
        loop {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(LinkError::Io(error.into())),
            }
        }
    }

    /// Receives one message without waiting, or `None` when the peer has closed its end.
    ///
    /// `scratch` is enlarged to [`MAX_FRAME`] on first use, so that a loop allocates once.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; any other error means that the peer is not to be trusted.
    pub fn receive<M: DeserializeOwned>(
        &self,
        scratch: &mut Vec<u8>,
        max_descriptors: usize,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, LinkError> {
        if scratch.len() < MAX_FRAME {
            *scratch = vec![0; MAX_FRAME];
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(scratch)], &mut ancillary, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(LinkError::Io(error.into())),
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 && descriptors.is_empty() {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > max_descriptors {
            return Err(LinkError::Descriptors { found: descriptors.len(), limit: max_descriptors });
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(FrameError::TooLong { length: MAX_FRAME.saturating_add(1) }.into());
        }
        let message = frame::decode(scratch.get(..received.bytes).unwrap_or_default())?;
        Ok(Some((message, descriptors)))
    }

    /// Ends the link for every process that holds this end, as `close` alone would not after a fork.
    pub fn shutdown(&self) {
        // The peer may have gone first; there is nothing left to end then.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use microvm_protocol::control::{Event, Request};
    use proptest::prelude::*;
    use std::os::fd::AsRawFd;

    fn pair() -> (ControlSocket, ControlSocket) {
        let (here, there) = ControlSocket::pair().unwrap();
        (here, ControlSocket::from_fd(there).unwrap())
    }

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn a_message_brings_its_descriptors_in_order() {
        let (here, there) = pair();
        let files: Vec<_> = (0..3u8)
            .map(|n| {
                let mut file = tempfile::tempfile().unwrap();
                io::Write::write_all(&mut file, &[n]).unwrap();
                file
            })
            .collect();
        let borrowed: Vec<_> = files.iter().map(|f| f.as_fd()).collect();

        here.send(&Event::Connected { id: 7 }, &borrowed).unwrap();
        let (event, descriptors) = there.receive::<Event>(&mut Vec::new(), 3).unwrap().unwrap();

        assert_eq!(event, Event::Connected { id: 7 });
        let bytes: Vec<u8> = descriptors
            .into_iter()
            .map(|descriptor| {
                let mut byte = [0];
                std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(descriptor), &mut byte, 0).unwrap();
                byte[0]
            })
            .collect();
        assert_eq!(bytes, [0, 1, 2]);
    }

    #[test]
    fn received_descriptors_are_close_on_exec() {
        let (here, there) = pair();
        here.send(&Request::Kill, &[io::stdin().as_fd()]).unwrap();
        let (_, descriptors) = there.receive::<Request>(&mut Vec::new(), 1).unwrap().unwrap();
        let flags = rustix::io::fcntl_getfd(&descriptors[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert!(descriptors[0].as_raw_fd() > 2);
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (here, there) = pair();
        let before = open_descriptors();
        here.send(&Request::Kill, &[io::stdin().as_fd(); 2]).unwrap();
        let refused = there.receive::<Request>(&mut Vec::new(), 1);
        assert!(matches!(refused, Err(LinkError::Descriptors { found: 2, limit: 1 })), "{refused:?}");
        // Other tests open descriptors at the same time, but never hold this many.
        assert!(open_descriptors() <= before + 16);
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_ends() {
        let (here, there) = pair();
        assert!(there.receive::<Request>(&mut Vec::new(), 0).unwrap_err().is_would_block());
        drop(here);
        assert!(there.receive::<Request>(&mut Vec::new(), 0).unwrap().is_none());
        assert!(matches!(
            there.send(&Request::Kill, &[]),
            Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe
        ));
    }

    #[test]
    fn shutdown_ends_the_link_although_a_copy_is_open() {
        let (here, there) = pair();
        let _copy = rustix::io::dup(&here).unwrap();
        here.shutdown();
        drop(here);
        assert!(there.receive::<Request>(&mut Vec::new(), 0).unwrap().is_none());
    }

    #[test]
    fn a_peer_that_never_reads_blocks_a_sender_for_the_timeout_only() {
        let (here, _there) = pair();
        here.set_send_timeout(Duration::from_millis(50)).unwrap();
        let failed = (0..100_000).find_map(|_| here.send(&Request::Kill, &[]).err()).unwrap();
        assert!(failed.is_would_block());
    }

    #[test]
    fn an_overlong_message_is_refused() {
        let (here, there) = pair();
        sockopt::set_socket_send_buffer_size(&here, 4 * MAX_FRAME).unwrap();
        let long = vec![frame::VERSION; MAX_FRAME + 1];
        rustix::net::send(&here, &long, SendFlags::empty()).unwrap();
        let refused = there.receive::<Request>(&mut Vec::new(), 0);
        assert!(matches!(refused, Err(LinkError::Frame(FrameError::TooLong { .. }))), "{refused:?}");
    }

    #[test]
    fn a_tcp_or_file_descriptor_is_not_a_control_socket() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert_eq!(ControlSocket::from_fd(file).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(ControlSocket::from_fd(stream.into()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_message_and_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 1..400)) {
            let (here, there) = pair();
            rustix::net::send(&here, &bytes, SendFlags::empty()).unwrap();
            let _ = there.receive::<Event>(&mut Vec::new(), 1);
        }
    }
}
