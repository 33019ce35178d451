//! The device's own thread: kicks, the device's events, and the transport's commands.

use crate::device::{Device, Progress};
use crate::interrupt::{CONFIGURATION, Interrupt};
use crate::queue::{ActiveQueue, Malformed};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// A lock whose holder panicked still guards plain data.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) enum Command {
    Activate { queues: Vec<ActiveQueue>, features: u64 },
    Reset,
    Stop,
}

#[derive(Default)]
struct Answers {
    /// Resets done.
    resets: u64,
    ended: bool,
}

/// What the transport and its worker share.
pub(super) struct Shared {
    pub interrupt: Arc<Interrupt>,
    pub queue_events: Vec<EventFd>,
    needs_reset: AtomicBool,
    faults: AtomicU64,
    last_fault: Mutex<Option<String>>,
    commands: Mutex<VecDeque<Command>>,
    control: EventFd,
    answers: Mutex<Answers>,
    answered: Condvar,
}

impl Shared {
    pub fn new(interrupt: Interrupt, queues: usize) -> io::Result<Shared> {
        let queue_events =
            (0..queues).map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        Ok(Shared {
            interrupt: Arc::new(interrupt),
            queue_events,
            needs_reset: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            last_fault: Mutex::new(None),
            commands: Mutex::new(VecDeque::new()),
            control: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            answers: Mutex::new(Answers::default()),
            answered: Condvar::new(),
        })
    }

    /// DEVICE_NEEDS_RESET, with the interrupt that says so.
    pub fn fault(&self, message: String) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        *lock(&self.last_fault) = Some(message);
        self.needs_reset.store(true, Ordering::SeqCst);
        self.interrupt.raise(CONFIGURATION);
    }

    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub fn faults(&self) -> (u64, Option<String>) {
        (self.faults.load(Ordering::Relaxed), lock(&self.last_fault).clone())
    }

    pub fn send(&self, command: Command) {
        lock(&self.commands).push_back(command);
        // The only possible error is a full counter, and then the worker is awake.
        let _: io::Result<()> = self.control.write(1);
    }

    /// Whether `resets` resets are done, after waiting at most `patience` for it. A worker that ended did them all.
    pub fn wait_for_resets(&self, resets: u64, patience: Duration) -> bool {
        let pending = |answers: &mut Answers| answers.resets < resets && !answers.ended;
        let (answers, _) = self
            .answered
            .wait_timeout_while(lock(&self.answers), patience, pending)
            .unwrap_or_else(PoisonError::into_inner);
        answers.resets >= resets || answers.ended
    }

    /// Whether the worker ended, after waiting at most `patience` for it.
    pub fn wait_for_end(&self, patience: Duration) -> bool {
        let (answers, _) = self
            .answered
            .wait_timeout_while(lock(&self.answers), patience, |answers| !answers.ended)
            .unwrap_or_else(PoisonError::into_inner);
        answers.ended
    }

    fn answer(&self, change: impl FnOnce(&mut Answers)) {
        change(&mut lock(&self.answers));
        self.answered.notify_all();
    }
}

/// Says that the worker ended, however it ends.
struct EndMark(Arc<Shared>);

impl Drop for EndMark {
    fn drop(&mut self) {
        self.0.answer(|answers| answers.ended = true);
    }
}

const CONTROL: u64 = u64::MAX;
const DEVICE: u64 = u64::MAX - 1;

pub(super) struct Worker {
    device: Box<dyn Device>,
    memory: GuestMemoryMmap,
    shared: Arc<Shared>,
    epoll: Epoll,
    active: bool,
    /// Queues with work left from the last turn.
    pending: Vec<bool>,
    events_pending: bool,
}

impl Worker {
    pub fn new(device: Box<dyn Device>, memory: GuestMemoryMmap, shared: Arc<Shared>) -> io::Result<Worker> {
        let epoll = Epoll::new()?;
        let watch = |fd, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data));
        watch(shared.control.as_raw_fd(), CONTROL)?;
        for (event, index) in shared.queue_events.iter().zip(0u64..) {
            watch(event.as_raw_fd(), index)?;
        }
        if let Some(events) = device.events() {
            watch(events.as_raw_fd(), DEVICE)?;
        }
        let pending = vec![false; shared.queue_events.len()];
        Ok(Worker { device, memory, shared, epoll, active: false, pending, events_pending: false })
    }

    /// Until [`Command::Stop`]. Each turn looks at everything once, so nothing starves.
    pub fn run(mut self) {
        let _mark = EndMark(Arc::clone(&self.shared));
        let mut events = [EpollEvent::default(); 16];
        loop {
            let busy = self.events_pending || self.pending.contains(&true);
            let ready = match self.epoll.wait(if busy { 0 } else { -1 }, &mut events) {
                Ok(count) => events.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.shared.fault(format!("the worker's epoll failed: {error}"));
                    return;
                }
            };
            let mut commands = false;
            for event in ready {
                match event.data() {
                    CONTROL => commands = true,
                    DEVICE => self.events_pending = true,
                    queue => self.kicked(queue),
                }
            }
            if commands && !self.obey() {
                return;
            }
            if std::mem::take(&mut self.events_pending) {
                let progress = self.guarded(|device| device.process_events());
                self.events_pending = progress == Progress::More;
            }
            for queue in 0..self.pending.len() {
                if self.active && self.take_pending(queue) {
                    let progress = self.guarded(|device| device.process(queue));
                    self.set_pending(queue, progress == Progress::More);
                }
            }
        }
    }

    fn kicked(&mut self, queue: u64) {
        let Ok(queue) = usize::try_from(queue) else {
            return;
        };
        if let Some(event) = self.shared.queue_events.get(queue) {
            let _: io::Result<u64> = event.read();
        }
        // A kick before DRIVER_OK or after a fault means nothing.
        self.set_pending(queue, self.active);
    }

    fn take_pending(&mut self, queue: usize) -> bool {
        self.pending.get_mut(queue).is_some_and(std::mem::take)
    }

    fn set_pending(&mut self, queue: usize, value: bool) {
        if let Some(pending) = self.pending.get_mut(queue) {
            *pending = value && self.active;
        }
    }

    /// Runs a call into the device. An error or a panic takes the device to NEEDS_RESET, not the machine.
    fn guarded(&mut self, call: impl FnOnce(&mut dyn Device) -> Result<Progress, Malformed>) -> Progress {
        let device = self.device.as_mut();
        match catch_unwind(AssertUnwindSafe(|| call(device))) {
            Ok(Ok(progress)) => return progress,
            Ok(Err(malformed)) => self.fault(malformed.to_string()),
            Err(_) => self.fault("the device's code panicked".into()),
        }
        Progress::Done
    }

    fn fault(&mut self, message: String) {
        self.deactivate();
        self.shared.fault(message);
    }

    fn deactivate(&mut self) {
        self.active = false;
        self.pending.fill(false);
        let device = self.device.as_mut();
        // A device that panics in its reset is replaced by none of its state; it was told to drop it all.
        let _ = catch_unwind(AssertUnwindSafe(|| device.reset()));
    }

    /// False after [`Command::Stop`].
    fn obey(&mut self) -> bool {
        let _: io::Result<u64> = self.shared.control.read();
        loop {
            let command = lock(&self.shared.commands).pop_front();
            match command {
                None => return true,
                Some(Command::Activate { queues, features }) => self.activate(queues, features),
                Some(Command::Reset) => {
                    self.deactivate();
                    for event in &self.shared.queue_events {
                        let _: io::Result<u64> = event.read();
                    }
                    self.shared.needs_reset.store(false, Ordering::SeqCst);
                    self.shared.interrupt.clear();
                    self.shared.answer(|answers| answers.resets = answers.resets.saturating_add(1));
                }
                Some(Command::Stop) => {
                    self.deactivate();
                    return false;
                }
            }
        }
    }

    fn activate(&mut self, queues: Vec<ActiveQueue>, features: u64) {
        let memory = self.memory.clone();
        let device = self.device.as_mut();
        match catch_unwind(AssertUnwindSafe(|| device.activate(memory, queues, features))) {
            Ok(Ok(())) => {
                self.active = true;
                // Chains may have been made available, and kicks lost, before DRIVER_OK.
                self.pending.fill(true);
            }
            Ok(Err(error)) => self.fault(format!("the device cannot start: {error}")),
            Err(_) => self.fault("the device's code panicked".into()),
        }
    }
}
