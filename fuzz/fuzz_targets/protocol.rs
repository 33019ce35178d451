//! Decoders of both links, on whole frames and on a stream cut into pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_protocol::agent::{FromAgent, ToAgent};
use microvm_protocol::control::{Event, Request};
use microvm_protocol::frame::{FrameBuffer, decode, encode};

/// What decodes must encode again, and decode to the same message.
macro_rules! round_trip {
    ($message:ty, $bytes:expr) => {
        if let Ok(message) = decode::<$message>($bytes)
            && let Ok(again) = encode(&message)
        {
            assert_eq!(decode::<$message>(&again).as_ref(), Ok(&message));
        }
    };
}

fuzz_target!(|bytes: &[u8]| {
    round_trip!(ToAgent, bytes);
    round_trip!(FromAgent, bytes);
    round_trip!(Request, bytes);
    round_trip!(Event, bytes);

    let mut buffer = FrameBuffer::default();
    for piece in bytes.chunks(7) {
        buffer.extend(piece);
        loop {
            match buffer.next::<ToAgent>() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
