//! A descriptor in the event loop.

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Which descriptor of a connection an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The stream from the host.
    Socket,
    /// The command's standard input (the end that is written).
    Stdin,
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
}

/// What an event carries: the connection's number and which of its descriptors.
///
/// Numbers are never used twice, so an event that was under way when its connection ended finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Number of the connection.
    pub connection: u64,
    /// Descriptor of it.
    pub source: Source,
}

impl From<Token> for EventData {
    fn from(token: Token) -> EventData {
        EventData::new_u64(token.connection << 2 | token.source as u64)
    }
}

impl From<EventData> for Token {
    fn from(data: EventData) -> Token {
        let source = match data.u64() & 3 {
            0 => Source::Socket,
            1 => Source::Stdin,
            2 => Source::Stdout,
            _ => Source::Stderr,
        };
        Token { connection: data.u64() >> 2, source }
    }
}

/// A descriptor and what the event loop is told to watch it for.
#[derive(Debug)]
pub struct Watched {
    fd: OwnedFd,
    token: Token,
    interest: EventFlags,
}

impl Watched {
    /// Not yet watched for anything.
    pub fn new(fd: OwnedFd, token: Token) -> Self {
        Watched { fd, token, interest: EventFlags::empty() }
    }

    /// The descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Changes what it is watched for. Nothing means out of the loop altogether, because the kernel reports a
    /// hang-up of whatever is in it, wanted or not, and again and again.
    ///
    /// # Errors
    /// The kernel's: out of memory or of epoll watches.
    pub fn watch(&mut self, epoll: &OwnedFd, interest: EventFlags) -> Result<(), Errno> {
        if interest == self.interest {
            return Ok(());
        }
        if interest.is_empty() {
            epoll::delete(epoll, &self.fd)?;
        } else if self.interest.is_empty() {
            epoll::add(epoll, &self.fd, self.token.into(), interest)?;
        } else {
            epoll::modify(epoll, &self.fd, self.token.into(), interest)?;
        }
        self.interest = interest;
        Ok(())
    }
}
