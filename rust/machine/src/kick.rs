//! Getting a vCPU out of guest code, from another thread or after a time.
//!
//! A kick sets `immediate_exit` in the vCPU's `kvm_run`, then sends a real-time signal to the thread that runs it.
//! The flag covers a thread that is about to enter KVM_RUN, the signal one that is inside. The thread acknowledges
//! by clearing the flag *before* it reads how many kicks were asked for, so none is ever lost.

use crate::error::CallError;
use crate::run_page::RunPage;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A kick without an answer is repeated after this time.
const REPEAT: Duration = Duration::from_millis(10);
/// A vCPU that has not answered for so long is stuck in the host.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why a kick could not be prepared or was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KickError {
    /// The number is not a real-time signal.
    #[error("signal {number} is not a real-time signal; hint: use {min} to {max}")]
    NotRealTime {
        /// What was asked for.
        number: i32,
        /// SIGRTMIN.
        min: i32,
        /// SIGRTMAX.
        max: i32,
    },
    /// Somebody else in this process handles the signal.
    #[error("signal {number} already has a handler in this process; hint: choose another real-time signal")]
    Taken {
        /// What was asked for.
        number: i32,
    },
    /// The vCPU did not come out of KVM_RUN.
    #[error("vCPU {vcpu} did not leave guest code within {PATIENCE:?}")]
    NoAnswer {
        /// Index of the vCPU.
        vcpu: u8,
    },
    /// The host refused a call.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A real-time signal of this process whose handler does nothing but end KVM_RUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KickSignal(i32);

extern "C" fn do_nothing(_: libc::c_int) {}

impl KickSignal {
    /// Installs the handler for signal `number` (SIGRTMIN to SIGRTMAX).
    ///
    /// # Errors
    /// [`KickError::NotRealTime`], or [`KickError::Taken`] if the signal has another handler.
    pub fn install(number: i32) -> Result<Self, KickError> {
        let (min, max) = (libc::SIGRTMIN(), libc::SIGRTMAX());
        if !(min..=max).contains(&number) {
            return Err(KickError::NotRealTime { number, min, max });
        }
        let ours = do_nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: `sigaction` is plain data, for which zero is valid (empty mask, no flags).
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are valid or null, as the call allows.
        if unsafe { libc::sigaction(number, std::ptr::null(), &mut before) } != 0 {
            return Err(CallError::of_io("sigaction")(std::io::Error::last_os_error()).into());
        }
        if before.sa_sigaction == ours {
            return Ok(Self(number));
        }
        if before.sa_sigaction != libc::SIG_DFL {
            return Err(KickError::Taken { number });
        }
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ours;
        // Other system calls of the same thread go on; KVM_RUN returns EINTR all the same.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler is async-signal-safe: it does nothing.
        if unsafe { libc::sigaction(number, &action, std::ptr::null_mut()) } != 0 {
            return Err(CallError::of_io("sigaction")(std::io::Error::last_os_error()).into());
        }
        Ok(Self(number))
    }

    /// Installs the handler for the signal that is used unless somebody chooses: SIGRTMIN + 3.
    ///
    /// # Errors
    /// As [`KickSignal::install`].
    pub fn install_default() -> Result<Self, KickError> {
        Self::install(libc::SIGRTMIN().saturating_add(3))
    }

    /// The signal's number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// Makes this thread deaf to every signal but the kick. For vCPU threads, at their start.
    pub(crate) fn block_all_others(self) {
        // SAFETY: `set` is initialized by sigfillset before it is used, and the calls only touch this thread's mask.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut set);
            libc::sigdelset(&mut set, self.0);
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        }
    }
}

/// Blocks every signal while threads are made, so that they inherit the mask; restores it when dropped.
pub(crate) struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        // SAFETY: both sets are plain data; sigfillset initializes one, pthread_sigmask the other.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            Self(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Sends the kick signal to the thread that made it, again and again, until dropped.
///
/// A signal that arrives just before KVM_RUN is lost; the next one is not.
#[derive(Debug)]
pub(crate) struct Ticker(libc::c_int);

impl Ticker {
    /// First after `first`, then every `interval`.
    pub(crate) fn start(signal: KickSignal, first: Duration, interval: Duration) -> Result<Self, CallError> {
        // SAFETY: plain data, zero is valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal.0;
        event.sigev_notify_thread_id = current_thread();
        let mut timer: libc::c_int = 0;
        // SAFETY: the kernel reads `event` and writes one int, its own timer identifier.
        let made = unsafe { libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &event, &mut timer) };
        if made != 0 {
            return Err(CallError::of_io("timer_create")(std::io::Error::last_os_error()));
        }
        let ticker = Self(timer);
        // Zero would disarm the timer.
        let specification = libc::itimerspec {
            it_interval: timespec(interval.max(Duration::from_micros(1))),
            it_value: timespec(first.max(Duration::from_nanos(1))),
        };
        // SAFETY: the timer exists, the specification is valid for the call.
        let set = unsafe {
            libc::syscall(libc::SYS_timer_settime, timer, 0, &specification, std::ptr::null_mut::<libc::itimerspec>())
        };
        if set != 0 {
            return Err(CallError::of_io("timer_settime")(std::io::Error::last_os_error()));
        }
        Ok(ticker)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and deleted once.
        unsafe { libc::syscall(libc::SYS_timer_delete, self.0) };
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(duration.subsec_nanos()),
    }
}

/// Kernel identifier of this thread, asked for once.
fn current_thread() -> i32 {
    thread_local! { static THREAD: i32 = rustix::thread::gettid().as_raw_nonzero().get() }
    THREAD.with(|thread| *thread)
}

/// Kicks one vCPU. Cheap to clone, usable from any thread, also after the vCPU is gone.
#[derive(Debug, Clone)]
pub struct Kicker(Arc<State>);

#[derive(Debug)]
struct State {
    vcpu: u8,
    signal: KickSignal,
    page: RunPage,
    /// Kernel thread that is inside `Vcpu::run`; 0 if none is.
    thread: AtomicI32,
    requested: AtomicU64,
    acknowledged: AtomicU64,
    waiting: Mutex<()>,
    answered: Condvar,
}

impl Kicker {
    pub(crate) fn new(vcpu: u8, signal: KickSignal, page: RunPage) -> Self {
        Self(Arc::new(State {
            vcpu,
            signal,
            page,
            thread: AtomicI32::new(0),
            requested: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            waiting: Mutex::new(()),
            answered: Condvar::new(),
        }))
    }

    pub(crate) fn page(&self) -> &RunPage {
        &self.0.page
    }

    pub(crate) fn signal(&self) -> KickSignal {
        self.0.signal
    }

    /// Asks the vCPU to leave guest code; its `run` returns [`crate::Exit::Interrupted`], now or when next called.
    pub fn kick(&self) {
        self.0.requested.fetch_add(1, Ordering::SeqCst);
        self.0.page.set_immediate_exit(true);
        self.signal_thread();
    }

    /// Kicks, and waits until the vCPU is out of guest code.
    ///
    /// # Errors
    /// [`KickError::NoAnswer`] after one second of kicks, 10 ms apart.
    pub fn kick_and_wait(&self) -> Result<(), KickError> {
        self.kick();
        let ticket = self.0.requested.load(Ordering::SeqCst);
        let start = Instant::now();
        let mut guard = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while self.0.acknowledged.load(Ordering::SeqCst) < ticket && self.0.thread.load(Ordering::SeqCst) != 0 {
            if start.elapsed() >= PATIENCE {
                return Err(KickError::NoAnswer { vcpu: self.0.vcpu });
            }
            let waited = self.0.answered.wait_timeout(guard, REPEAT).unwrap_or_else(PoisonError::into_inner);
            guard = waited.0;
            if waited.1.timed_out() {
                self.signal_thread();
            }
        }
        Ok(())
    }

    fn signal_thread(&self) {
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: sends a signal whose handler does nothing to a thread of this process; if the thread has
            // ended since, the call fails and nothing needs to be kicked.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, self.0.signal.0) };
        }
    }

    /// The current thread is going to enter KVM_RUN.
    pub(crate) fn enter(&self) {
        self.0.thread.store(current_thread(), Ordering::SeqCst);
    }

    /// It came back. `interrupted`: with EINTR. Returns whether a kick was behind that.
    pub(crate) fn leave(&self, interrupted: bool) -> bool {
        self.0.thread.store(0, Ordering::SeqCst);
        if !interrupted {
            return false;
        }
        self.0.page.set_immediate_exit(false);
        let requested = self.0.requested.load(Ordering::SeqCst);
        let before = self.0.acknowledged.swap(requested, Ordering::SeqCst);
        let _guard = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.answered.notify_all();
        requested != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn install_other_than_real_time_signals_is_refused() {
        for number in [0, libc::SIGINT, libc::SIGRTMAX() + 1] {
            assert!(matches!(KickSignal::install(number), Err(KickError::NotRealTime { .. })));
        }
    }

    #[test]
    fn install_twice_is_one_handler_and_a_foreign_one_is_respected() {
        let free = libc::SIGRTMAX() - 1;
        assert_eq!(KickSignal::install(free), KickSignal::install(free));
        let foreign = libc::SIGRTMAX() - 2;
        extern "C" fn handler(_: libc::c_int) {}
        // SAFETY: installs a handler that does nothing, for a signal that nobody sends.
        unsafe { libc::signal(foreign, handler as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        // Two empty functions may be one after linking, so only the kind of the answer can be checked.
        assert!(matches!(KickSignal::install(foreign), Err(KickError::Taken { .. }) | Ok(_)));
        // SAFETY: as above.
        unsafe { libc::signal(foreign, libc::SIG_IGN) };
        assert_eq!(KickSignal::install(foreign), Err(KickError::Taken { number: foreign }));
    }

    #[test]
    fn ticker_interrupts_its_own_thread_until_dropped() {
        let signal = KickSignal::install_default().unwrap();
        let ticker = Ticker::start(signal, Duration::from_millis(1), Duration::from_millis(1)).unwrap();
        // SAFETY: poll of no descriptors only waits.
        let interrupted = unsafe { libc::poll(std::ptr::null_mut(), 0, 5000) } == -1;
        assert!(interrupted);
        drop(ticker);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::poll(std::ptr::null_mut(), 0, 20) }, 0);
    }
}
