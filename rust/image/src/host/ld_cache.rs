//! The dynamic loader's cache, `/etc/ld.so.cache`, for the libraries of an image.
//!
//! The host's own would name libraries the image does not have, and change with every package that is
//! installed. Layout (glibc, `sysdeps/generic/dl-cache.h`, format 1.1): a header of 48 bytes, entries of 24 bytes
//! in descending order of their names, then the strings, whose offsets count from the start.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

const MAGIC: &[u8; 20] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;
const LITTLE_ENDIAN: u8 = 2;
/// A library for glibc 2 (3) in 64-bit x86 (0x300).
const FLAGS: u32 = 0x0303;

/// The cache's bytes for these libraries, by name.
pub fn encode(libraries: &BTreeMap<String, PathBuf>) -> Vec<u8> {
    let mut sorted: Vec<(&String, &PathBuf)> = libraries.iter().collect();
    sorted.sort_by(|a, b| compare(b.0.as_bytes(), a.0.as_bytes()));
    let mut entries = Vec::new();
    let mut strings = Vec::new();
    let first_string = sorted.len().saturating_mul(ENTRY).saturating_add(HEADER);
    for (name, path) in &sorted {
        entries.extend_from_slice(&FLAGS.to_le_bytes());
        for text in [name.as_bytes(), path.as_os_str().as_bytes()] {
            entries.extend_from_slice(&number(first_string.saturating_add(strings.len())));
            strings.extend_from_slice(text);
            strings.push(0);
        }
        // Operating system version and processor features: any.
        entries.extend_from_slice(&[0; 12]);
    }
    let mut cache = MAGIC.to_vec();
    cache.extend_from_slice(&number(sorted.len()));
    cache.extend_from_slice(&number(strings.len()));
    cache.push(LITTLE_ENDIAN);
    // No extension, and reserved words.
    cache.resize(HEADER, 0);
    cache.append(&mut entries);
    cache.append(&mut strings);
    cache
}

fn number(value: usize) -> [u8; 4] {
    u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes()
}

/// The loader's order of names: runs of digits count as numbers, and a digit comes after what is none.
fn compare(mut a: &[u8], mut b: &[u8]) -> Ordering {
    loop {
        match (a.split_first(), b.split_first()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some((x, _)), Some((y, _))) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (x, rest_a) = leading_number(a);
                let (y, rest_b) = leading_number(b);
                if x != y {
                    return x.cmp(&y);
                }
                (a, b) = (rest_a, rest_b);
            }
            (Some((x, _)), Some((y, _))) if x.is_ascii_digit() != y.is_ascii_digit() => {
                return x.is_ascii_digit().cmp(&y.is_ascii_digit());
            }
            (Some((x, _)), Some((y, _))) if x != y => return x.cmp(y),
            (Some((_, rest_a)), Some((_, rest_b))) => (a, b) = (rest_a, rest_b),
        }
    }
}

fn leading_number(text: &[u8]) -> (u64, &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let value = digits
        .iter()
        .fold(0u64, |value, digit| value.saturating_mul(10).saturating_add(u64::from(digit.saturating_sub(b'0'))));
    (value, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ordered_as_the_loader_bisects_them() {
        let ordered = ["libc.so.6", "libc.so.10", "libcrypto.so.3", "libm.so", "libm.so.6"];
        for pair in ordered.windows(2) {
            assert_eq!(compare(pair[0].as_bytes(), pair[1].as_bytes()), Ordering::Less, "{pair:?}");
        }
        // A digit is greater than any other character.
        assert_eq!(compare(b"lib1", b"libz"), Ordering::Greater);
    }
}
