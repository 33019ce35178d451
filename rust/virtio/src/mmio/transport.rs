//! What vCPU threads call, and the life of the worker thread.

use super::registers::{Registers, StatusChange, offset, status};
use super::worker::{Command, Shared, Worker, lock};
use crate::device::Device;
use crate::interrupt::Interrupt;
use crate::queue::validate;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// How long a vCPU that resets the device waits for its worker. After that the reset goes on in the background,
/// and Status shows NEEDS_RESET until it is done.
const RESET_PATIENCE: Duration = Duration::from_secs(2);
/// How long [`MmioTransport::stop`] waits for the worker.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

struct State {
    registers: Registers,
    /// Resets asked for so far.
    resets: u64,
    /// The last of them is not done.
    resetting: bool,
    /// DRIVER_OK was set since the last reset: the worker has something to forget.
    started: bool,
}

/// One virtio device in its MMIO window. Shared by the vCPU threads.
pub struct MmioTransport {
    name: String,
    device_id: u32,
    configuration: Vec<u8>,
    memory: GuestMemoryMmap,
    shared: Arc<Shared>,
    state: Mutex<State>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl MmioTransport {
    /// Size of the window in bytes.
    pub const SIZE: u64 = 0x1000;

    /// Starts the device's worker thread, named `name`, with all signals blocked. It sleeps until DRIVER_OK.
    /// `interrupt` is written once per interrupt.
    ///
    /// # Errors
    /// If the host refuses an eventfd, an epoll instance or a thread.
    pub fn spawn(
        name: &str,
        device: Box<dyn Device>,
        memory: GuestMemoryMmap,
        interrupt: EventFd,
    ) -> io::Result<Arc<MmioTransport>> {
        let limits = device.queue_limits();
        let shared = Arc::new(Shared::new(Interrupt::new(interrupt), limits.len())?);
        let offered = device.features() | (1 << VIRTIO_F_VERSION_1) | EVENT_IDX;
        let transport = MmioTransport {
            name: name.to_owned(),
            device_id: device.device_id(),
            configuration: device.config_space(),
            memory: memory.clone(),
            shared: Arc::clone(&shared),
            state: Mutex::new(State {
                registers: Registers::new(offered, limits),
                resets: 0,
                resetting: false,
                started: false,
            }),
            worker: Mutex::new(None),
        };
        let worker = Worker::new(device, memory, shared)?;
        let thread =
            with_signals_blocked(|| std::thread::Builder::new().name(name.to_owned()).spawn(move || worker.run()))?;
        *lock(&transport.worker) = Some(thread);
        Ok(Arc::new(transport))
    }

    /// Name given to [`MmioTransport::spawn`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One eventfd per queue. Writing to it is a kick: with KVM an ioeventfd for a 4-byte write of the queue's index
    /// to offset 0x50 of the window.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.shared.queue_events
    }

    /// How often the guest, or the device, made a reset necessary, and the last reason.
    pub fn faults(&self) -> (u64, Option<String>) {
        self.shared.faults()
    }

    /// A load by the guest. Fills `data` whatever the offset and the width are.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(offset::CONFIGURATION) {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let bytes = self.configuration.iter().skip(start);
            for (into, from) in data.iter_mut().zip(bytes) {
                *into = *from;
            }
            return;
        }
        if offset.is_multiple_of(4)
            && let Ok(word) = <&mut [u8; 4]>::try_from(data)
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A store by the guest. Whatever the offset, the width and the value are, the device stays in a defined state.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= offset::CONFIGURATION || !offset.is_multiple_of(4) {
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, register: u64) -> u32 {
        match register {
            offset::DEVICE_ID => self.device_id,
            offset::INTERRUPT_STATUS => self.shared.interrupt.status(),
            offset::STATUS => {
                let mut state = lock(&self.state);
                self.finish_reset(&mut state, Duration::ZERO);
                if state.resetting || self.shared.needs_reset() {
                    state.registers.status | status::NEEDS_RESET
                } else {
                    state.registers.status
                }
            }
            _ => lock(&self.state).registers.read(register).unwrap_or(0),
        }
    }

    fn write_register(&self, register: u64, value: u32) {
        match register {
            offset::INTERRUPT_ACKNOWLEDGE => self.shared.interrupt.acknowledge(value),
            offset::QUEUE_NOTIFY => self.kick(value),
            offset::STATUS => self.write_status(value),
            _ => {
                let mut state = lock(&self.state);
                self.finish_reset(&mut state, Duration::ZERO);
                if !state.resetting {
                    state.registers.write(register, value);
                }
            }
        }
    }

    fn kick(&self, queue: u32) {
        let event = usize::try_from(queue).ok().and_then(|queue| self.shared.queue_events.get(queue));
        if let Some(event) = event {
            // The only possible error is a full counter: the worker has not seen the last kick yet.
            let _: io::Result<()> = event.write(1);
        }
    }

    fn write_status(&self, value: u32) {
        let mut state = lock(&self.state);
        self.finish_reset(&mut state, Duration::ZERO);
        if state.resetting && value != 0 {
            return;
        }
        match state.registers.write_status(value) {
            StatusChange::None => {}
            StatusChange::Start => {
                state.started = true;
                self.start(&state.registers);
            }
            // The first reset of every boot, among others: nobody needs to be woken for it.
            StatusChange::Reset if !state.started && !self.shared.needs_reset() => state.registers.reset(),
            StatusChange::Reset => {
                if !state.resetting {
                    state.resetting = true;
                    state.resets = state.resets.saturating_add(1);
                    self.shared.send(Command::Reset);
                }
                // Linux does not wait for Status to read 0, so the reset is over when this write is.
                self.finish_reset(&mut state, RESET_PATIENCE);
            }
        }
    }

    fn finish_reset(&self, state: &mut State, patience: Duration) {
        if state.resetting && self.shared.wait_for_resets(state.resets, patience) {
            state.resetting = false;
            state.started = false;
            state.registers.reset();
        }
    }

    fn start(&self, registers: &Registers) {
        let features = registers.features();
        let event_idx = features & EVENT_IDX != 0;
        match validate(&registers.queues, &self.memory, event_idx, &self.shared.interrupt) {
            Ok(queues) => self.shared.send(Command::Activate { queues, features }),
            Err(error) => self.shared.fault(error.to_string()),
        }
    }

    /// Ends the worker, waiting a few seconds at most. The window goes on answering; nothing happens behind it.
    pub fn stop(&self) {
        let Some(thread) = lock(&self.worker).take() else {
            return;
        };
        self.shared.send(Command::Stop);
        // A worker that is stuck in the host's disk is left to itself: it holds only what it shares.
        if self.shared.wait_for_end(STOP_PATIENCE) {
            let _ = thread.join();
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Threads inherit the mask, so there is no moment in which one could take a signal.
fn with_signals_blocked<T>(action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: all zeroes is a valid sigset_t; the calls below write to these two sets only.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: `all` is a valid set.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both sets are valid.
    let code = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    if code != 0 {
        return Err(io::Error::from_raw_os_error(code));
    }
    let result = action();
    // SAFETY: `before` was filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    result
}
