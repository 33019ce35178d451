//! The few PC devices a guest expects, on their ports.
//!
//! | ports | device | interrupt |
//! |---|---|---|
//! | 0x3f8 to 0x3ff | serial console ([`serial`]) | 4 |
//! | 0x60, 0x64 | keyboard controller, for its reset line ([`i8042`]) | |
//! | 0x70, 0x71 | real-time clock ([`rtc`]) | |
//! | 0xe9 | debug port: each byte goes to the console | |
//!
//! PIT and interrupt controllers are KVM's.

pub mod console;
pub mod debug_port;
pub mod i8042;
pub mod rtc;
pub mod serial;
