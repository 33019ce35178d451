//! Socket device (VIRTIO 1.2, 5.10): stream sockets between guest and host.
//!
//! The host's end of every stream is a Unix socket. Bytes go from guest memory to that socket and back without a copy
//! in between; only what a slow host reader does not take waits here, within the credit the guest was given.
//!
//! An interrupt costs a guest on software KVM more than 100 us (two register accesses), so there are as few as
//! possible: one for everything a turn of the worker did, and *used transmit buffers wait for the next one* (the guest
//! only frees them), unless half of the queue is used up, 10 ms have passed, or the guest wants no interrupt anyway.

mod connection;
mod deadlines;
mod handle;
pub mod packet;
mod streams;
#[cfg(test)]
mod tests;

pub use handle::{ConnectError, Done, VsockHandle};

use crate::device::{Device, Progress};
use crate::interrupt::USED_BUFFER;
use crate::queue::{ActiveQueue, Chain, Malformed, Token};
use handle::ConnectRequest;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use streams::Streams;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Most streams at once, those included that only deliver their last bytes.
pub const MAX_STREAMS: usize = 1024;
/// Bytes the guest may send on a stream before the host has read them.
pub const WINDOW: u32 = 512 * 1024;
/// How long the guest may take to answer a connection request of the host.
pub const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest may take to close a stream that the host has closed.
pub const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// VIRTIO_VSOCK_F_STREAM.
const FEATURE_STREAM: u64 = 1;
/// How long used transmit buffers wait for another reason to interrupt.
const USED_PATIENCE: Duration = Duration::from_millis(10);
/// Packets from the guest, and to it, for one turn.
const BUDGET: usize = 64;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Receive buffers cost the guest memory from the start, 4 KiB each: 64 of them hold a Linux guest's whole window.
const QUEUES: &[u16] = &[64, 128, 8];

/// Tokens of the device's own descriptors, and the timer's key for used transmit buffers.
const WAKE: u64 = 0;
const TIMER: u64 = 1;
const USED: u64 = 2;

/// Called with the host port when the guest asks for a stream: the host's end of it, or `None` to refuse.
/// Runs on the device's worker thread; must not block.
pub type GuestConnect = Box<dyn FnMut(u32) -> Option<UnixStream> + Send>;

struct Active {
    memory: GuestMemoryMmap,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    /// The guest is asked to kick when it has receive buffers again.
    starved: bool,
    /// The transmit queue was left with packets in it.
    unfinished: bool,
    /// Chains of the transmit queue that are done and not on the used ring yet.
    used: Vec<Token>,
    used_descriptors: u16,
    used_deadline: Option<Instant>,
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    streams: Streams,
    requests: Receiver<ConnectRequest>,
    wake: Arc<EventFd>,
    active: Option<Active>,
}

impl Vsock {
    /// A device for a guest with address `guest_cid` (3 or more), and the handle by which the host opens streams.
    ///
    /// # Errors
    /// If `guest_cid` is reserved, or the host refuses a descriptor.
    pub fn new(guest_cid: u64, on_guest_connect: GuestConnect) -> io::Result<(Vsock, VsockHandle)> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("guest CID {guest_cid} is reserved: 3 to 4294967294"),
            ));
        }
        let (handle, requests, wake) = handle::pair()?;
        let streams = Streams::new(guest_cid, on_guest_connect)?;
        streams.watch(wake.as_raw_fd(), EventSet::IN, WAKE)?;
        streams.watch(streams.deadlines.as_fd().as_raw_fd(), EventSet::IN, TIMER)?;
        let device = Vsock { guest_cid, streams, requests, wake, active: None };
        Ok((device, handle))
    }

    fn take_requests(&mut self) {
        let _: io::Result<u64> = self.wake.read();
        while let Ok(request) = self.requests.try_recv() {
            if self.active.is_some() {
                self.streams.connect(request);
            } else {
                request.completion.finish(Err(ConnectError::NotReady));
            }
        }
    }

    /// True if used transmit buffers have waited long enough.
    fn expire(&mut self) -> bool {
        let mut used = false;
        for key in self.streams.deadlines.expired(Instant::now()) {
            match key {
                USED => used = true,
                id => self.streams.expire(id),
            }
        }
        used
    }
}

impl Active {
    /// Takes packets from the guest, then sends what there is, then interrupts once.
    fn turn(&mut self, streams: &mut Streams, kicked: bool, flush: bool) -> Result<Progress, Malformed> {
        let mut progress = Progress::Done;
        if kicked || self.unfinished {
            progress = self.take_packets(streams)?;
        }
        progress = progress.or(self.send_packets(streams)?);
        if self.unfinished && !streams.is_full_of_replies() {
            progress = Progress::More;
        }
        self.announce(streams, flush)?;
        Ok(progress)
    }

    fn take_packets(&mut self, streams: &mut Streams) -> Result<Progress, Malformed> {
        self.unfinished = true;
        let mut left = BUDGET;
        loop {
            self.transmit.suppress_kicks(&self.memory)?;
            loop {
                if streams.is_full_of_replies() {
                    // Goes on when the guest has taken some: a kick of the receive queue comes then.
                    return Ok(Progress::Done);
                }
                if left == 0 {
                    return Ok(Progress::More);
                }
                left = left.saturating_sub(1);
                let Some(chain) = self.transmit.pop(&self.memory)? else {
                    break;
                };
                let Chain { mut readable, token, descriptors, .. } = chain;
                streams.receive(&mut readable)?;
                self.used.push(token);
                self.used_descriptors = self.used_descriptors.saturating_add(descriptors);
            }
            if !self.transmit.request_kicks(&self.memory)? {
                self.unfinished = false;
                return Ok(Progress::Done);
            }
        }
    }

    fn send_packets(&mut self, streams: &mut Streams) -> Result<Progress, Malformed> {
        let mut left = BUDGET;
        while streams.wants_to_send() {
            if left == 0 {
                return Ok(Progress::More);
            }
            left = left.saturating_sub(1);
            let Some(chain) = self.receive.pop(&self.memory)? else {
                if !streams.really_wants_to_send() {
                    break;
                }
                // Only a device that lacks buffers wants to hear of new ones.
                self.starved = true;
                if self.receive.request_kicks(&self.memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            if self.starved {
                self.starved = false;
                self.receive.suppress_kicks(&self.memory)?;
            }
            let Chain { writable, token, .. } = chain;
            match streams.send(writable)? {
                Some(written) => self.receive.complete(&self.memory, token, written)?,
                None => self.receive.give_back(token)?,
            }
        }
        Ok(Progress::Done)
    }

    fn announce(&mut self, streams: &mut Streams, flush: bool) -> Result<(), Malformed> {
        let mut due = self.receive.take_notification(&self.memory)?;
        let waiting = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        let pressing = flush || due || self.used_descriptors >= self.transmit.size() / 2;
        if waiting > 0 && (pressing || !self.transmit.wants_interrupt(&self.memory, waiting)?) {
            for token in self.used.drain(..) {
                self.transmit.complete(&self.memory, token, 0)?;
            }
            self.used_descriptors = 0;
            if let Some(when) = self.used_deadline.take() {
                streams.deadlines.remove(when, USED);
            }
        }
        due |= self.transmit.take_notification(&self.memory)?;
        if due {
            self.receive.interrupt().raise(USED_BUFFER);
        }
        if !self.used.is_empty() && self.used_deadline.is_none() {
            self.used_deadline = Instant::now().checked_add(USED_PATIENCE);
            if let Some(when) = self.used_deadline {
                streams.deadlines.insert(when, USED);
            }
        }
        Ok(())
    }
}

impl Device for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_limits(&self) -> &'static [u16] {
        QUEUES
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn config_space(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, memory: GuestMemoryMmap, queues: Vec<ActiveQueue>, _: u64) -> io::Result<()> {
        // The event queue would carry a transport reset, which only a restored machine needs: nothing is sent on it.
        let [mut receive, transmit, mut events] =
            <[ActiveQueue; 3]>::try_from(queues).map_err(|_| io::ErrorKind::InvalidInput)?;
        receive.suppress_kicks(&memory).map_err(io::Error::other)?;
        events.suppress_kicks(&memory).map_err(io::Error::other)?;
        self.active = Some(Active {
            memory,
            receive,
            transmit,
            starved: false,
            unfinished: false,
            used: Vec::new(),
            used_descriptors: 0,
            used_deadline: None,
        });
        Ok(())
    }

    fn process(&mut self, queue: usize) -> Result<Progress, Malformed> {
        match (&mut self.active, queue) {
            (Some(active), RECEIVE | TRANSMIT) => active.turn(&mut self.streams, queue == TRANSMIT, false),
            _ => Ok(Progress::Done),
        }
    }

    fn reset(&mut self) {
        self.active = None;
        self.streams.clear();
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor belongs to `self.streams.epoll`, which lives as long as the borrow of `self`.
        Some(unsafe { BorrowedFd::borrow_raw(self.streams.epoll.as_raw_fd()) })
    }

    fn process_events(&mut self) -> Result<Progress, Malformed> {
        let mut events = [EpollEvent::default(); BUDGET];
        // An interrupted wait is tried again: the descriptor stays readable.
        let count = self.streams.epoll.wait(0, &mut events).unwrap_or(0);
        let mut flush = false;
        for event in events.get(..count).unwrap_or_default() {
            match event.data() {
                WAKE => self.take_requests(),
                TIMER => flush |= self.expire(),
                id => self.streams.event(id, event.event_set()),
            }
        }
        match &mut self.active {
            Some(active) => active.turn(&mut self.streams, false, flush),
            None => Ok(Progress::Done),
        }
    }
}
