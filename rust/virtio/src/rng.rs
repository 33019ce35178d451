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

    fn activate(&mut self, memory: GuestMemoryMmap, queues: Vec<ActiveQueue>, _: u64) -> io::Result<()> {
        let [queue] = <[ActiveQueue; 1]>::try_from(queues).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.active = Some((memory, queue));
        Ok(())
    }

    fn process(&mut self, _: usize) -> Result<Progress, Malformed> {
        let Some((memory, queue)) = &mut self.active else {
            return Ok(Progress::Done);
        };
        queue.drain(memory, BUDGET, |queue, chain| {
            let Chain { mut writable, token, .. } = chain;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BUFFERS, Ring, activate, guest_memory, interrupt};
    use vm_memory::{Bytes, GuestAddress};

    /// What comes of one request for these buffers.
    fn request(buffers: &[(u64, u32, bool)]) -> (Result<Progress, Malformed>, Vec<(u16, u32)>, GuestMemoryMmap) {
        let memory = guest_memory();
        let mut ring = Ring::new(&memory, 0x1000, 8);
        let (interrupt, _) = interrupt();
        let mut rng = Rng::new();
        rng.activate(memory.clone(), activate(&[&ring], true, &interrupt), 0).unwrap();
        ring.add(buffers).unwrap();
        let progress = rng.process(0);
        (progress, ring.take_used(), memory)
    }

    #[test]
    fn test_request_is_filled_to_its_last_byte() {
        let (_, used, memory) = request(&[(BUFFERS, 100, true), (BUFFERS + 4096, 5000, true)]);
        assert_eq!(used[0].1, 5100);
        let mut bytes = vec![0; 5000];
        memory.read_slice(&mut bytes, GuestAddress(BUFFERS + 4096)).unwrap();
        // 16 zero bytes in a row at either end happen once in 2^128.
        assert!(bytes[..16] != [0; 16] && bytes[4984..] != [0; 16]);
    }

    #[test]
    fn test_request_of_megabytes_is_capped() {
        let (progress, used, _) = request(&[(BUFFERS, 1 << 20, true)]);
        assert_eq!(progress, Ok(Progress::Done));
        assert_eq!(used[0].1, 64 * 1024);
    }

    #[test]
    fn test_request_read_only_is_malformed() {
        let (progress, used, _) = request(&[(BUFFERS, 64, false)]);
        assert!(matches!(progress, Err(Malformed::Request(_))));
        assert!(used.is_empty());
    }
}
