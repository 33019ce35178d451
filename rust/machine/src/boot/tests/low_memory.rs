use super::*;
use crate::memory::{HOLE_END, HOLE_START, collect, region};
use linux_loader::bootparam::boot_params;
use std::io::{Seek, SeekFrom};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

fn page(memory: &GuestMemoryMmap) -> boot_params {
    memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap()
}

/// (start, end, type) of each e820 entry.
fn e820(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let page = page(memory);
    let table = page.e820_table;
    let entries = table.into_iter().take(page.e820_entries.into());
    entries.map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type)).collect()
}

fn with(plan: &BootPlan<'_>) -> Result<(Entry, GuestMemoryMmap), BootError> {
    let memory = ram(MEMORY).unwrap();
    load(&memory, plan).map(|entry| (entry, memory))
}

fn with_command_line(command_line: &str) -> Result<(Entry, GuestMemoryMmap), BootError> {
    with(&BootPlan { command_line, ..plan(&file(&TestKernel::small().to_elf())) })
}

/// With an initrd of this size.
fn with_initrd(size: u64) -> Result<(Entry, GuestMemoryMmap), BootError> {
    let initrd = tempfile::tempfile().unwrap();
    initrd.set_len(size).unwrap();
    with(&BootPlan { initrd: Some(&initrd), ..plan(&file(&TestKernel::small().to_elf())) })
}

#[test]
fn e820_of_a_guest_over_three_gib_leaves_the_hole_for_devices() {
    let memory = ram(HOLE_START + MIB).unwrap();
    load(&memory, &plan(&file(&TestKernel::small().to_elf()))).unwrap();
    let expected = [
        (0, layout::EBDA, E820_RAM),
        (layout::EBDA, MIB, E820_RESERVED),
        (MIB, HOLE_START, E820_RAM),
        (HOLE_END, HOLE_END + MIB, E820_RAM),
    ];
    assert_eq!(e820(&memory), expected);
}

#[test]
fn load_fills_in_what_a_loader_must() {
    let kernel = file(&TestKernel::small().to_elf());
    let words = BootPlan { command_line: "console=ttyS0 quiet", acpi: true, rng_seed: [0xA5; 32], ..plan(&kernel) };
    let (_, memory) = with(&words).unwrap();
    let page = page(&memory);
    let header = page.hdr;
    assert_eq!(({ header.boot_flag }, { header.header }, header.type_of_loader), (0xAA55, 0x5372_6448, 0xff));
    assert_eq!(header.loadflags & 1, 1);
    assert_eq!({ page.acpi_rsdp_addr }, layout::RSDP);
    assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0, 0));
    assert_eq!(read(&memory, header.cmd_line_ptr.into(), 20), b"console=ttyS0 quiet\0");
    let mut seed = vec![0; 8];
    seed.extend([9, 0, 0, 0, 32, 0, 0, 0]);
    seed.extend([0xA5; 32]);
    assert_eq!(read(&memory, header.setup_data, 48), seed);
}

#[test]
fn command_line_out_of_limits_is_refused() {
    assert!(with_command_line(&"x".repeat(2047)).is_ok());
    assert_eq!(refusal(with_command_line(&"x".repeat(2048))), "cmdline: its length");
    for bad in ["a\0b", "a\nb", "é", "\x7f"] {
        assert_eq!(refusal(with_command_line(bad)), "cmdline: a character");
    }
}

#[test]
fn parts_of_low_memory_do_not_overlap() {
    let parts = [
        (layout::GDT, 40),
        (layout::BOOT_PARAMS, 4096),
        (layout::COMMAND_LINE, layout::COMMAND_LINE_MAX as u64 + 1),
        (layout::RNG_SEED, 48),
        (layout::PAGE_TABLES, 6 * 4096),
        (layout::EBDA, layout::EBDA_SIZE),
        (layout::RSDP, layout::ACPI_END - layout::RSDP),
        (layout::HIGH_MEMORY, 0),
    ];
    for pair in parts.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
    }
    assert!(parts[4].0 + parts[4].1 <= 0x1_0000, "Linux reserves the first 64 KiB, no more");
}

#[test]
fn initrd_that_does_not_fit_is_refused() {
    let room = MEMORY - TestKernel::small().end();
    assert!(with_initrd(room & !4095).is_ok());
    for size in [0, room + 1, MEMORY, 5 << 30, 1 << 40] {
        assert_eq!(refusal(with_initrd(size)), "initrd: the file's size", "{size}");
    }
}

#[test]
fn file_position_of_the_callers_descriptor_does_not_matter() {
    let kernel = TestKernel::small();
    let mut kernel_file = file(&kernel.to_elf());
    kernel_file.seek(SeekFrom::End(3)).unwrap();
    let memory = ram(MEMORY).unwrap();
    load(&memory, &plan(&kernel_file)).unwrap();
    assert!(high_memory(&memory) == kernel.model());
}

proptest! {
    #[test]
    fn e820_covers_exactly_the_ram(low in 0x101u64..0x2000, cuts in prop::collection::vec(1u64..0x2000, 0..3), high in 0u64..4) {
        let mut boundaries: Vec<u64> = cuts.into_iter().filter(|cut| *cut < low).chain([0, low]).collect();
        boundaries.sort_unstable();
        boundaries.dedup();
        let mut regions: Vec<_> = boundaries
            .windows(2)
            .map(|pair| region(pair[0] << 12, (pair[1] - pair[0]) << 12).unwrap())
            .collect();
        let mut expected = vec![(0, low << 12)];
        if high > 0 {
            regions.push(region(HOLE_END, high << 12).unwrap());
            expected.push((HOLE_END, HOLE_END + (high << 12)));
        }
        let memory = collect(regions).unwrap();
        let kernel = TestKernel { segments: vec![TestSegment { address: MIB, contents: vec![1], memory_size: 1 }], entry_offset: 0, padding: 0 };
        load(&memory, &plan(&file(&kernel.to_elf()))).unwrap();
        let map = e820(&memory);
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for &(start, end, _) in &map {
            match covered.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => covered.push((start, end)),
            }
        }
        prop_assert_eq!(covered, expected);
        for (start, end, kind) in map {
            let reserved = start >= layout::EBDA && end <= MIB;
            prop_assert_eq!(kind, if reserved { E820_RESERVED } else { E820_RAM });
        }
    }

    #[test]
    fn initrd_lies_page_aligned_behind_the_kernel(kernel in kernels(), contents in noise(1..20_000)) {
        let memory = ram(MEMORY).unwrap();
        let (kernel_file, initrd) = (file(&kernel.to_elf()), file(&contents));
        let plan = BootPlan { initrd: Some(&initrd), ..plan(&kernel_file) };
        let entry = load(&memory, &plan).unwrap();
        let header = page(&memory).hdr;
        let (start, size) = (u64::from(header.ramdisk_image), u64::from(header.ramdisk_size));
        prop_assert_eq!(start % 4096, 0);
        prop_assert!(start >= entry.kernel_end && start + size <= MEMORY);
        prop_assert!(MEMORY - (start + size) < 4096, "as high as it goes");
        prop_assert!(read(&memory, start, size) == contents);
    }

    /// Boot parameters and tables stay below 1 MiB whatever the machine.
    #[test]
    fn load_with_any_number_of_vcpus_and_devices_leaves_the_kernel_alone(vcpus in 1u8..=32, devices in 0usize..=8) {
        let windows: Vec<MmioWindow> = (0..devices)
            .map(|number| MmioWindow { base: 0xD000_0000 + 0x1000 * number as u64, size: 0x1000, irq: 5 + number as u32 })
            .collect();
        let memory = ram(MEMORY).unwrap();
        let kernel = TestKernel::small();
        let kernel_file = file(&kernel.to_elf());
        load(&memory, &BootPlan { vcpus, devices: &windows, acpi: true, ..plan(&kernel_file) }).unwrap();
        prop_assert!(high_memory(&memory) == kernel.model());
    }
}
