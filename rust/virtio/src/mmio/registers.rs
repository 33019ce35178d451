//! Registers and the status machine, as plain data: what a write does to them, and what the transport must do then.

use crate::queue::QueueSetup;

/// Register offsets (VIRTIO 1.2, 4.2.2).
pub(super) mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_LIMIT: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
    pub const QUEUE_AVAILABLE_LOW: u64 = 0x090;
    pub const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
    pub const QUEUE_USED_LOW: u64 = 0x0a0;
    pub const QUEUE_USED_HIGH: u64 = 0x0a4;
    pub const SHARED_MEMORY_FIRST: u64 = 0x0b0;
    pub const SHARED_MEMORY_LAST: u64 = 0x0bc;
    pub const CONFIGURATION_GENERATION: u64 = 0x0fc;
    pub const CONFIGURATION: u64 = 0x100;
}

/// "virt".
pub(super) const MAGIC: u32 = 0x7472_6976;
pub(super) const VERSION: u32 = 2;
/// "mvm\0".
pub(super) const VENDOR: u32 = 0x006d_766d;

/// Device status bits (VIRTIO 1.2, 2.1).
pub(super) mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub const ALL: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
    /// Each bit with those that must be set before it, in the order in which the driver sets them.
    pub const ORDER: [(u32, u32); 4] = [
        (ACKNOWLEDGE, 0),
        (DRIVER, ACKNOWLEDGE),
        (FEATURES_OK, ACKNOWLEDGE | DRIVER),
        (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    ];
}

const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// What a write to Status asks of the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusChange {
    /// Nothing beyond the register.
    None,
    /// DRIVER_OK was set: validate the queues and start the device.
    Start,
    /// 0 was written.
    Reset,
}

/// Registers of one device that the driver can change.
#[derive(Debug)]
pub(super) struct Registers {
    offered: u64,
    features_select: u32,
    driver_features: u64,
    driver_features_select: u32,
    /// A feature beyond bit 63 was asked for; none is offered.
    excess_features: bool,
    pub status: u32,
    queue_select: u32,
    pub queues: Vec<QueueSetup>,
}

impl Registers {
    pub fn new(offered: u64, limits: &[u16]) -> Registers {
        Registers {
            offered,
            features_select: 0,
            driver_features: 0,
            driver_features_select: 0,
            excess_features: false,
            status: 0,
            queue_select: 0,
            queues: limits.iter().map(|&limit| QueueSetup::new(limit)).collect(),
        }
    }

    pub fn reset(&mut self) {
        let limits: Vec<u16> = self.queues.iter().map(|queue| queue.limit).collect();
        *self = Registers::new(self.offered, &limits);
    }

    /// Features both sides agreed on; meaningful once FEATURES_OK is set.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Registers that do not need the transport; `None` for all others.
    pub fn read(&self, register: u64) -> Option<u32> {
        Some(match register {
            offset::MAGIC => MAGIC,
            offset::VERSION => VERSION,
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => half(self.offered, self.features_select),
            offset::QUEUE_LIMIT => self.selected().map_or(0, |queue| u32::from(queue.limit)),
            offset::QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.ready)),
            // There is no shared memory region: its length reads as -1 (4.2.2).
            offset::SHARED_MEMORY_FIRST..=offset::SHARED_MEMORY_LAST => u32::MAX,
            offset::CONFIGURATION_GENERATION => 0,
            _ => return None,
        })
    }

    /// Everything but Status and what concerns interrupts. Writes out of order change nothing.
    pub fn write(&mut self, register: u64, value: u32) {
        match register {
            offset::DEVICE_FEATURES_SELECT => self.features_select = value,
            offset::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            offset::DRIVER_FEATURES => self.write_features(value),
            offset::QUEUE_SELECT => self.queue_select = value,
            _ => self.write_queue(register, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK | status::FAILED) != status::DRIVER {
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(value),
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (u64::from(value) << 32),
            _ => self.excess_features |= value != 0,
        }
    }

    fn write_queue(&mut self, register: u64, value: u32) {
        // Configuration is possible between FEATURES_OK and DRIVER_OK only.
        if self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED) != status::FEATURES_OK {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_select) else {
            return;
        };
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        if register == offset::QUEUE_READY {
            match value {
                0 => queue.ready = false,
                1 => queue.ready = true,
                _ => {}
            }
            return;
        }
        if queue.ready {
            return;
        }
        match register {
            offset::QUEUE_SIZE => queue.size = value,
            offset::QUEUE_DESCRIPTORS_LOW => set_low(&mut queue.descriptors, value),
            offset::QUEUE_DESCRIPTORS_HIGH => set_high(&mut queue.descriptors, value),
            offset::QUEUE_AVAILABLE_LOW => set_low(&mut queue.available, value),
            offset::QUEUE_AVAILABLE_HIGH => set_high(&mut queue.available, value),
            offset::QUEUE_USED_LOW => set_low(&mut queue.used, value),
            offset::QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// Status. Bits are only ever added, in order; a write that does anything else changes nothing (but FAILED,
    /// which is always taken). A driver that writes back what it read may have NEEDS_RESET in it.
    pub fn write_status(&mut self, value: u32) -> StatusChange {
        if value == 0 {
            return StatusChange::Reset;
        }
        let value = value & !status::NEEDS_RESET;
        if value & !status::ALL != 0 || self.status & !value != 0 || self.status & status::FAILED != 0 {
            return StatusChange::None;
        }
        if value & status::FAILED != 0 {
            self.status |= status::FAILED;
            return StatusChange::None;
        }
        let mut next = self.status;
        for (bit, before) in status::ORDER {
            if value & bit == 0 || next & bit != 0 {
                continue;
            }
            if next & before != before {
                return StatusChange::None;
            }
            if bit == status::FEATURES_OK && !self.features_acceptable() {
                // The driver sees that the bit did not stay (3.1.1).
                break;
            }
            next |= bit;
        }
        let started = next & !self.status & status::DRIVER_OK != 0;
        self.status = next;
        if started { StatusChange::Start } else { StatusChange::None }
    }

    fn features_acceptable(&self) -> bool {
        !self.excess_features
            && self.driver_features & !self.offered == 0
            && self.driver_features & VIRTIO_F_VERSION_1 != 0
    }
}

fn half(features: u64, select: u32) -> u32 {
    let word = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(word).unwrap_or(0)
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}
