//! The keyboard controller, as far as Linux needs it: to reset the machine, and to find out that there is no keyboard.

use crate::bus::BusDevice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

/// First port: data.
pub const BASE: u64 = 0x60;
/// Data port and, four behind it, command port. What lies between belongs to others.
pub const COMMAND_OFFSET: u64 = 4;

/// Pulse the reset line.
const RESET: u8 = 0xfe;
/// The next data byte is the output port's value; bit 0 clear is reset.
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const READ_CONFIGURATION: u8 = 0x20;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const TEST_AUXILIARY: u8 = 0xa9;

/// A byte waits on the data port.
const OUTPUT_FULL: u8 = 1;
/// Self test passed. "Input full" (bit 1) is never set: Linux would poll for it, an exit each time.
const SYSTEM: u8 = 4;
/// No byte waits.
const EMPTY: u16 = 0x100;

/// The line that resets the machine. The run loop looks at it after each write to a port.
#[derive(Debug, Clone, Default)]
pub struct ResetLine(Arc<AtomicBool>);

impl ResetLine {
    /// Whether the guest asked for a reset.
    pub fn is_pulled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn pull(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The controller. One object, seen through two [`Port`]s.
#[derive(Debug)]
pub struct I8042 {
    reset: ResetLine,
    /// The byte that waits on the data port, or [`EMPTY`].
    output: AtomicU16,
    /// The command whose data byte comes next.
    command: AtomicU8,
}

impl I8042 {
    /// A controller that pulls `reset`.
    pub fn new(reset: ResetLine) -> Arc<Self> {
        Arc::new(Self { reset, output: AtomicU16::new(EMPTY), command: AtomicU8::new(0) })
    }

    /// The device for port [`BASE`].
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: Arc::clone(self), is_command: false })
    }

    /// The device for port [`BASE`] + [`COMMAND_OFFSET`].
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: Arc::clone(self), is_command: true })
    }

    fn status(&self) -> u8 {
        if self.output.load(Ordering::Relaxed) == EMPTY { SYSTEM } else { SYSTEM | OUTPUT_FULL }
    }

    fn data(&self) -> u8 {
        u8::try_from(self.output.swap(EMPTY, Ordering::Relaxed)).unwrap_or(0)
    }

    fn take_command(&self, command: u8) {
        self.command.store(command, Ordering::Relaxed);
        let answer = match command {
            RESET => {
                self.reset.pull();
                return;
            }
            READ_CONFIGURATION => 0,
            SELF_TEST => 0x55,
            // "Clock line stuck": nothing is plugged in.
            TEST_KEYBOARD | TEST_AUXILIARY => 1,
            _ => return,
        };
        self.output.store(answer, Ordering::Relaxed);
    }

    fn take_data(&self, data: u8) {
        if self.command.swap(0, Ordering::Relaxed) == WRITE_OUTPUT_PORT && data & 1 == 0 {
            self.reset.pull();
        }
    }
}

struct Port {
    controller: Arc<I8042>,
    is_command: bool,
}

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = if self.is_command { self.controller.status() } else { self.controller.data() };
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            if self.is_command { self.controller.take_command(*byte) } else { self.controller.take_data(*byte) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn junk_never_makes_the_status_unready_and_resets_only_on_request(
            accesses in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<u8>()), 0..100),
        ) {
            let reset = ResetLine::default();
            let controller = I8042::new(reset.clone());
            let mut asked = false;
            let mut output_port_next = false;
            for (command, write, byte) in accesses {
                let port = if command { controller.command_port() } else { controller.data_port() };
                if write {
                    port.write(0, &[byte]);
                    asked |= command && byte == RESET || !command && output_port_next && byte & 1 == 0;
                    output_port_next = command && byte == WRITE_OUTPUT_PORT;
                } else {
                    let mut seen = [0xff];
                    port.read(0, &mut seen);
                    prop_assert!(!command || seen[0] & 2 == 0);
                }
                prop_assert_eq!(reset.is_pulled(), asked);
            }
        }
    }

    #[test]
    fn self_test_answers_once() {
        let controller = I8042::new(ResetLine::default());
        controller.command_port().write(0, &[SELF_TEST]);
        let mut seen = [0];
        controller.command_port().read(0, &mut seen);
        assert_eq!(seen[0] & OUTPUT_FULL, OUTPUT_FULL);
        controller.data_port().read(0, &mut seen);
        assert_eq!(seen[0], 0x55);
        controller.command_port().read(0, &mut seen);
        assert_eq!(seen[0] & OUTPUT_FULL, 0);
    }
}
