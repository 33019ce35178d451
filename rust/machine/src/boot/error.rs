//! Why a guest could not be prepared for its first instruction.

use std::io;
use vm_memory::GuestMemoryError;

/// A kernel, initrd, command line or machine shape that cannot be booted. Every message names the input,
/// the field in it, its value, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host could not read the file.
    #[error("{input}: reading {length} bytes at offset {offset:#x}: {source}")]
    Read {
        /// `kernel` or `initrd`.
        input: &'static str,
        /// Where in the file.
        offset: u64,
        /// How much was wanted.
        length: u64,
        /// What the host said; `UnexpectedEof` if the file is shorter than it was a moment ago.
        source: io::Error,
    },
    /// The kernel file is of no known format.
    #[error(
        "kernel: it begins with {magic:02x?}, which is neither an ELF vmlinux nor a bzImage; \
         hint: give the vmlinux of a kernel build or a distribution's /boot/vmlinuz-*"
    )]
    UnknownKernel {
        /// The first bytes of the file.
        magic: Vec<u8>,
    },
    /// A value in one of the inputs is not usable.
    #[error("{input}: {field} is {value}; {allowed}")]
    Field {
        /// Which input: `kernel (ELF)`, `kernel (bzImage)`, `initrd`, `cmdline`, `memory`, `cpus`, `devices`.
        input: &'static str,
        /// The field, as its specification calls it.
        field: String,
        /// What it holds.
        value: String,
        /// What would be right, and how to get there.
        allowed: String,
    },
    /// The payload of a bzImage could not be decompressed.
    #[error("kernel (bzImage): its {format} payload is damaged: {source}; hint: compare the file with its package")]
    Payload {
        /// Name of the compression.
        format: &'static str,
        /// What the decompressor said.
        source: io::Error,
    },
    /// Guest memory could not be written: the layout does not fit into it.
    #[error("guest memory at {address:#x}: {source}")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// What vm-memory said.
        source: GuestMemoryError,
    },
}

impl BootError {
    pub(crate) fn field(
        input: &'static str,
        field: impl Into<String>,
        value: impl ToString,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Field { input, field: field.into(), value: value.to_string(), allowed: allowed.into() }
    }

    /// For `map_err` of writes to guest memory.
    pub(crate) fn memory(address: u64) -> impl Fn(GuestMemoryError) -> Self {
        move |source| Self::Memory { address, source }
    }
}
