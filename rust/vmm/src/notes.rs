//! What other threads tell the event loop.

use microvm_machine::MachineEnd;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryIter, channel};

/// Something that happened on another thread.
#[derive(Debug)]
pub enum Note {
    /// The guest answered a request for a stream; the error is for a person.
    Connected {
        /// From the request.
        id: u32,
        /// Whether it accepted.
        result: Result<(), String>,
    },
    /// The agent opened its ready stream.
    Ready(UnixStream),
    /// The machine ended by itself.
    Ended(MachineEnd),
}

/// The receiving end, for the event loop.
pub struct Notes {
    receiver: Receiver<Note>,
    wake: Arc<OwnedFd>,
}

/// The sending end; cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    sender: Sender<Note>,
    wake: Arc<OwnedFd>,
}

/// A connected pair.
///
/// # Errors
/// The system's, for want of descriptors.
pub fn pair() -> io::Result<(Notifier, Notes)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((Notifier { sender, wake: Arc::clone(&wake) }, Notes { receiver, wake }))
}

impl Notifier {
    /// Tells the event loop. Never waits.
    pub fn send(&self, note: Note) {
        // Fails only when the event loop is gone, and then the process is about to be.
        let _ = self.sender.send(note);
        // Fails only when the counter is full, and then the loop is awake already.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Notes {
    /// Readable when there is a note.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The notes so far.
    pub fn take(&self) -> TryIter<'_, Note> {
        // Before the notes, so that one that comes meanwhile wakes the loop again.
        let _ = rustix::io::read(&*self.wake, &mut [0u8; 8]);
        self.receiver.try_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_from_any_thread_arrive_and_wake_the_loop() {
        let (notifier, notes) = pair().unwrap();
        let threads: Vec<_> = (0..4u32)
            .map(|id| {
                let notifier = notifier.clone();
                std::thread::spawn(move || notifier.send(Note::Connected { id, result: Ok(()) }))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(rustix::io::read(notes.wake(), &mut [0u8; 8]), Ok(8));
        let mut ids: Vec<_> = notes
            .take()
            .map(|note| match note {
                Note::Connected { id, .. } => id,
                other => panic!("{other:?}"),
            })
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3]);
    }
}
