//! The first serial port of a PC: an 8250 with its output on the [`Console`].

use crate::bus::BusDevice;
use crate::legacy::console::Console;
use std::io;
use std::sync::{Mutex, PoisonError};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

/// First port.
pub const BASE: u64 = 0x3f8;
/// Number of ports.
pub const SIZE: u64 = 8;
/// Interrupt line.
pub const IRQ: u32 = 4;

/// The device on the port bus.
pub struct Serial(Mutex<vm_superio::Serial<Line, NoEvents, Sink>>);

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Sink(Console);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// `interrupt` is the irqfd of line [`IRQ`].
    pub fn new(interrupt: EventFd, console: Console) -> Self {
        Self(Mutex::new(vm_superio::Serial::new(Line(interrupt), Sink(console))))
    }
}

/// Registers are one byte each; a wider access reaches several, as on the ISA bus.
impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                *byte = serial.read(register);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                // What can fail is the interrupt: the counter of the event is full, so one is due anyway.
                let _ = serial.write(register, *byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn serial() -> (Serial, Console, EventFd) {
        let console = Console::new(None).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        (Serial::new(event.try_clone().unwrap(), console.clone()), console, event)
    }

    proptest! {
        #[test]
        fn any_accesses_never_panic_and_output_stays_bounded(
            accesses in proptest::collection::vec((0u64..10, any::<bool>(), proptest::collection::vec(any::<u8>(), 1..9)), 0..200),
        ) {
            let (serial, console, _) = serial();
            for (offset, write, mut data) in accesses {
                if write { serial.write(offset, &data) } else { serial.read(offset, &mut data) }
            }
            prop_assert!(console.tail().len() <= microvm_protocol::control::CONSOLE_TAIL);
        }
    }

    #[test]
    fn data_register_reaches_the_console_and_the_line_is_always_ready() {
        let (serial, console, _) = serial();
        for byte in b"hello" {
            let mut status = [0];
            serial.read(5, &mut status);
            assert_eq!(status[0] & 0x60, 0x60);
            serial.write(0, &[*byte]);
        }
        assert_eq!(console.tail(), b"hello");
    }

    #[test]
    fn transmit_interrupt_is_raised_when_enabled() {
        let (serial, _, event) = serial();
        serial.write(1, &[2]);
        assert_eq!(event.read().unwrap(), 1);
    }
}
