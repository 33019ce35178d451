//! Signals for a running command.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Delivers signals to one running command: make one, give a clone to [`crate::Streams::signals`], and call
/// [`SignalSender::send`] from another thread, from the check or from a signal handler.
///
/// As with `kill`, a signal that is already pending is not delivered twice.
#[derive(Debug, Clone)]
pub struct SignalSender {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Bit n-1 is signal n.
    pending: AtomicU64,
    wake: OwnedFd,
}

impl SignalSender {
    /// A sender that is not connected to a command yet; signals sent meanwhile are kept.
    ///
    /// # Errors
    /// The system's, for want of descriptors.
    pub fn new() -> io::Result<SignalSender> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(SignalSender { shared: Arc::new(Shared { pending: AtomicU64::new(0), wake }) })
    }

    /// Delivers `signal` (Linux number, 1 to 64) to the command's process group, soon; a number outside that
    /// range does nothing. Never waits, allocates or takes a lock.
    pub fn send(&self, signal: i32) {
        let Some(bit) = u32::try_from(signal).ok().and_then(|n| n.checked_sub(1)).and_then(|n| 1u64.checked_shl(n))
        else {
            return;
        };
        self.shared.pending.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then the reader is awake already.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
    }

    /// The signals sent since the last call, in ascending order.
    pub(crate) fn take(&self) -> Vec<i32> {
        // Empty the counter first: a signal sent in between wakes the reader again.
        let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
        let pending = self.shared.pending.swap(0, Ordering::SeqCst);
        (1i32..)
            .zip(0u32..64)
            .filter(|(_, bit)| pending.rotate_right(*bit) & 1 == 1)
            .map(|(signal, _)| signal)
            .collect()
    }

    /// Readable when a signal is pending.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_arrive_once_and_numbers_out_of_range_do_nothing() {
        let sender = SignalSender::new().unwrap();
        for signal in [15, 2, 15, 64, 1, 0, -1, 65, i32::MAX, i32::MIN] {
            sender.clone().send(signal);
        }
        assert_eq!(sender.take(), [1, 2, 15, 64]);
        assert_eq!(sender.take(), []);
    }
}
