//! The real-time clock of a PC, read-only: the host's time, in UTC, binary, 24 hours.
//!
//! Without it Linux waits a second for the end of an update that never ends, because nothing reads as all ones.

use crate::bus::BusDevice;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// First port: index. The data port is behind it.
pub const BASE: u64 = 0x70;
/// Number of ports.
pub const SIZE: u64 = 2;

/// Registers A (no update in progress, 32 kHz time base) to D (battery good).
const REGISTER_A: u8 = 0x26;
const REGISTER_B: u8 = 0x06;
const REGISTER_D: u8 = 0x80;

/// The device on the port bus.
#[derive(Debug, Default)]
pub struct Rtc {
    index: AtomicU8,
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            *byte = register(self.index.load(Ordering::Relaxed), now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(byte)) = (offset, data.first()) {
            self.index.store(byte & 0x7f, Ordering::Relaxed);
        }
    }
}

/// Value of register `index` at `seconds` since 1970.
fn register(index: u8, seconds: u64) -> u8 {
    let of = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
    let days = seconds / 86_400;
    let (year, month, day) = date(days);
    match index {
        0x00 => of(seconds % 60),
        0x02 => of(seconds / 60 % 60),
        0x04 => of(seconds / 3600 % 24),
        // 1970 began on a Thursday; Sunday is 1.
        0x06 => of((days.wrapping_add(4) % 7).wrapping_add(1)),
        0x07 => of(day),
        0x08 => of(month),
        0x09 => of(year % 100),
        0x0a => REGISTER_A,
        0x0b => REGISTER_B,
        0x0d => REGISTER_D,
        // The century, in the place where ACPI and Linux look for it, always in BCD there.
        0x32 => of((year / 1000).wrapping_mul(16).wrapping_add(year / 100 % 10)),
        _ => 0,
    }
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    let mut rest = days % DAYS_PER_400_YEARS;
    let mut year = (days / DAYS_PER_400_YEARS).wrapping_mul(400).wrapping_add(1970);
    while rest >= year_length(year) {
        rest = rest.wrapping_sub(year_length(year));
        year = year.wrapping_add(1);
    }
    let february = if year_length(year) == 366 { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest = rest.wrapping_sub(length);
        month = u64::wrapping_add(month, 1);
    }
    (year, month, rest.wrapping_add(1))
}

const DAYS_PER_400_YEARS: u64 = 146_097;

fn year_length(year: u64) -> u64 {
    if (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400) { 366 } else { 365 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn date_goes_up_by_one_day_at_a_time(days in 0u64..200_000) {
            let (year, month, day) = date(days);
            let next = date(days.saturating_add(1));
            let after = |value: u64| value.saturating_add(1);
            let expected = [(year, month, after(day)), (year, after(month), 1), (after(year), 1, 1)];
            prop_assert!(expected.contains(&next), "{:?} then {:?}", (year, month, day), next);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
        }

        #[test]
        fn any_access_is_answered(accesses in proptest::collection::vec((0u64..2, any::<bool>(), any::<u8>()), 0..50)) {
            let rtc = Rtc::default();
            for (offset, write, byte) in accesses {
                if write { rtc.write(offset, &[byte]) } else { rtc.read(offset, &mut [byte]) }
            }
            rtc.write(0, &[0x0a]);
            let mut seen = [0xff];
            rtc.read(1, &mut seen);
            prop_assert_eq!(seen[0] & 0x80, 0); // no update in progress
        }
    }

    #[test]
    fn register_of_known_times() {
        let time = |seconds| [9, 8, 7, 4, 2, 0, 6, 0x32].map(|index| register(index, seconds));
        assert_eq!(time(0), [70, 1, 1, 0, 0, 0, 5, 0x19]);
        assert_eq!(time(951_782_399), [0, 2, 28, 23, 59, 59, 2, 0x20]); // 2000-02-28, a Monday
        assert_eq!(time(951_782_400), [0, 2, 29, 0, 0, 0, 3, 0x20]);
        assert_eq!(time(1_767_225_599), [25, 12, 31, 23, 59, 59, 4, 0x20]); // 2025-12-31, a Wednesday
    }
}
