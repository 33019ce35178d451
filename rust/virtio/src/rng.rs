//! Entropy device (VIRTIO 1.2, 5.4): fills buffers from the host's getrandom(2).

use crate::device::{Device, Progress};
use crate::queue::{ActiveQueue, Chain, Malformed};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemoryMmap;

/// Most bytes for one request; the driver asks again for more.
pub const MAX_REQUEST: usize = 64 * 1024;

/// Requests handled for one kick before other work is looked at.
const BUDGET: usize = 16;
const BLOCK: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    active: Option<(GuestMemoryMmap, ActiveQueue)>,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Rng {
        Rng::default()
    }
}

impl Device for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_limits(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(
        &mut self,
        memory: GuestMemoryMmap,
        queues: Vec<ActiveQueue>,
        _: u64,
    ) -> io::Result<()> {
        let [queue] =
            <[ActiveQueue; 1]>::try_from(queues).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.active = Some((memory, queue));
        Ok(())
    }

    fn process(&mut self, _: usize) -> Result<Progress, Malformed> {
        let Some((memory, queue)) = &mut self.active else {
            return Ok(Progress::Done);
        };
        queue.drain(memory, BUDGET, |queue, chain| {
            let Chain {
                mut writable,
                token,
                ..
            } = chain;
            if writable.remaining() == 0 {
                return Err(Malformed::Request("rng buffer is not writable"));
            }
            let mut written = 0u32;
            let mut left = writable.remaining().min(MAX_REQUEST);
            let mut block = [0u8; BLOCK];
            while left > 0 {
                let want = block.get_mut(..left.min(BLOCK)).unwrap_or_default();
                // Interrupted or short, the driver takes what there is and asks again.
                let Ok(count @ 1..) = getrandom(&mut *want, GetRandomFlags::empty()) else {
                    break;
                };
                writable.write_all(want.get(..count).unwrap_or_default())?;
                left = left.saturating_sub(count);
                written = written.saturating_add(u32::try_from(count).unwrap_or(0));
            }
            queue.complete(memory, token, written)
        })
    }

    fn reset(&mut self) {
        self.active = None;
    }
}
