//! Why a vCPU left guest code, as data.

use std::fmt;

/// The reason of one exit. Owns its data; reads are answered with [`crate::Vcpu::answer`] before the next run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest reads a port: `count` values of `size` bytes (more than one for `rep ins`). Unanswered, it reads ones.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one value: 1, 2 or 4.
        size: u8,
        /// Number of values.
        count: u32,
    },
    /// The guest writes a port; several values of `size` bytes for `rep outs`.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one value: 1, 2 or 4.
        size: u8,
        /// The values, little-endian, one after the other.
        data: Vec<u8>,
    },
    /// The guest reads where there is no memory. Unanswered, it reads ones.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        size: u8,
    },
    /// The guest writes where there is no memory.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: Vec<u8>,
    },
    /// HLT, on a machine without interrupt controllers.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The guest asked for an end or a reset through KVM itself.
    SystemEvent {
        /// KVM_SYSTEM_EVENT_*.
        kind: u32,
    },
    /// A breakpoint or single step that the host asked for.
    Debug {
        /// Address of the instruction.
        address: u64,
        /// The exception's vector: 1 or 3.
        exception: u32,
    },
    /// KVM cannot go on with this guest.
    InternalError(InternalError),
    /// The processor refused the guest's state.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// Host CPU it happened on.
        cpu: u32,
    },
    /// Guest memory could not be given.
    MemoryFault {
        /// KVM_MEMORY_EXIT_FLAG_*.
        flags: u64,
        /// Guest physical address.
        address: u64,
        /// Bytes affected.
        size: u64,
    },
    /// A kick or some other signal came.
    Interrupted,
    /// The time given to `run` is over.
    Timeout,
    /// An exit this program never asks for.
    Unexpected {
        /// What KVM said.
        what: String,
    },
}

/// KVM_EXIT_INTERNAL_ERROR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_*: 1 is an instruction that could not be emulated.
    pub suberror: u32,
    /// What KVM adds, undecoded.
    pub data: Vec<u64>,
}

/// KVM_INTERNAL_ERROR_EMULATION.
pub(crate) const EMULATION: u32 = 1;
/// KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.
const HAS_INSTRUCTION: u64 = 1;

impl InternalError {
    /// Bytes from the instruction that could not be emulated on, if KVM tells them.
    ///
    /// `data` is then flags, and a byte of length followed by 15 bytes.
    pub fn instruction(&self) -> Option<Vec<u8>> {
        let (flags, rest) = self.data.split_first()?;
        if self.suberror != EMULATION || flags & HAS_INSTRUCTION == 0 {
            return None;
        }
        let mut bytes = rest.iter().take(2).flat_map(|word| word.to_le_bytes());
        let length = bytes.next()?;
        let instruction: Vec<u8> = bytes.take(usize::from(length).min(15)).collect();
        (!instruction.is_empty()).then_some(instruction)
    }
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.suberror, self.instruction()) {
            (EMULATION, Some(bytes)) => {
                write!(f, "KVM could not emulate the instruction that begins with")?;
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            (EMULATION, None) => write!(f, "KVM could not emulate an instruction"),
            (suberror, _) => write!(f, "KVM internal error {suberror}, data {:x?}", self.data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn instruction_of_any_data_is_at_most_15_bytes(suberror in 0u32..4, data in proptest::collection::vec(any::<u64>(), 0..17)) {
            let error = InternalError { suberror, data };
            let _ = error.to_string();
            prop_assert!(error.instruction().is_none_or(|bytes| bytes.len() <= 15 && suberror == EMULATION));
        }
    }

    #[test]
    fn instruction_is_decoded_from_length_and_bytes() {
        let words = [u64::from_le_bytes([3, 0x0f, 0x01, 0xcb, 0x90, 0, 0, 0]), 0];
        let error = InternalError { suberror: EMULATION, data: vec![1, words[0], words[1]] };
        assert_eq!(error.instruction(), Some(vec![0x0f, 0x01, 0xcb]));
        assert_eq!(error.to_string(), "KVM could not emulate the instruction that begins with 0f 01 cb");
    }
}
