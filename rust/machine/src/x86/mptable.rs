//! MultiProcessor Specification 1.4 tables: vCPUs, the IOAPIC, and which interrupt goes to which of its pins.
//!
//! They lie in the EBDA, the first place the specification names, and the BIOS data area says where that is. Linux
//! looks at the same place second, so it never scans the 64 KiB of the BIOS.

use crate::boot::BootError;
use crate::boot::layout::{EBDA, EBDA_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest-physical address of the IOAPIC.
pub const IOAPIC: u32 = 0xFEC0_0000;
/// Guest-physical address of the local APICs.
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// Pins of KVM's IOAPIC.
pub const IOAPIC_PINS: u8 = 24;

/// Words of the BIOS data area: segment of the EBDA, KiB of memory below it.
const BDA_EBDA_SEGMENT: u64 = 0x40E;
const BDA_BASE_MEMORY: u64 = 0x413;

const SPECIFICATION: u8 = 4;
const FLOATING_POINTER: usize = 16;
const HEADER: usize = 44;
const APIC_VERSION: u8 = 0x14;
const OEM: &[u8; 8] = b"MICROVM ";
const PRODUCT: &[u8; 12] = b"MICROVM     ";

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Family 6; on-chip FPU and APIC.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const BUS_ISA: u8 = 0;
const KIND_INT: u8 = 0;
const KIND_NMI: u8 = 1;
const KIND_EXTINT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// The IOAPIC's id: the first that no local APIC has.
pub(crate) fn ioapic_id(vcpus: u8) -> u8 {
    vcpus
}

/// Writes the tables for vCPUs with the local APIC ids 0 to `vcpus - 1`.
///
/// # Errors
/// [`BootError::Field`] if there are more vCPUs than the EBDA has room for.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), BootError> {
    let mut bytes = floating_pointer();
    bytes.extend(configuration(vcpus));
    if vcpus == 0 || bytes.len() as u64 > EBDA_SIZE {
        let allowed = format!("at least one, and the MP table must fit into {EBDA_SIZE} bytes");
        return Err(BootError::field("cpus", "the number of vCPUs", vcpus, allowed));
    }
    let put = |address: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(address)).map_err(BootError::memory(address))
    };
    put(EBDA, &bytes)?;
    put(BDA_EBDA_SEGMENT, &((EBDA >> 4) as u16).to_le_bytes())?;
    put(BDA_BASE_MEMORY, &((EBDA >> 10) as u16).to_le_bytes())
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(((EBDA as u32).saturating_add(FLOATING_POINTER as u32)).to_le_bytes());
    // Length in 16-byte units, revision, checksum, five feature bytes: a configuration table is present, and the
    // machine starts in virtual wire mode.
    bytes.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn configuration(vcpus: u8) -> Vec<u8> {
    let entries = entries(vcpus);
    let length = entries.iter().fold(HEADER, |sum, entry| sum.saturating_add(entry.len()));
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend([SPECIFICATION, 0]);
    bytes.extend(OEM);
    bytes.extend(PRODUCT);
    bytes.extend([0; 6]); // no OEM table
    bytes.extend(u16::try_from(entries.len()).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend(LOCAL_APIC.to_le_bytes());
    bytes.extend([0; 4]); // no extended table
    bytes.extend(entries.into_iter().flatten());
    set_checksum(&mut bytes, 7);
    bytes
}

/// In ascending order of their type, as the specification demands.
fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[ENTRY_BUS, BUS_ISA][..], b"ISA   "].concat());
    let ioapic = ioapic_id(vcpus);
    entries.push([&[ENTRY_IOAPIC, ioapic, APIC_VERSION, 1][..], &IOAPIC.to_le_bytes()].concat());
    let interrupt = |entry, kind, source, apic, pin| vec![entry, kind, 0, 0, BUS_ISA, source, apic, pin];
    entries.extend((0..IOAPIC_PINS).map(|pin| interrupt(ENTRY_INTERRUPT, KIND_INT, pin, ioapic, pin)));
    entries.push(interrupt(ENTRY_LOCAL_INTERRUPT, KIND_EXTINT, 0, 0, 0));
    entries.push(interrupt(ENTRY_LOCAL_INTERRUPT, KIND_NMI, 0, ALL_APICS, 1));
    entries
}

fn processor(id: u8) -> Vec<u8> {
    let flags = if id == 0 { CPU_ENABLED | CPU_BOOTSTRAP } else { CPU_ENABLED };
    let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
    entry.extend(CPU_SIGNATURE.to_le_bytes());
    entry.extend(CPU_FEATURES.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

/// Makes the sum of all bytes 0 modulo 256.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram;

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Reads the tables as the specification says: by the BIOS data area, the floating pointer, then entry by entry.
    #[test]
    fn write_for_every_number_of_vcpus_gives_tables_that_parse() {
        for vcpus in 1..=32u8 {
            let memory = ram(2 << 20).unwrap();
            write(&memory, vcpus).unwrap();
            let segment: u16 = memory.read_obj(GuestAddress(0x40E)).unwrap();
            let pointer = read(&memory, u64::from(segment) << 4, 16);
            assert_eq!((&pointer[..4], sum(&pointer)), (&b"_MP_"[..], 0));
            let address = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
            assert_eq!((&pointer[8..10], &pointer[11..]), (&[1, SPECIFICATION][..], &[0; 5][..]));
            let length: u16 = memory.read_obj(GuestAddress(u64::from(address).saturating_add(4))).unwrap();
            let table = read(&memory, address.into(), length.into());
            assert_eq!((&table[..4], sum(&table)), (&b"PCMP"[..], 0));
            assert_eq!((table[6], &table[8..16], &table[16..28]), (SPECIFICATION, &OEM[..], &PRODUCT[..]));
            assert!(u64::from(address).saturating_add(length.into()) <= EBDA.saturating_add(EBDA_SIZE));
            let mut entries = Vec::new();
            let mut rest = &table[HEADER..];
            while let Some(kind) = rest.first() {
                let (entry, next) = rest.split_at(if *kind == ENTRY_PROCESSOR { 20 } else { 8 });
                entries.push(entry);
                rest = next;
            }
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), u16::try_from(entries.len()).unwrap());
            let of = |kind| entries.iter().filter(move |entry| entry[0] == kind).collect::<Vec<_>>();
            let ids: Vec<u8> = of(ENTRY_PROCESSOR).iter().map(|entry| entry[1]).collect();
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
            let bootstrap: Vec<u8> = of(ENTRY_PROCESSOR).iter().map(|entry| entry[3] >> 1).collect();
            assert_eq!(bootstrap.iter().sum::<u8>(), bootstrap[0]);
            let ioapic = of(ENTRY_IOAPIC)[0][1];
            assert!(!ids.contains(&ioapic));
            let pins: Vec<_> = of(ENTRY_INTERRUPT).iter().map(|entry| (entry[5], entry[6], entry[7])).collect();
            assert_eq!(pins, (0..24).map(|pin| (pin, ioapic, pin)).collect::<Vec<_>>());
            let local: Vec<_> = of(ENTRY_LOCAL_INTERRUPT).iter().map(|entry| (entry[1], entry[7])).collect();
            assert_eq!(local, [(KIND_EXTINT, 0), (KIND_NMI, 1)]);
        }
    }

    #[test]
    fn write_for_no_vcpu_or_too_many_is_refused() {
        for vcpus in [0, 64, 255] {
            assert!(matches!(write(&ram(2 << 20).unwrap(), vcpus), Err(BootError::Field { input: "cpus", .. })));
        }
    }
}
