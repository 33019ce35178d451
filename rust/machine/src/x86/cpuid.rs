//! CPUID of the vCPUs: what KVM supports, without what must not be used, with this machine's topology.

use crate::backend::Kind;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::errno::Error as Errno;

/// Takes features away, once for all vCPUs.
pub(crate) fn restrict(cpuid: &mut CpuId, kind: Kind, deadline_timer: bool) {
    for entry in cpuid.as_mut_slice() {
        restrict_entry(entry, kind, deadline_timer);
    }
}

fn restrict_entry(entry: &mut kvm_cpuid_entry2, kind: Kind, deadline_timer: bool) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ecx |= bits(&[31]); // runs under a hypervisor
            if deadline_timer {
                entry.ecx |= bits(&[24]);
            }
            entry.ecx &= !bits(&[15]); // PDCM: describes the performance counters
        }
        // No performance counters: their emulation is slow to set up and a side channel.
        (0xa | 0x8000_0022, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => entry.ecx &= !bits(&[23, 24, 28]),
        _ => {}
    }
    if kind == Kind::Software {
        match (entry.function, entry.index) {
            (1, _) => entry.ecx &= !bits(&[13, 17]), // CMPXCHG16B, PCID
            (7, 0) => {
                entry.ebx &= !bits(&[7, 10, 20]); // SMEP, INVPCID, SMAP
                entry.ecx &= !bits(&[2, 16, 22]); // UMIP, 5-level paging, RDPID
            }
            (0xd, 1) => entry.eax &= !bits(&[1, 3]),       // XSAVEC, XSAVES
            (0x8000_0001, _) => entry.edx &= !bits(&[27]), // RDTSCP
            _ => {}
        }
    }
}

/// CPUID of vCPU `index` of `count`: every vCPU is a core of its own, all in one package.
pub(crate) fn for_vcpu(common: &CpuId, index: u8, count: u8) -> Result<CpuId, Errno> {
    let mut entries = common.as_slice().to_vec();
    // KVM lists the first level of the topology alone.
    let level = |level| move |entry: &kvm_cpuid_entry2| entry.function == 0xb && entry.index == level;
    if let (Some(first), false) = (entries.iter().find(|entry| level(0)(entry)), entries.iter().any(level(1))) {
        entries.push(kvm_cpuid_entry2 { index: 1, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..*first });
    }
    for entry in &mut entries {
        place(entry, index.into(), count.max(1).into());
    }
    CpuId::from_entries(&entries).map_err(|_| Errno::new(libc::E2BIG))
}

fn place(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    let others = count.saturating_sub(1);
    // Bits of the APIC identifier that tell cores apart.
    let width = u32::BITS.saturating_sub(others.leading_zeros());
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0xffff) | ((count & 0xff) << 16) | ((id & 0xff) << 24);
            set(&mut entry.edx, 28, count > 1);
        }
        // Caches: the third level is shared by all cores, the others by none.
        (4, _) if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { others } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | ((sharing & 0xfff) << 14) | ((others & 0x3f) << 26);
        }
        (0xb, level) => {
            let (shift, processors, kind) = match level {
                0 => (0, 1, 1),
                1 => (width, count, 2),
                _ => (0, 0, 0),
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, processors, (level & 0xff) | (kind << 8), id);
        }
        // Finer topologies, of which there is none here: absent, so that leaf 0xb or leaf 1 counts.
        (0x1f | 0x8000_0026, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => set(&mut entry.ecx, 1, count > 1), // CmpLegacy
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | (others & 0xff) | ((width & 0xf) << 12),
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { others } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | ((sharing & 0xfff) << 14);
        }
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    let mask = bits(&[bit]);
    *register = if value { *register | mask } else { *register & !mask };
}

fn bits(numbers: &[u32]) -> u32 {
    numbers.iter().fold(0, |mask, bit| mask | 1u32.wrapping_shl(*bit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    proptest! {
        #[test]
        fn for_vcpu_gives_each_its_own_identifier(count in 1u8..=32) {
            let functions = [(1, 0), (0xb, 0), (0x8000_001e, 0), (0x8000_0008, 0)];
            let common = CpuId::from_entries(&functions.map(|(f, i)| entry(f, i))).unwrap();
            for index in 0..count {
                let cpuid = for_vcpu(&common, index, count).unwrap();
                let [leaf1, smt, amd, sizes, core] = cpuid.as_slice() else { panic!("entries lost") };
                let id = u32::from(index);
                prop_assert_eq!(leaf1.ebx >> 24, id);
                prop_assert_eq!((leaf1.ebx >> 16) & 0xff, u32::from(count));
                prop_assert_eq!((smt.edx, core.edx, amd.eax), (id, id, id));
                prop_assert_eq!((smt.ebx, core.ebx), (1, u32::from(count)));
                prop_assert_eq!(1 << core.eax, u32::from(count).next_power_of_two());
                prop_assert_eq!(sizes.ecx & 0xff, u32::from(count.saturating_sub(1)));
            }
        }

        #[test]
        fn restrict_adds_nothing_but_hypervisor_and_timer(function in prop_oneof![0u32..0x20, 0x8000_0000u32..0x8000_0023], index in 0u32..3) {
            let mut cleared = kvm_cpuid_entry2 { function, index, ..Default::default() };
            restrict_entry(&mut cleared, Kind::Software, true);
            let added = if function == 1 { bits(&[24, 31]) } else { 0 };
            prop_assert_eq!((cleared.eax, cleared.ebx, cleared.ecx, cleared.edx), (0, 0, added, 0));
        }
    }

    #[test]
    fn restrict_keeps_vendor_features_on_hardware_and_masks_on_software() {
        let mut hardware = entry(7, 0);
        restrict_entry(&mut hardware, Kind::Hardware, true);
        assert_eq!(hardware.ebx, u32::MAX);
        let mut software = entry(7, 0);
        restrict_entry(&mut software, Kind::Software, true);
        assert_eq!(!software.ebx, bits(&[7, 10, 20]));
    }
}
