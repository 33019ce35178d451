//! The agent's own stream: hello when it serves commands, goodbye when the machine ends in order.

use microvm_protocol::agent::FromAgent;
use microvm_protocol::frame::FrameBuffer;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Longest kernel release passed on to the client (Linux's own limit is 64).
const MAX_RELEASE: usize = 64;

/// The stream and what is left of it.
pub struct ReadyStream {
    stream: UnixStream,
    frames: FrameBuffer,
    greeted: bool,
}

/// What the agent said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// It serves commands; the guest's kernel release.
    Hello(String),
    /// The machine ends in order.
    Goodbye,
    /// Nothing any more. If the agent died, the guest's kernel panics, and that tells why.
    End,
    /// Something else. Before the hello this is fatal, afterwards it is the guest's own affair.
    Nonsense(String),
}

impl ReadyStream {
    /// A stream on which nothing has been said.
    pub fn new(stream: UnixStream) -> ReadyStream {
        ReadyStream { stream, frames: FrameBuffer::default(), greeted: false }
    }

    /// To be polled for reading.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The next message, if it is there; never waits. To be called until there is none, since `poll` knows
    /// nothing of messages that came together with an earlier one.
    pub fn read(&mut self) -> Option<Said> {
        self.next().or_else(|| self.receive())
    }

    fn receive(&mut self) -> Option<Said> {
        let mut bytes = [0; 4096];
        match rustix::net::recv(&self.stream, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Some(Said::End),
            Ok((_, length)) => self.frames.extend(bytes.get(..length).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => return None,
            Err(error) => return Some(Said::Nonsense(format!("the agent's ready stream: {error}"))),
        }
        self.next()
    }

    fn next(&mut self) -> Option<Said> {
        match self.frames.next() {
            Ok(None) => None,
            Ok(Some(FromAgent::Hello { kernel, .. })) if !self.greeted => {
                self.greeted = true;
                let printable = kernel.chars().filter(|c| !c.is_control());
                Some(Said::Hello(printable.take(MAX_RELEASE).collect()))
            }
            Ok(Some(FromAgent::Goodbye)) if self.greeted => Some(Said::Goodbye),
            Ok(Some(_)) => Some(Said::Nonsense("the agent said something else than hello and goodbye".into())),
            Err(error) => Some(Said::Nonsense(format!("the agent's ready stream: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use microvm_protocol::frame::encode_prefixed;
    use std::io::Write;

    fn hello(kernel: &str) -> Vec<u8> {
        encode_prefixed(&FromAgent::Hello { kernel: kernel.into(), started_ns: 1 }).unwrap()
    }

    fn stream() -> (UnixStream, ReadyStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (here, ReadyStream::new(there))
    }

    #[test]
    fn hello_in_pieces_then_goodbye() {
        let (mut agent, mut ready) = stream();
        assert_eq!(ready.read(), None);
        let bytes = hello("6.12.1");
        let (first, second) = bytes.split_at(5);
        agent.write_all(first).unwrap();
        assert_eq!(ready.read(), None);
        agent.write_all(second).unwrap();
        assert_eq!(ready.read(), Some(Said::Hello("6.12.1".into())));
        agent.write_all(&encode_prefixed(&FromAgent::Goodbye).unwrap()).unwrap();
        assert_eq!(ready.read(), Some(Said::Goodbye));
    }

    #[test]
    fn a_release_is_cut_and_has_no_control_characters() {
        let (mut agent, mut ready) = stream();
        agent.write_all(&hello(&format!("\x1b[2J{}", "x".repeat(1000)))).unwrap();
        assert_eq!(ready.read(), Some(Said::Hello(format!("[2J{}", "x".repeat(61)))));
    }

    #[test]
    fn the_end_of_the_stream_is_no_nonsense() {
        let (agent, mut ready) = stream();
        drop(agent);
        assert_eq!(ready.read(), Some(Said::End));
    }

    #[test]
    fn anything_else_is_nonsense() {
        let goodbye = encode_prefixed(&FromAgent::Goodbye).unwrap();
        let twice = [hello("a"), hello("b")].concat();
        for (bytes, skipped) in [(goodbye, 0), (twice, 1), (vec![0xff; 16], 0)] {
            let (mut agent, mut ready) = stream();
            agent.write_all(&bytes).unwrap();
            drop(agent);
            (0..skipped).for_each(|_| drop(ready.read()));
            assert!(matches!(ready.read(), Some(Said::Nonsense(_))));
        }
    }
}
