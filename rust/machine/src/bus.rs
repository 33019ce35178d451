//! Two address spaces of devices: I/O ports and MMIO windows.
//!
//! An access belongs to a device only if it lies within the device's range as a whole.
//! Where there is nothing, reads give all ones and writes go nowhere, as on a PC.

use std::sync::Arc;

/// A device as the guest's loads and stores see it. Called from vCPU threads, several at once, with any width and
/// any offset inside the range; must not block and must not panic.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data`; it holds all ones before.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be put on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("device range {base:#x}, {size:#x} bytes: empty, wraps around, or overlaps another device")]
pub struct BusError {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

struct Window {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space of devices. Built once, then shared by the vCPUs without a lock.
#[derive(Default)]
pub struct Bus {
    windows: Vec<Window>,
}

impl Bus {
    /// Puts `device` at `base`.
    ///
    /// # Errors
    /// [`BusError`] if the range is empty, wraps around or overlaps another.
    pub fn insert(&mut self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let refused = BusError { base, size };
        let last = size.checked_sub(1).and_then(|more| base.checked_add(more)).ok_or(refused)?;
        if self.windows.iter().any(|window| window.base <= last && base <= window.last) {
            return Err(refused);
        }
        let position = self.windows.partition_point(|window| window.base < base);
        self.windows.insert(position, Window { base, last, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn BusDevice, u64)> {
        let last = u64::try_from(length).ok()?.checked_sub(1)?.checked_add(address)?;
        let following = self.windows.partition_point(|window| window.base <= address);
        let window = self.windows.get(following.checked_sub(1)?)?;
        (last <= window.last).then(|| (&*window.device, address.wrapping_sub(window.base)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    /// Memory of 16 bytes that panics outside them.
    struct Cells(Mutex<[u8; 16]>);

    impl BusDevice for Cells {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..data.len()]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn bus(base: u64) -> Bus {
        let mut bus = Bus::default();
        bus.insert(base, 16, Arc::new(Cells(Mutex::new([0; 16])))).unwrap();
        bus
    }

    proptest! {
        #[test]
        fn access_reads_back_inside_and_all_ones_elsewhere(
            base in prop_oneof![Just(0u64), Just(u64::MAX - 15), 0x100..0x200u64],
            from in -24i64..24, length in 1usize..9, value in 0u8..255,
        ) {
            let bus = bus(base);
            let address = base.wrapping_add_signed(from);
            let inside = from >= 0 && from <= 16i64.saturating_sub(length as i64);
            let data = vec![value; length];
            bus.write(address, &data);
            let mut seen = vec![0; length];
            bus.read(address, &mut seen);
            prop_assert_eq!(seen, if inside { data } else { vec![0xff; length] });
        }

        #[test]
        fn insert_overlapping_is_refused_and_apart_is_found(first in 0u64..64, second in 0u64..64) {
            let mut bus = bus(first);
            let inserted = bus.insert(second, 16, Arc::new(Cells(Mutex::new([9; 16])))).is_ok();
            prop_assert_eq!(inserted, first.abs_diff(second) >= 16);
            let mut seen = [0];
            bus.read(second, &mut seen);
            prop_assert_eq!(seen[0] == 9, inserted);
        }
    }

    #[test]
    fn insert_empty_or_wrapping_is_refused() {
        let device = || Arc::new(Cells(Mutex::new([0; 16])));
        let mut bus = Bus::default();
        assert!(bus.insert(5, 0, device()).is_err());
        assert!(bus.insert(u64::MAX, 2, device()).is_err());
        assert!(bus.insert(u64::MAX, 1, device()).is_ok());
    }
}
