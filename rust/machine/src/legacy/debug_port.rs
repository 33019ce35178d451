//! A port that prints: the simplest console there is, for bare-metal guests.

use crate::bus::BusDevice;
use crate::legacy::console::Console;

/// The port.
pub const PORT: u64 = 0xe9;

/// The device on the port bus. Reads give the port's own number, which is how a guest finds it.
pub struct DebugPort(pub Console);

impl BusDevice for DebugPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.0.write(data);
    }
}
