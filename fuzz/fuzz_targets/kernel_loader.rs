//! The kernel loader on arbitrary files: ELF, bzImage, and each compression within a bzImage.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_machine::boot::{BootPlan, MmioWindow, kernel_release, layout, load};
use microvm_machine::memory::ram;
use std::fs::File;
use std::io::Write;

const MEMORY: u64 = 4 << 20;
/// Magic numbers the fuzzer would otherwise have to guess, by the input's first byte.
const PAYLOADS: [&[u8]; 4] = [
    b"\x1f\x8b\x08",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
];
const PAYLOAD: usize = 1024;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let contents = match kind % 6 {
        0 => bytes.to_vec(),
        1 => [b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0", bytes].concat(),
        format => bzimage(&[PAYLOADS[usize::from(format) - 2], bytes].concat()),
    };
    let mut file = unnamed_file();
    file.write_all(&contents).expect("room for a few KiB");
    let _ = kernel_release(&file);

    let memory = ram(MEMORY).expect("4 MiB");
    let devices = [MmioWindow {
        base: 0xd000_0000,
        size: 0x1000,
        irq: 5,
    }];
    let plan = BootPlan {
        kernel: &file,
        initrd: (kind & 0x80 != 0).then_some(&file),
        command_line: "console=ttyS0",
        vcpus: 1,
        devices: &devices,
        acpi: true,
        rng_seed: [0; 32],
    };
    if let Ok(entry) = load(&memory, &plan) {
        assert!((layout::HIGH_MEMORY..entry.kernel_end).contains(&entry.rip));
        assert!(entry.kernel_end <= MEMORY);
    }
});

/// A setup header around the payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; PAYLOAD];
    file[0x1f1] = 1;
    file[0x201] = 0x6a;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file
}

/// A file without a name.
fn unnamed_file() -> File {
    let path = std::env::temp_dir().join(format!("microvm-kernel-loader-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("a temporary file");
    let _ = std::fs::remove_file(path);
    file
}
