//! Where console output goes: its end is kept for diagnostics, and a descriptor may get all of it.
//!
//! A vCPU never waits for the reader: output that the descriptor does not take in time is dropped and counted.

use microvm_protocol::control::CONSOLE_TAIL;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes that wait for a slow reader.
const BACKLOG: usize = 256 * 1024;

/// Console output of one machine. Clones are handles to the same.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    output: Mutex<Output>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Output {
    tail: VecDeque<u8>,
    /// Bytes for the descriptor; unused without one.
    backlog: Vec<u8>,
    dropped: u64,
    reader: Reader,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// No descriptor, or it failed.
    #[default]
    None,
    /// The writer thread waits for output.
    Idle,
    /// It is inside `write`.
    Writing,
}

impl Console {
    /// A console that keeps its tail and, if there is a descriptor, writes everything to it from a thread of its own.
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub fn new(descriptor: Option<OwnedFd>) -> io::Result<Self> {
        let console = Self::default();
        if let Some(descriptor) = descriptor {
            console.lock().reader = Reader::Idle;
            let shared = Arc::downgrade(&console.0);
            std::thread::Builder::new().name("console".into()).spawn(move || {
                while let Some(shared) = shared.upgrade() {
                    if !write_backlog(&shared, &descriptor) {
                        shared.lock().reader = Reader::None;
                        break;
                    }
                }
            })?;
        }
        Ok(console)
    }

    /// Takes output. Never waits for anybody.
    pub fn write(&self, bytes: &[u8]) {
        let mut output = self.lock();
        let kept = bytes.get(bytes.len().saturating_sub(CONSOLE_TAIL)..).unwrap_or(bytes);
        let excess = output.tail.len().saturating_add(kept.len()).saturating_sub(CONSOLE_TAIL);
        let excess = excess.min(output.tail.len());
        output.tail.drain(..excess);
        output.tail.extend(kept);
        if output.reader != Reader::None {
            let room = BACKLOG.saturating_sub(output.backlog.len());
            let (taken, lost) = bytes.split_at(room.min(bytes.len()));
            output.backlog.extend_from_slice(taken);
            let lost = u64::try_from(lost.len()).unwrap_or(u64::MAX);
            output.dropped = output.dropped.saturating_add(lost);
            if output.reader == Reader::Idle {
                self.0.changed.notify_all();
            }
        }
    }

    /// The last bytes, at most [`CONSOLE_TAIL`].
    pub fn tail(&self) -> Vec<u8> {
        self.lock().tail.iter().copied().collect()
    }

    /// Waits until the descriptor has everything, at most for `limit`. Returns whether it has.
    pub fn flush(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut output = self.lock();
        while output.reader == Reader::Writing || (output.reader == Reader::Idle && !output.backlog.is_empty()) {
            let Some(left) = limit.checked_sub(start.elapsed()) else {
                return false;
            };
            output = self.0.changed.wait_timeout(output, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        output.backlog.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits a while for output and writes it. Returns whether the descriptor is still usable.
fn write_backlog(shared: &Shared, descriptor: &OwnedFd) -> bool {
    let mut output = shared.lock();
    if output.backlog.is_empty() && output.dropped == 0 {
        // Not for ever: the console may be gone meanwhile.
        output =
            shared.changed.wait_timeout(output, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner).0;
    }
    let mut bytes = std::mem::take(&mut output.backlog);
    let dropped = std::mem::take(&mut output.dropped);
    if dropped > 0 {
        bytes.extend_from_slice(format!("\n[{dropped} bytes of console output dropped: slow reader]\n").as_bytes());
    }
    if bytes.is_empty() {
        return true;
    }
    output.reader = Reader::Writing;
    drop(output);
    let written = write_all(descriptor, &bytes);
    let mut output = shared.lock();
    output.reader = Reader::Idle;
    shared.changed.notify_all();
    drop(output);
    written
}

fn write_all(descriptor: &OwnedFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(descriptor, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            // Whoever gave the descriptor made it non-blocking.
            Err(rustix::io::Errno::AGAIN) => {
                let mut wanted = [rustix::event::PollFd::new(descriptor, rustix::event::PollFlags::OUT)];
                let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ = rustix::event::poll(&mut wanted, Some(&second));
            }
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    proptest! {
        #[test]
        fn tail_is_the_end_of_everything_written(writes in proptest::collection::vec(0usize..9000, 0..12)) {
            let console = Console::new(None).unwrap();
            let mut all = Vec::new();
            for (number, length) in writes.into_iter().enumerate() {
                let bytes = vec![number as u8; length];
                console.write(&bytes);
                all.extend(bytes);
            }
            prop_assert_eq!(console.tail(), &all[all.len().saturating_sub(CONSOLE_TAIL)..]);
        }
    }

    #[test]
    fn write_with_a_reader_that_never_reads_does_not_block() {
        let (_reader, writer) = UnixStream::pair().unwrap();
        let console = Console::new(Some(writer.into())).unwrap();
        for _ in 0..100 {
            console.write(&[b'x'; 64 * 1024]);
        }
        assert!(!console.flush(Duration::from_millis(10)));
        assert_eq!(console.tail().len(), CONSOLE_TAIL);
    }

    #[test]
    fn descriptor_gets_everything_in_order() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let console = Console::new(Some(writer.into())).unwrap();
        let mut expected = Vec::new();
        for number in 0..1000 {
            let line = format!("line {number}\n");
            console.write(line.as_bytes());
            expected.extend(line.into_bytes());
        }
        assert!(console.flush(Duration::from_secs(5)));
        drop(console);
        let mut found = Vec::new();
        reader.read_to_end(&mut found).unwrap();
        assert_eq!(found, expected);
    }

    #[test]
    fn flush_with_a_closed_reader_returns() {
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let console = Console::new(Some(writer.into())).unwrap();
        console.write(b"nobody hears this");
        console.flush(Duration::from_secs(5));
        console.write(b" nor this");
        assert_eq!(console.tail(), b"nobody hears this nor this");
    }
}
