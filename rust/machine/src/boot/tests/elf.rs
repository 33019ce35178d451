use super::*;

fn broken(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut elf = TestKernel::small().to_elf();
    change(&mut elf);
    refusal(boot(&elf))
}

fn set(elf: &mut [u8], offset: usize, value: u64) {
    elf[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn load_of_an_elf_file_with_a_bad_identification_names_the_field() {
    for (offset, value, field) in [
        (4, 1, "EI_CLASS"),
        (5, 2, "EI_DATA"),
        (16, 3, "e_type"),
        (18, 183, "e_machine"),
        (E_PHENTSIZE, 32, "e_phentsize"),
        (E_PHNUM, 0, "e_phnum"),
        (E_PHNUM, 65, "e_phnum"),
    ] {
        assert_eq!(broken(|elf| elf[offset] = value), format!("kernel (ELF): {field}"));
    }
}

#[test]
fn load_of_a_segment_out_of_range_names_the_field() {
    for (offset, value, field) in [
        (E_PHOFF, u64::MAX - 60, "the end of the program header table (e_phoff)"),
        (E_PHOFF, 1 << 20, "the end of the program header table (e_phoff)"),
        (P_OFFSET, u64::MAX - 2, "the end of segment 0 (p_offset + p_filesz)"),
        (P_OFFSET, 10_000, "the end of segment 0 (p_offset + p_filesz)"),
        (P_FILESZ, 0x101, "p_filesz of segment 0"),
        (P_MEMSZ, 10 << 30, "p_memsz of segment 0"),
        (P_MEMSZ, u64::MAX, "p_memsz of segment 0"),
        (P_PADDR, 0, "p_paddr of segment 0"),
        (P_PADDR, layout::HIGH_MEMORY - 1, "p_paddr of segment 0"),
        (P_PADDR, MEMORY - 0xff, "p_memsz of segment 0"),
        (P_PADDR, MIB + 0xf01, "p_paddr of segment 1"),
        (P_PADDR, MIB + 0x2fff, "p_paddr of segment 0"),
        (E_ENTRY, 0x1000, "e_entry"),
        (E_ENTRY, MIB + 0x100, "e_entry"),
    ] {
        assert_eq!(broken(|elf| set(elf, offset, value)), format!("kernel (ELF): {field}"), "{value:#x}");
    }
}

#[test]
fn load_of_an_elf_file_without_loadable_segments_is_refused() {
    let mut kernel = TestKernel::small();
    kernel.segments.truncate(1);
    let mut elf = kernel.to_elf();
    elf[FIRST_HEADER] = 4;
    assert_eq!(refusal(boot(&elf)), "kernel (ELF): the number of PT_LOAD segments");
}

#[test]
fn load_of_segments_that_touch_each_other_and_the_end_of_memory_succeeds() {
    let segment = |address, memory_size| TestSegment { address, contents: vec![1; 16], memory_size };
    let kernel =
        TestKernel { segments: vec![segment(MIB, 2 * MIB), segment(3 * MIB, MIB)], entry_offset: 0, padding: 0 };
    let (entry, memory) = boot(&kernel.to_elf()).unwrap();
    assert_eq!(entry.kernel_end, MEMORY);
    assert_eq!(high_memory(&memory), kernel.model());
}

#[test]
fn load_translates_a_virtual_entry_point() {
    let kernel = TestKernel::small();
    let mut elf = kernel.to_elf();
    set(&mut elf, E_ENTRY, kernel.entry() + VIRTUAL);
    set(&mut elf, P_VADDR, MIB + VIRTUAL);
    assert_eq!(boot(&elf).unwrap().0.rip, kernel.entry());
}

proptest! {
    #[test]
    fn load_of_any_kernel_leaves_its_segments_and_zeroes_in_memory(kernel in kernels()) {
        let (entry, memory) = boot(&kernel.to_elf()).unwrap();
        let expected = Entry { rip: kernel.entry(), rsi: layout::BOOT_PARAMS, kernel_end: kernel.end() };
        prop_assert_eq!(entry, expected);
        prop_assert!(high_memory(&memory) == kernel.model());
    }

    /// Whatever is accepted starts inside guest memory.
    #[test]
    fn load_of_a_mutated_kernel_is_refused_or_stays_in_memory(
        kernel in kernels(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        in_headers in any::<bool>(),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut elf = kernel.to_elf();
        let room = if in_headers { FIRST_HEADER + 56 } else { elf.len() };
        for (at, value) in changes {
            elf[at.index(room)] = value;
        }
        if !in_headers {
            elf.truncate(keep.index(elf.len()) + 1);
        }
        if let Ok((entry, _)) = boot(&elf) {
            prop_assert!(entry.rip >= layout::HIGH_MEMORY && entry.rip < entry.kernel_end);
            prop_assert!(entry.kernel_end <= MEMORY);
        }
    }

    #[test]
    fn load_of_a_truncated_kernel_is_refused(kernel in kernels(), keep in any::<prop::sample::Index>()) {
        let mut elf = kernel.to_elf();
        let needed = if kernel.segments.iter().any(|segment| !segment.contents.is_empty()) {
            // Padding and segments without contents may be missing from the end.
            let empty = kernel.segments.iter().rev().take_while(|segment| segment.contents.is_empty()).count();
            elf.len() - empty * kernel.padding
        } else {
            FIRST_HEADER + 56 * kernel.segments.len()
        };
        elf.truncate(keep.index(needed));
        prop_assert!(boot(&elf).is_err());
    }

    #[test]
    fn load_of_arbitrary_bytes_never_panics(contents in prop::collection::vec(any::<u8>(), 0..300), elf in any::<bool>()) {
        let magic: &[u8] = if elf { b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0" } else { b"" };
        let _ = boot(&[magic, &contents].concat()).map(|(entry, _)| entry);
    }
}
