//! Encoding of one frame: a version byte, then the postcard encoding of the message.
//!
//! On a stream ([`crate::agent`]) a little-endian `u32` length goes before it; on the control link
//! the message boundary of the socket does that work.

use serde::{Serialize, de::DeserializeOwned};

/// Version of both links. Client, VMM and agent come from one wheel; a different version is refused.
pub const VERSION: u8 = 1;

/// Longest frame, in bytes, version byte included. Checked before anything is allocated.
pub const MAX_FRAME: usize = 256 * 1024;

/// Most payload bytes (standard input or output) that one frame carries.
pub const MAX_CHUNK: usize = 64 * 1024;

/// Size of the length prefix on a stream.
pub const PREFIX: usize = 4;

/// Why bytes are not a frame, or a message cannot become one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The peer speaks another version of the protocol.
    #[error("frame version {found}, expected {VERSION}; hint: client, VMM and agent must come from the same microvm")]
    Version {
        /// The version byte of the frame.
        found: u8,
    },
    /// The frame is longer than [`MAX_FRAME`].
    #[error("frame of {length} bytes, limit {MAX_FRAME}")]
    TooLong {
        /// Length that was announced or produced.
        length: usize,
    },
    /// The bytes do not decode to the expected message.
    #[error("malformed frame: {0}")]
    Malformed(String),
}

/// Encodes `message` without a length prefix.
///
/// # Errors
/// [`FrameError::TooLong`] if the result exceeds [`MAX_FRAME`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let bytes =
        postcard::to_extend(message, vec![VERSION]).map_err(|error| FrameError::Malformed(error.to_string()))?;
    if bytes.len() > MAX_FRAME {
        return Err(FrameError::TooLong { length: bytes.len() });
    }
    Ok(bytes)
}

/// Decodes a frame without its length prefix. Trailing bytes are an error.
///
/// # Errors
/// Any [`FrameError`]; never panics, whatever the bytes are.
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, FrameError> {
    if bytes.len() > MAX_FRAME {
        return Err(FrameError::TooLong { length: bytes.len() });
    }
    let (version, body) = bytes.split_first().ok_or_else(|| FrameError::Malformed("empty frame".into()))?;
    if *version != VERSION {
        return Err(FrameError::Version { found: *version });
    }
    match postcard::take_from_bytes::<M>(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(FrameError::Malformed(format!("{} trailing bytes", rest.len()))),
        Err(error) => Err(FrameError::Malformed(error.to_string())),
    }
}

/// Encodes `message` with its length prefix, for a stream.
///
/// # Errors
/// As [`encode`].
pub fn encode_prefixed<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0, 0, 0, 0, VERSION])
        .map_err(|error| FrameError::Malformed(error.to_string()))?;
    let length = bytes.len().saturating_sub(PREFIX);
    match u32::try_from(length) {
        Ok(prefix) if length <= MAX_FRAME => {
            if let Some(slot) = bytes.first_chunk_mut::<PREFIX>() {
                *slot = prefix.to_le_bytes();
            }
            Ok(bytes)
        }
        _ => Err(FrameError::TooLong { length }),
    }
}

/// Reassembles prefixed frames from a stream that arrives in pieces of any size.
///
/// Holds at most one partial frame plus what one [`FrameBuffer::extend`] brought.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl FrameBuffer {
    /// Adds bytes as they were read.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start.min(self.bytes.len()));
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes come.
    ///
    /// # Errors
    /// Any [`FrameError`]; the stream is then unusable.
    #[expect(clippy::should_implement_trait, reason = "the message type is the caller's and an error is possible")]
    pub fn next<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let pending = self.bytes.get(self.start..).unwrap_or_default();
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(FrameError::TooLong { length });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = decode(body)?;
        self.start = self.start.saturating_add(PREFIX).saturating_add(length);
        Ok(Some(message))
    }

    /// Whether a partial frame is held: end of stream now would be a truncation.
    pub fn is_partial(&self) -> bool {
        self.start < self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{FromAgent, ToAgent};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decode_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<FromAgent>(&bytes);
            let _ = decode::<ToAgent>(&bytes);
            let _ = decode::<crate::control::Request>(&bytes);
            let _ = decode::<crate::control::Event>(&bytes);
        }

        #[test]
        fn frames_survive_any_split(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..8),
            cuts in proptest::collection::vec(1usize..64, 1..50),
        ) {
            let messages: Vec<_> = chunks.into_iter().map(FromAgent::Stdout).collect();
            let mut wire = Vec::new();
            for message in &messages {
                wire.extend(encode_prefixed(message).unwrap());
            }
            let mut buffer = FrameBuffer::default();
            let mut out = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            while !wire.is_empty() {
                let n = cuts.next().unwrap().min(wire.len());
                buffer.extend(&wire.drain(..n).collect::<Vec<_>>());
                while let Some(message) = buffer.next::<FromAgent>().unwrap() {
                    out.push(message);
                }
            }
            prop_assert!(!buffer.is_partial());
            prop_assert_eq!(out, messages);
        }
    }

    #[test]
    fn decode_other_version_is_refused() {
        let mut bytes = encode(&ToAgent::StdinEnd).unwrap();
        bytes[0] = VERSION + 1;
        assert_eq!(decode::<ToAgent>(&bytes), Err(FrameError::Version { found: VERSION + 1 }));
    }

    #[test]
    fn announced_length_over_the_limit_is_refused_at_once() {
        let mut buffer = FrameBuffer::default();
        buffer.extend(&u32::MAX.to_le_bytes());
        assert!(matches!(buffer.next::<ToAgent>(), Err(FrameError::TooLong { .. })));
    }
}
