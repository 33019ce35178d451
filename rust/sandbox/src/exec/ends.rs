//! The local ends of a command's streams: a source of input, two sinks of output.

use super::{CAPTURE_LIMIT, Input, Output};
use microvm_protocol::frame::MAX_CHUNK;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `PIPE_BUF`: what a pipe that polls as writable takes without waiting.
const WRITE_AT_ONCE: usize = 4096;

/// Bytes a sink may hold back before the guest is not read any more. One blocked output does not stop the
/// other one at once, since both come over one stream.
const HELD_BACK: usize = 4 * MAX_CHUNK;

/// Standard input.
pub(super) enum Source {
    Bytes { bytes: Vec<u8>, next: usize },
    Fd(OwnedFd),
    Ended,
}

/// What a source has now.
pub(super) enum Chunk {
    Bytes(Vec<u8>),
    End,
    /// Nothing yet.
    Later,
}

impl Source {
    pub fn new(input: Input) -> Source {
        match input {
            Input::Null => Source::Ended,
            Input::Bytes(bytes) => Source::Bytes { bytes, next: 0 },
            Input::Fd(fd) => Source::Fd(fd),
        }
    }

    /// The descriptor to poll before the next read.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Source::Fd(fd) => Some(fd.as_fd()),
            Source::Bytes { .. } | Source::Ended => None,
        }
    }

    /// Whether a read needs no poll.
    pub fn has_bytes(&self) -> bool {
        matches!(self, Source::Bytes { .. })
    }

    /// The next bytes. For a descriptor: only when `poll` said that it is readable.
    pub fn read(&mut self) -> Chunk {
        let chunk = match self {
            Source::Ended => return Chunk::Later,
            Source::Bytes { bytes, next } => {
                let end = next.saturating_add(MAX_CHUNK).min(bytes.len());
                let chunk = bytes.get(*next..end).unwrap_or_default().to_vec();
                *next = end;
                chunk
            }
            Source::Fd(fd) => {
                let mut chunk = vec![0; MAX_CHUNK];
                match rustix::io::read(fd, &mut chunk) {
                    Ok(length) => {
                        chunk.truncate(length);
                        chunk
                    }
                    Err(Errno::AGAIN | Errno::INTR) => return Chunk::Later,
                    Err(_) => Vec::new(),
                }
            }
        };
        if chunk.is_empty() {
            *self = Source::Ended;
            return Chunk::End;
        }
        Chunk::Bytes(chunk)
    }
}

/// Standard output or error.
pub(super) struct Sink {
    kind: Kind,
}

enum Kind {
    Null,
    Buffer(Vec<u8>),
    Fd { fd: OwnedFd, held: Vec<u8>, next: usize, at_once: usize },
}

/// Why a sink takes no more.
#[derive(Debug)]
pub(super) enum SinkError {
    /// Its reader is gone.
    Closed,
    /// [`CAPTURE_LIMIT`] is reached.
    Full,
    Io(io::Error),
}

impl Sink {
    pub fn new(output: Output) -> Sink {
        let kind = match output {
            Output::Null => Kind::Null,
            Output::Buffer => Kind::Buffer(Vec::new()),
            Output::Fd(fd) => {
                // A regular file always takes everything; `poll` has nothing to say about it.
                let regular = rustix::fs::fstat(&fd)
                    .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
                let at_once = if regular { usize::MAX } else { WRITE_AT_ONCE };
                Kind::Fd { fd, held: Vec::new(), next: 0, at_once }
            }
        };
        Sink { kind }
    }

    /// Takes bytes from the guest, and passes on what can be passed on without waiting.
    pub fn accept(&mut self, bytes: Vec<u8>) -> Result<(), SinkError> {
        match &mut self.kind {
            Kind::Null => Ok(()),
            Kind::Buffer(captured) => {
                if bytes.len() > CAPTURE_LIMIT.saturating_sub(captured.len()) {
                    return Err(SinkError::Full);
                }
                captured.extend_from_slice(&bytes);
                Ok(())
            }
            Kind::Fd { held, next, .. } => {
                if *next == held.len() {
                    *held = bytes;
                    *next = 0;
                } else {
                    held.drain(..*next);
                    *next = 0;
                    held.extend_from_slice(&bytes);
                }
                self.flush()
            }
        }
    }

    /// Writes held bytes as far as that needs no waiting.
    pub fn flush(&mut self) -> Result<(), SinkError> {
        let Kind::Fd { fd, held, next, at_once } = &mut self.kind else {
            return Ok(());
        };
        while let Some(rest) = held.get(*next..).filter(|rest| !rest.is_empty()) {
            if *at_once == WRITE_AT_ONCE && !is_writable(fd.as_fd()) {
                return Ok(());
            }
            match rustix::io::write(&*fd, rest.get(..*at_once).unwrap_or(rest)) {
                Ok(length) => *next = next.saturating_add(length),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SinkError::Closed),
                Err(error) => return Err(SinkError::Io(error.into())),
            }
        }
        held.clear();
        *next = 0;
        Ok(())
    }

    /// The descriptor to poll, if bytes are held back for it.
    pub fn blocked_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Fd { fd, held, next, .. } if *next < held.len() => Some(fd.as_fd()),
            Kind::Null | Kind::Buffer(_) | Kind::Fd { .. } => None,
        }
    }

    /// Whether it may take another chunk.
    pub fn has_room(&self) -> bool {
        match &self.kind {
            Kind::Fd { held, next, .. } => held.len().saturating_sub(*next) < HELD_BACK,
            Kind::Null | Kind::Buffer(_) => true,
        }
    }

    /// What was captured.
    pub fn into_captured(self) -> Vec<u8> {
        match self.kind {
            Kind::Buffer(captured) => captured,
            Kind::Null | Kind::Fd { .. } => Vec::new(),
        }
    }
}

/// Whether a write would not wait, or would fail at once (an error counts as writable).
fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
}
