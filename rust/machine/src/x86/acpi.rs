//! ACPI 6.5 tables, for kernels that learn of virtio-mmio devices in no other way.
//!
//! The hardware-reduced profile: no SCI, no PM timer, no fixed registers to emulate. A reset register (port 0x64 of the
//! keyboard controller) makes a guest's reboot a single write.

use super::mptable::{IOAPIC, LOCAL_APIC, ioapic_id};
use crate::boot::layout::{ACPI_END, RSDP};
use crate::boot::{BootError, MmioWindow};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const OEM: [u8; 6] = *b"MICROV";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
/// Length of the header that all tables have.
const HEADER: u32 = 36;
/// Revision of the DSDT: 2 makes integers 64 bits wide.
const DSDT_REVISION: u8 = 2;
/// IAPC_BOOT_ARCH: no VGA, no MSI, no PCIe power management, no CMOS clock; its absent bits say that there is no 8042
/// to look for and no legacy bus to enumerate.
const BOOT_ARCHITECTURE: u16 = (1 << 2) | (1 << 3) | (1 << 4) | (1 << 5);
/// The keyboard controller's command port, and its command to reset the machine.
const RESET_PORT: u64 = 0x64;
const RESET_COMMAND: u8 = 0xFE;
const COM1_PORT: u16 = 0x3f8;
const COM1_PORTS: u8 = 8;
const COM1_IRQ: u32 = 4;
/// Most virtio-mmio devices: their names have two hexadecimal digits.
const DEVICES_MAX: usize = 256;

/// Writes all tables and returns the address of their root.
///
/// # Errors
/// [`BootError::Field`] if a window does not lie below 4 GiB, or there are too many of them.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8, devices: &[MmioWindow]) -> Result<u64, BootError> {
    let mut next = RSDP.saturating_add(Rsdp::len() as u64);
    let mut put = |table: &dyn Aml| -> Result<u64, BootError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = next.next_multiple_of(16);
        next = address.saturating_add(bytes.len() as u64);
        if next > ACPI_END {
            let allowed = format!("its ACPI tables must end below {ACPI_END:#x}");
            return Err(BootError::field("devices", "their number", devices.len(), allowed));
        }
        memory.write_slice(&bytes, GuestAddress(address)).map_err(BootError::memory(address))?;
        Ok(address)
    };
    let dsdt = put(&dsdt(devices)?)?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(put(&fadt(dsdt))?);
    xsdt.add_entry(put(&madt(vcpus))?);
    let rsdp = Rsdp::new(OEM, put(&xsdt)?);
    let mut bytes = Vec::new();
    rsdp.to_aml_bytes(&mut bytes);
    memory.write_slice(&bytes, GuestAddress(RSDP)).map_err(BootError::memory(RSDP))?;
    Ok(RSDP)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut builder = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton) // no fixed-function buttons
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    builder.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    builder.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    builder.reset_value = RESET_COMMAND;
    builder.finalize()
}

/// Interrupts 0 to 23 are the IOAPIC's pins, without overrides: KVM routes the PIT to pin 0.
fn madt(vcpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(ioapic_id(vcpus), IOAPIC, 0));
    madt
}

fn dsdt(devices: &[MmioWindow]) -> Result<Sdt, BootError> {
    if devices.len() > DEVICES_MAX {
        return Err(BootError::field("devices", "their number", devices.len(), format!("at most {DEVICES_MAX}")));
    }
    let mut code = Code(Vec::new());
    code.com1();
    for (number, window) in (0u16..).zip(devices) {
        code.virtio_mmio(number, *window)?;
    }
    let mut table = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, TABLE, REVISION);
    aml::Scope::new(aml::Path::new("\\_SB_"), vec![&code]).to_aml_bytes(&mut table);
    Ok(table)
}

/// AML of the devices, one behind the other.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Code {
    fn device(&mut self, name: &str, id: &dyn Aml, unique_id: u16, resources: Vec<&dyn Aml>) {
        aml::Device::new(
            aml::Path::new(name),
            vec![
                &aml::Name::new(aml::Path::new("_HID"), id),
                &aml::Name::new(aml::Path::new("_UID"), &unique_id),
                &aml::Name::new(aml::Path::new("_CCA"), &aml::One {}),
                &aml::Name::new(aml::Path::new("_CRS"), &aml::ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(&mut self.0);
    }

    fn com1(&mut self) {
        let ports = aml::IO::new(COM1_PORT, COM1_PORT, 1, COM1_PORTS);
        self.device("COM1", &aml::EISAName::new("PNP0501"), 0, vec![&edge(COM1_IRQ), &ports]);
    }

    fn virtio_mmio(&mut self, number: u16, window: MmioWindow) -> Result<(), BootError> {
        let narrow = |field: &str, value: u64| {
            u32::try_from(value).map_err(|_| {
                let field = format!("{field} of window {number}");
                BootError::field("devices", field, format!("{value:#x}"), "it must fit into 32 bits")
            })
        };
        let memory = aml::Memory32Fixed::new(true, narrow("base", window.base)?, narrow("size", window.size)?);
        self.device(&format!("VR{number:02X}"), &"LNRO0005", number, vec![&memory, &edge(window.irq)]);
        Ok(())
    }
}

/// An edge-triggered, active-high interrupt that no other device shares.
fn edge(irq: u32) -> aml::Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    aml::Interrupt::new(consumer, edge_triggered, active_low, shared, irq)
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "test data is small")]
mod tests {
    use super::*;
    use crate::memory::ram;
    use proptest::prelude::*;

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// A table by its address, its signature and checksum checked.
    fn table(memory: &GuestMemoryMmap, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let table = read(memory, address, length as usize);
        assert_eq!((&table[..4], sum(&table)), (&signature[..], 0));
        table
    }

    fn contains(haystack: &[u8], needle: &[u8]) -> bool {
        haystack.windows(needle.len()).any(|window| window == needle)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn write_gives_tables_that_lead_to_every_vcpu_and_window(
            vcpus in 1u8..=32,
            windows in prop::collection::vec((0u64..1 << 20, 5u32..24), 0..20),
        ) {
            let devices: Vec<MmioWindow> =
                windows.iter().map(|(page, irq)| MmioWindow { base: page << 12, size: 0x1000, irq: *irq }).collect();
            let memory = ram(2 << 20).unwrap();
            let root = read(&memory, write(&memory, vcpus, &devices).unwrap(), 36);
            prop_assert_eq!((&root[..8], sum(&root), sum(&root[..20])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&memory, u64_at(&root, 24), b"XSDT");
            let fadt = table(&memory, u64_at(&xsdt, 36), b"FACP");
            let madt = table(&memory, u64_at(&xsdt, 44), b"APIC");
            let dsdt = table(&memory, u64_at(&fadt, 140), b"DSDT");
            prop_assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
            for (number, device) in devices.iter().enumerate() {
                let name = format!("VR{number:02X}");
                prop_assert!(contains(&dsdt, name.as_bytes()));
                let mut resources = vec![0x86, 9, 0, 1];
                resources.extend((device.base as u32).to_le_bytes());
                resources.extend(0x1000u32.to_le_bytes());
                resources.extend([0x89, 6, 0, 0b11, 1]);
                resources.extend(device.irq.to_le_bytes());
                prop_assert!(contains(&dsdt, &resources));
            }
        }
    }

    #[test]
    fn write_of_windows_that_acpi_cannot_describe_is_refused() {
        let window = |base, size| MmioWindow { base, size, irq: 5 };
        for (devices, field) in [
            (vec![window(1 << 32, 0x1000)], "base of window 0"),
            (vec![window(0, 0x1000), window(0, 1 << 32)], "size of window 1"),
            (vec![window(0, 0x1000); DEVICES_MAX + 1], "their number"),
        ] {
            let error = write(&ram(2 << 20).unwrap(), 1, &devices).unwrap_err();
            assert!(matches!(&error, BootError::Field { field: named, .. } if named == field), "{error}");
        }
    }
}
