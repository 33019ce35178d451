//! The driver's side of queues and registers, for tests and fuzz targets: correct when asked to be, and able to write
//! anything anywhere.
#![expect(
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::missing_panics_doc,
    reason = "test support: a mistake of the test itself may panic"
)]

use crate::interrupt::Interrupt;
use crate::mmio::MmioTransport;
use crate::queue::{ActiveQueue, QueueSetup, validate};
use std::collections::HashMap;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// First byte of the hole between the guest's RAM regions.
pub const HOLE: u64 = 4 << 20;
/// First byte behind the hole.
pub const HIGH: u64 = 8 << 20;
/// First byte behind all RAM.
pub const END: u64 = 9 << 20;
/// Where tests put buffers; rings live below.
pub const BUFFERS: u64 = 1 << 20;

/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// See [`NEXT`].
pub const WRITE: u16 = 2;
/// See [`NEXT`].
pub const INDIRECT: u16 = 4;

/// RAM in three regions: two that touch at 2 MiB, a hole from [`HOLE`] to [`HIGH`], one up to [`END`].
pub fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 2 << 20),
        (GuestAddress(2 << 20), 2 << 20),
        (GuestAddress(HIGH), 1 << 20),
    ])
    .expect("RAM")
}

/// One buffer of a chain: address, length, device-writable.
pub type Buffer = (u64, u32, bool);

/// A queue as its driver has it.
pub struct Ring {
    memory: GuestMemoryMmap,
    /// Number of descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Ring {
    /// A ring of `size` in the 16 KiB at `base`.
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Ring {
        let available = base + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size) + 3) & !3;
        Ring {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used,
            next_available: 0,
            next_used: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// The registers' contents for this ring.
    pub fn setup(&self, limit: u16) -> QueueSetup {
        QueueSetup {
            limit,
            size: u32::from(self.size),
            ready: true,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
        }
    }

    /// Writes one descriptor as it is.
    pub fn write_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0u8; 16];
        bytes
            .iter_mut()
            .zip(
                [address.to_le_bytes().as_slice(), &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                    .concat(),
            )
            .for_each(|(slot, byte)| *slot = byte);
        self.memory
            .write_slice(&bytes, GuestAddress(self.descriptors + 16 * u64::from(index)))
            .expect("descriptor table");
    }

    /// Puts a head on the available ring, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(self.available + 4 + 2 * slot)).expect("available ring");
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available index.
    pub fn set_available_index(&self, index: u16) {
        self.memory
            .store(index.to_le(), GuestAddress(self.available + 2), std::sync::atomic::Ordering::Release)
            .expect("available ring");
    }

    /// Writes the available ring's flags.
    pub fn set_flags(&self, flags: u16) {
        self.memory.write_obj(flags.to_le(), GuestAddress(self.available)).expect("available ring");
    }

    /// Asks for an interrupt when the entry with this index is used (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.memory
            .write_obj(index.to_le(), GuestAddress(self.available + 4 + 2 * u64::from(self.size)))
            .expect("available ring");
    }

    /// The index at which the device wants a kick (EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        let address = GuestAddress(self.used + 4 + 8 * u64::from(self.size));
        u16::from_le(self.memory.read_obj(address).expect("used ring"))
    }

    /// Flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(self.used)).expect("used ring"))
    }

    /// Makes a correct chain of free descriptors and offers it: its head, or `None` if there are too few.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || self.free.len() < buffers.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (position, &(address, length, writable)) in buffers.iter().enumerate() {
            let index = *indices.get(position)?;
            let next = indices.get(position + 1);
            let flags = if writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(index, address, length, flags, next.copied().unwrap_or(0));
        }
        let head = *indices.first()?;
        self.chains.insert(head, indices);
        self.offer(head);
        Some(head)
    }

    /// Takes new entries from the used ring: (head, bytes written).
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 =
            self.memory.load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::Acquire).expect("used ring");
        let mut entries = Vec::new();
        while self.next_used != u16::from_le(index) {
            let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).expect("used ring");
            let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).expect("used ring");
            let head = u16::try_from(u32::from_le(head)).expect("a head");
            self.free.extend(self.chains.remove(&head).unwrap_or_default());
            entries.push((head, u32::from_le(length)));
            self.next_used = self.next_used.wrapping_add(1);
        }
        entries
    }
}

/// An interrupt line nobody listens to, and its eventfd.
pub fn interrupt() -> (Arc<Interrupt>, EventFd) {
    let event = event();
    let copy = event.try_clone().expect("descriptor");
    (Arc::new(Interrupt::new(event)), copy)
}

/// A non-blocking eventfd.
pub fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("eventfd")
}

/// Validates rings as the transport does at DRIVER_OK. The rings must be correct.
pub fn activate(rings: &[&Ring], event_idx: bool, interrupt: &Arc<Interrupt>) -> Vec<ActiveQueue> {
    let setups: Vec<_> = rings.iter().map(|ring| ring.setup(ring.size)).collect();
    let memory = &rings.first().expect("a ring").memory;
    validate(&setups, memory, event_idx, interrupt).expect("correct rings")
}

/// Reads a register of 4 bytes.
pub fn read_register(transport: &MmioTransport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    transport.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Writes a register of 4 bytes.
pub fn write_register(transport: &MmioTransport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// Takes a device from any state to DRIVER_OK as a correct driver does, and returns its status then.
pub fn start(transport: &MmioTransport, rings: &[&Ring], features: u64) -> u32 {
    let write = |offset, value| write_register(transport, offset, value);
    write(0x70, 0);
    for status in [1, 3] {
        write(0x70, status);
    }
    for select in [0u32, 1] {
        write(0x24, select);
        write(0x20, low(features >> (32 * select)));
    }
    write(0x70, 0xb);
    for (ring, index) in rings.iter().zip(0u32..) {
        write(0x30, index);
        write(0x38, u32::from(ring.size));
        for (register, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
            write(register, low(address));
            write(register + 4, low(address >> 32));
        }
        write(0x44, 1);
    }
    write(0x70, 0xf);
    read_register(transport, 0x70)
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("32 bits")
}
