use super::*;
use crate::boot::decompress;
use crate::boot::kernel_release;
use crate::boot::source::FileSource;
use flate2::read::GzEncoder;
use lzma_rust2::{CheckType, FilterType, XzOptions, XzWriter};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::io::Read;

/// Offsets in the file.
const SETUP_SECTS: usize = 0x1f1;
const JUMP: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const CODE32_START: usize = 0x214;
const INITRD_ADDR_MAX: usize = 0x22c;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
/// Setup sectors of the files made here, and the protected-mode code before their payload.
const SECTORS: usize = 2;
const STUB: usize = 300;
const PAYLOAD: usize = (SECTORS + 1) * 512 + STUB;

/// What `fixtures/calls.*` hold: code full of calls, which the x86 filter of xz rewrites.
///
/// They were made by the commands of the kernel's build: `gzip -n -9`, `xz --check=crc32 --threads=1 --x86
/// --lzma2=dict=128MiB`, `zstd -22 --ultra`, `lz4 -l -9`, each reading standard input.
fn calls() -> Vec<u8> {
    let mut code: Vec<u8> = (0..8192u32).map(|at| (at / 16 * 7) as u8).collect();
    for (number, instruction) in code.chunks_exact_mut(16).enumerate() {
        let target = [0x100, 0x740, 0x1000, 0x1ff0][number % 4];
        instruction[0] = 0xe8;
        instruction[1..5].copy_from_slice(&(target - (number as i32 * 16 + 5)).to_le_bytes());
    }
    code
}

fn with_size(mut compressed: Vec<u8>, size: usize) -> Vec<u8> {
    compressed.extend((size as u32).to_le_bytes());
    compressed
}

type Compress = fn(&[u8]) -> Vec<u8>;

/// Each compression, as the kernel's build uses it.
const FORMATS: [Compress; 4] = [gzip, xz, zstd, lz4];

fn gzip(contents: &[u8]) -> Vec<u8> {
    let mut compressed = Vec::new();
    GzEncoder::new(contents, flate2::Compression::default()).read_to_end(&mut compressed).unwrap();
    compressed
}

fn xz(contents: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(3);
    options.set_check_sum_type(CheckType::Crc32);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    let mut writer = XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(contents).unwrap();
    with_size(writer.finish().unwrap(), contents.len())
}

fn zstd(contents: &[u8]) -> Vec<u8> {
    with_size(compress_to_vec(contents, CompressionLevel::Fastest), contents.len())
}

fn lz4(contents: &[u8]) -> Vec<u8> {
    let mut compressed = 0x184C_2102u32.to_le_bytes().to_vec();
    for block in contents.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        compressed.extend((block.len() as u32).to_le_bytes());
        compressed.extend(block);
    }
    with_size(compressed, contents.len())
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; PAYLOAD];
    file[SETUP_SECTS] = SECTORS as u8;
    file[JUMP] = 0x6a;
    file[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
    file[VERSION..VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
    set(&mut file, INITRD_ADDR_MAX, 0x7fff_ffff);
    set(&mut file, PAYLOAD_OFFSET, STUB as u32);
    set(&mut file, PAYLOAD_LENGTH, payload.len() as u32);
    file.extend(payload);
    file.extend(b"what follows the payload");
    file
}

fn set(file: &mut [u8], offset: usize, value: u32) {
    file[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

fn decompressed(payload: &[u8], limit: u64) -> Result<Vec<u8>, BootError> {
    decompress::payload(&FileSource::new("kernel", &file(payload)).unwrap(), 0, payload.len() as u64, limit)
}

#[test]
fn payload_made_by_the_tools_of_the_kernels_build_is_decompressed() {
    let fixtures = [
        include_bytes!("fixtures/calls.gz").to_vec(),
        with_size(include_bytes!("fixtures/calls.xz").to_vec(), 8192),
        with_size(include_bytes!("fixtures/calls.zst").to_vec(), 8192),
        with_size(include_bytes!("fixtures/calls.lz4").to_vec(), 8192),
    ];
    for fixture in fixtures {
        assert!(decompressed(&fixture, 8192).unwrap() == calls(), "{:02x?}", &fixture[..4]);
    }
}

#[test]
fn payload_of_several_lz4_blocks_is_decompressed() {
    let contents: Vec<u8> = (0..(9u32 << 20)).map(|at| (at >> 12) as u8).collect();
    assert!(decompressed(&lz4(&contents), MIB * 32).unwrap() == contents);
}

#[test]
fn payload_with_a_wrong_size_word_is_damaged() {
    for format in FORMATS {
        for wrong in [8191u32, 8193, 0] {
            let mut payload = format(&calls());
            let word = payload.len() - 4;
            payload[word..].copy_from_slice(&wrong.to_le_bytes());
            let error = decompressed(&payload, 1 << 20).unwrap_err();
            assert!(matches!(error, BootError::Payload { .. }), "{error}");
        }
    }
}

/// Two mebibytes that announce themselves as 8 KiB, and 8 KiB that announce themselves as more than the guest has.
#[test]
fn payload_larger_than_announced_or_than_memory_is_refused() {
    for format in FORMATS {
        let mut bomb = format(&vec![0; 2 << 20]);
        let word = bomb.len() - 4;
        bomb[word..].copy_from_slice(&8192u32.to_le_bytes());
        assert!(matches!(decompressed(&bomb, 1 << 20), Err(BootError::Payload { .. })));
        let error = decompressed(&format(&calls()), 8191).unwrap_err();
        assert!(matches!(&error, BootError::Field { field, .. } if field == "the uncompressed size"), "{error}");
    }
}

#[test]
fn payload_with_a_dictionary_of_a_gibibyte_is_refused() {
    let mut payload = include_bytes!("fixtures/calls.zst").to_vec();
    payload[5] = 20 << 3;
    let error = decompressed(&with_size(payload, 8192), MIB).unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
}

#[test]
fn payload_of_an_unsupported_compression_is_named() {
    for (magic, name) in [
        (&b"BZh91AY&SY"[..], "bzip2"),
        (b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff", "lzma"),
        (b"\x89LZO\0\r\n\x1a\n\0", "lzo"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "unknown (it begins with [7f, 45, 4c, 46, 02, 01])"),
    ] {
        let error = decompressed(magic, MIB).unwrap_err();
        assert!(matches!(&error, BootError::Field { value, .. } if value == name), "{error}");
    }
}

#[test]
fn load_of_a_bzimage_with_a_field_out_of_range_names_it() {
    let refused = |offset, value| {
        let mut file = bzimage(&gzip(&TestKernel::small().to_elf()));
        set(&mut file, offset, value);
        refusal(boot(&file))
    };
    assert_eq!(refused(VERSION, 0x0207), "kernel (bzImage): the boot protocol version");
    assert_eq!(refused(PAYLOAD_OFFSET, u32::MAX), "kernel (bzImage): payload_offset + payload_length");
    assert_eq!(refused(PAYLOAD_LENGTH, u32::MAX), "kernel (bzImage): payload_offset + payload_length");
    assert_eq!(refused(PAYLOAD_LENGTH, 9), "kernel (bzImage): payload_length");
    assert_eq!(refused(PAYLOAD_OFFSET, 0), "kernel (bzImage): the payload's compression");
}

#[test]
fn load_of_a_bzimage_cut_in_its_setup_header_is_an_error() {
    let file = bzimage(&gzip(&TestKernel::small().to_elf()));
    for length in [MAGIC + 4, PAYLOAD_OFFSET, 0x26b] {
        let error = boot(&file[..length]).map(|(entry, _)| entry).unwrap_err();
        assert!(matches!(error, BootError::Read { input: "kernel", .. }), "{error}");
    }
}

/// The kernel's own header reaches `boot_params` up to its end, which its jump instruction tells.
#[test]
fn load_of_a_bzimage_hands_its_setup_header_to_the_kernel() {
    let mut file = bzimage(&gzip(&TestKernel::small().to_elf()));
    set(&mut file, CODE32_START, 0x1234_5678);
    set(&mut file, PREF_ADDRESS, 0x100_0000);
    file[JUMP] = (PREF_ADDRESS - MAGIC) as u8;
    let page = read(&boot(&file).unwrap().1, layout::BOOT_PARAMS, 4096);
    assert_eq!(page[CODE32_START..CODE32_START + 4], 0x1234_5678u32.to_le_bytes());
    assert_eq!(page[PREF_ADDRESS..PREF_ADDRESS + 4], [0; 4]);
    assert_eq!(page[0x210], 0xff);
}

#[test]
fn kernel_release_is_the_first_word_of_a_bzimages_version() {
    let with_version = |version: &[u8], offset: u16| {
        let mut image = bzimage(&[]);
        image[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&offset.to_le_bytes());
        let at = usize::from(offset) + 0x200;
        if let Some(place) = image.get_mut(at..at + version.len()) {
            place.copy_from_slice(version);
        }
        kernel_release(&file(&image))
    };
    assert_eq!(with_version(b"6.1.0-56-amd64 (debian) #1 SMP\0", 0x100).as_deref(), Some("6.1.0-56-amd64"));
    assert_eq!(with_version(b"6.12.1+\0garbage", 0x300).as_deref(), Some("6.12.1+"));
    for (version, offset) in
        [(&b"../../etc\0"[..], 0x100), (b"6.1/..\0", 0x100), (b"\0", 0x100), (b"6.1\0", 0), (b"6.1\0", 0xfff0)]
    {
        assert_eq!(with_version(version, offset), None, "{version:?}");
    }
    assert_eq!(kernel_release(&file(&TestKernel::small().to_elf())), None);
    assert_eq!(kernel_release(&File::open("/").unwrap()), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn load_of_a_bzimage_equals_loading_the_kernel_in_it(kernel in kernels(), format in prop::sample::select(&FORMATS[..])) {
        let elf = kernel.to_elf();
        let (entry, memory) = boot(&bzimage(&format(&elf))).unwrap();
        let (expected, _) = boot(&elf).unwrap();
        prop_assert_eq!(entry, expected);
        prop_assert!(high_memory(&memory) == kernel.model());
    }

    /// Formats with a checksum never give different bytes; all give the announced number of them, or an error.
    #[test]
    fn payload_with_changed_bytes_is_refused_or_harmless(
        format in 0usize..4,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut payload = FORMATS[format](&calls());
        let size_word = payload.split_off(payload.len() - 4);
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        payload.extend(size_word);
        if let Ok(contents) = decompressed(&payload, MIB) {
            prop_assert_eq!(contents.len(), 8192);
            prop_assert!(format >= 2 || contents == calls());
        }
    }

    #[test]
    fn load_of_a_mutated_setup_header_never_panics(
        changes in prop::collection::vec((SETUP_SECTS..0x270, any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut image = bzimage(&xz(&TestKernel::small().to_elf()));
        for (at, value) in changes {
            image[at] = value;
        }
        image.truncate(keep.index(image.len() * 2) + 1);
        let _ = boot(&image).map(|(entry, _)| entry);
        let _ = kernel_release(&file(&image));
    }
}
