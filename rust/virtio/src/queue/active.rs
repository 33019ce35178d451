//! A queue in use. Its configuration never changes.

use super::{Chain, Malformed, chain::walk, setup::Range};
use crate::device::Progress;
use crate::interrupt::{Interrupt, USED_BUFFER};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// The right to put one chain on the used ring. Not copyable: a chain is completed once.
#[derive(Debug, PartialEq, Eq)]
pub struct Token {
    head: u16,
    position: u16,
}

impl Token {
    /// Head of the chain.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// A validated queue, used by one device thread.
///
/// Methods take the guest memory that the queue was validated against; with any other they fail, safely.
#[derive(Debug)]
pub struct ActiveQueue {
    queue: Queue,
    rings: Vec<Range>,
    in_flight: Vec<bool>,
    /// Used entries since the driver was last considered for an interrupt.
    unannounced: u16,
    interrupt: Arc<Interrupt>,
}

impl ActiveQueue {
    pub(super) fn new(queue: Queue, rings: Vec<Range>, interrupt: Arc<Interrupt>) -> ActiveQueue {
        let in_flight = vec![false; usize::from(queue.size())];
        ActiveQueue { queue, rings, in_flight, unannounced: 0, interrupt }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The interrupt line of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The next chain, or `None` if the driver has none for now.
    ///
    /// # Errors
    /// [`Malformed`]: the queue must not be used any more, but it is safe to.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, Malformed> {
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        let head = match self.queue.iter(memory) {
            Ok(mut heads) => heads.next().map(|chain| chain.head_index()),
            Err(Error::InvalidAvailRingIndex) => {
                return Err(Malformed::AvailableIndex { next, size });
            }
            Err(error) => return Err(ring(&error)),
        };
        let Some(head) = head else {
            return Ok(None);
        };
        match self.in_flight.get_mut(usize::from(head)) {
            None => return Err(Malformed::Index { index: head, size }),
            Some(busy) if *busy => return Err(Malformed::InFlight { head }),
            Some(busy) => *busy = true,
        }
        let table = GuestAddress(self.queue.desc_table());
        let token = Token { head, position: next };
        walk(memory, table, size, &self.rings, token).map(Some)
    }

    /// Undoes the last [`ActiveQueue::pop`]: the next one gives the same chain.
    ///
    /// # Errors
    /// If `token` is not the last one popped.
    pub fn give_back(&mut self, token: Token) -> Result<(), Malformed> {
        if token.position.wrapping_add(1) != self.queue.next_avail() {
            return Err(Malformed::Request("only the last chain can be given back"));
        }
        self.release(&token);
        self.queue.set_next_avail(token.position);
        Ok(())
    }

    /// Puts a chain on the used ring. `written` is how many bytes its writable part holds, from its start.
    /// The driver is not interrupted before [`ActiveQueue::notify`].
    ///
    /// # Errors
    /// If the used ring cannot be written, which validation rules out.
    #[expect(clippy::needless_pass_by_value, reason = "a token is used up: a chain is completed once")]
    pub fn complete(&mut self, memory: &GuestMemoryMmap, token: Token, written: u32) -> Result<(), Malformed> {
        self.release(&token);
        self.unannounced = self.unannounced.saturating_add(1);
        self.queue.add_used(memory, token.head, written).map_err(|error| ring(&error))
    }

    fn release(&mut self, token: &Token) {
        if let Some(busy) = self.in_flight.get_mut(usize::from(token.head)) {
            *busy = false;
        }
    }

    /// Whether the driver wants an interrupt for the entries since the last notification, if `more` were added.
    ///
    /// # Errors
    /// If the ring cannot be read, which validation rules out.
    pub fn wants_interrupt(&self, memory: &GuestMemoryMmap, more: u16) -> Result<bool, Malformed> {
        let added = self.unannounced.saturating_add(more);
        if added == 0 {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read: the driver first states its wish,
        // then looks at the used index again, so one of the two sees the other's write.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        if !self.queue.event_idx_enabled() {
            let flags: u16 = load(memory, available, 0)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let offset = u64::from(self.queue.size()).saturating_mul(2).saturating_add(4);
        let event: u16 = load(memory, available, offset)?;
        let new = self.queue.next_used().wrapping_add(more);
        // VIRTIO 1.2, 2.7.7.2: an interrupt is due if the entry at `event` is among the `added` ones.
        Ok(new.wrapping_sub(event).wrapping_sub(1) < added)
    }

    /// Considers the driver for an interrupt, and says whether one is due. For devices that answer
    /// on several queues with one interrupt; all others call [`ActiveQueue::notify`].
    ///
    /// # Errors
    /// As [`ActiveQueue::wants_interrupt`].
    pub fn take_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Malformed> {
        let due = self.wants_interrupt(memory, 0)?;
        self.unannounced = 0;
        Ok(due)
    }

    /// Interrupts the driver if it wants to hear of what was completed since the last call.
    ///
    /// # Errors
    /// As [`ActiveQueue::wants_interrupt`].
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), Malformed> {
        if self.take_notification(memory)? {
            self.interrupt.raise(USED_BUFFER);
        }
        Ok(())
    }

    /// Asks the driver not to kick. With EVENT_IDX there is nothing to do: it kicks once per request.
    ///
    /// # Errors
    /// If the used ring cannot be written, which validation rules out.
    pub fn suppress_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), Malformed> {
        self.queue.disable_notification(memory).map_err(|error| ring(&error))
    }

    /// Asks the driver to kick when it has a new chain. True if it has one already, which may come without a kick.
    ///
    /// # Errors
    /// If the rings cannot be accessed, which validation rules out.
    pub fn request_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Malformed> {
        self.queue.enable_notification(memory).map_err(|error| ring(&error))
    }

    /// Hands up to `budget` chains to `handle`, which completes them, then notifies the driver once.
    /// After [`Progress::Done`] the driver kicks for the next chain.
    ///
    /// # Errors
    /// The first [`Malformed`], of the queue or of `handle`.
    pub fn drain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        budget: usize,
        mut handle: impl FnMut(&mut ActiveQueue, Chain<'m>) -> Result<(), Malformed>,
    ) -> Result<Progress, Malformed> {
        let mut left = budget;
        let progress = loop {
            self.suppress_kicks(memory)?;
            while left > 0 {
                match self.pop(memory)? {
                    Some(chain) => handle(self, chain)?,
                    None => break,
                }
                left = left.saturating_sub(1);
            }
            if left == 0 {
                break Progress::More;
            }
            if !self.request_kicks(memory)? {
                break Progress::Done;
            }
        };
        self.notify(memory)?;
        Ok(progress)
    }
}

fn ring(error: &Error) -> Malformed {
    Malformed::Ring(error.to_string())
}

fn load(memory: &GuestMemoryMmap, base: GuestAddress, offset: u64) -> Result<u16, Malformed> {
    let address = base.checked_add(offset).ok_or_else(|| Malformed::Ring("address overflow".into()))?;
    memory.load::<u16>(address, Ordering::Relaxed).map(u16::from_le).map_err(|error| Malformed::Ring(error.to_string()))
}
