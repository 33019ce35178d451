//! Every wait of the device has an end: one timer for all of them.

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Deadlines {
    timer: OwnedFd,
    pending: BTreeSet<(Instant, u64)>,
    armed: Option<Instant>,
}

impl Deadlines {
    pub fn new() -> io::Result<Deadlines> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Deadlines {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            pending: BTreeSet::new(),
            armed: None,
        })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    pub fn insert(&mut self, when: Instant, key: u64) {
        self.pending.insert((when, key));
        self.arm();
    }

    /// The timer may fire for nothing later; that costs less than setting it again.
    pub fn remove(&mut self, when: Instant, key: u64) {
        self.pending.remove(&(when, key));
    }

    pub fn clear(&mut self) {
        self.pending.clear();
    }

    /// Keys whose time has come, removed. Call it when the timer is readable.
    pub fn expired(&mut self, now: Instant) -> Vec<u64> {
        let mut count = [0u8; 8];
        // Nothing to read means that the timer was set again meanwhile.
        let _ = rustix::io::read(&self.timer, &mut count);
        self.armed = None;
        let later = self.pending.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut self.pending, later);
        self.arm();
        due.into_iter().map(|(_, key)| key).collect()
    }

    fn arm(&mut self) {
        let Some(&(first, _)) = self.pending.first() else {
            return;
        };
        if self.armed.is_some_and(|armed| armed <= first) {
            return;
        }
        // Zero would disarm it.
        let wait = first.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // It can only fail for a time out of range, which this is not.
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
            self.armed = Some(first);
        }
    }
}
