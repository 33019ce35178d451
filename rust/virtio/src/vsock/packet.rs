//! The packet header (VIRTIO 1.2, 5.10.6).

/// Size of a header in bytes.
pub const HEADER: usize = 44;

/// The host's address.
pub const HOST_CID: u64 = 2;
/// The only type of socket offered.
pub const TYPE_STREAM: u16 = 1;

/// Bits of `flags` in a shutdown packet.
pub mod shutdown {
    /// The sender will not receive any more.
    pub const RECEIVE: u32 = 1;
    /// The sender will not send any more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet is for. The numbers are those on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// There is no such connection (any more).
    Reset = 3,
    /// See [`shutdown`].
    Shutdown = 4,
    /// Payload.
    Payload = 5,
    /// The sender's buffer space.
    CreditUpdate = 6,
    /// Asks for the receiver's buffer space.
    CreditRequest = 7,
}

impl Operation {
    fn from_wire(number: u16) -> Option<Operation> {
        Some(match number {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown,
            5 => Operation::Payload,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            _ => return None,
        })
    }
}

/// A decoded header. Every field is the sender's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub source_cid: u64,
    /// Receiver's context id.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Payload bytes that follow.
    pub length: u32,
    /// Socket type.
    pub kind: u16,
    /// `None` if the number is unknown.
    pub operation: Option<Operation>,
    /// Depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection.
    pub buffer: u32,
    /// Bytes the sender has taken out of it, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Decodes a header.
    pub fn decode(bytes: &[u8; HEADER]) -> Header {
        let mut rest = bytes.as_slice();
        Header {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: Operation::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes a header.
    pub fn encode(&self) -> [u8; HEADER] {
        let operation = self.operation.map_or(0, |operation| operation as u16);
        let mut bytes = [0; HEADER];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.source_cid.to_le_bytes());
        put(&mut rest, self.destination_cid.to_le_bytes());
        put(&mut rest, self.source_port.to_le_bytes());
        put(&mut rest, self.destination_port.to_le_bytes());
        put(&mut rest, self.length.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, operation.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buffer.to_le_bytes());
        put(&mut rest, self.forwarded.to_le_bytes());
        bytes
    }
}

/// The array above has room for exactly these fields, so the fallback is never taken.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, tail)) = rest.split_first_chunk::<N>() else {
        return [0; N];
    };
    *rest = tail;
    *field
}

fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some((slot, tail)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *slot = field;
        *rest = tail;
    }
}
