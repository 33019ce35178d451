//! What a machine is made of. Sent by the client, validated again by the VMM, which trusts nobody.

use serde::{Deserialize, Serialize};

/// Smallest guest memory, in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Largest guest memory, in bytes.
pub const MAX_MEMORY: u64 = 512 << 30;
/// Most vCPUs on hardware KVM (software KVM has one).
pub const MAX_VCPUS: u8 = 32;
/// Most disks.
pub const MAX_DRIVES: usize = 8;
/// Longest command line, in bytes, without its NUL (x86 `COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE: usize = 2047;

/// A machine. The files it names by position come as descriptors beside the frame, in this order:
/// kernel, initrd (if any), one per drive, console (if any).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 4096, [`MIN_MEMORY`] to [`MAX_MEMORY`].
    pub memory: u64,
    /// Whether an initrd follows the kernel.
    pub initrd: bool,
    /// Words added at the end of the kernel command line: printable ASCII.
    pub command_line: String,
    /// Disks, `/dev/vda` first.
    pub drives: Vec<DriveSpec>,
    /// Whether a descriptor for the serial console's output comes last.
    pub console: bool,
    /// Sample the guest's RIP every this many microseconds; `None` is off.
    pub profile_us: Option<u32>,
}

/// A disk: a raw image, whose format is stated and never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveSpec {
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// A field of a [`MachineSpec`] outside its limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {allowed}")]
pub struct SpecError {
    /// Name of the field.
    pub field: &'static str,
    /// What was asked for.
    pub value: String,
    /// What is allowed, and why.
    pub allowed: String,
}

impl MachineSpec {
    /// Checks every field against its limits. `max_vcpus` comes from the backend.
    ///
    /// # Errors
    /// [`SpecError`] naming the first field that is out of range.
    pub fn validate(&self, max_vcpus: u8) -> Result<(), SpecError> {
        let refuse = |field, value: String, allowed: String| Err(SpecError { field, value, allowed });
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS.min(max_vcpus) {
            let allowed = if max_vcpus == 1 {
                "software KVM has one vCPU (the guest kernel for it is uniprocessor)".into()
            } else {
                format!("1 to {}", MAX_VCPUS.min(max_vcpus))
            };
            return refuse("cpus", self.vcpus.to_string(), allowed);
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) || !self.memory.is_multiple_of(4096) {
            return refuse(
                "memory",
                format!("{} bytes", self.memory),
                format!("{} MiB to {} GiB, a multiple of 4096 bytes", MIN_MEMORY >> 20, MAX_MEMORY >> 30),
            );
        }
        if self.command_line.len() > MAX_COMMAND_LINE {
            return refuse(
                "cmdline",
                format!("{} bytes", self.command_line.len()),
                format!("at most {MAX_COMMAND_LINE} bytes"),
            );
        }
        if let Some(bad) = self.command_line.chars().find(|c| !(' '..='~').contains(c)) {
            return refuse("cmdline", format!("{bad:?} in it"), "printable ASCII only".into());
        }
        if self.drives.len() > MAX_DRIVES {
            return refuse("drives", self.drives.len().to_string(), format!("at most {MAX_DRIVES}"));
        }
        if self.profile_us.is_some_and(|us| !(100..=1_000_000).contains(&us)) {
            return refuse("profile", format!("{:?} us", self.profile_us), "100 us to 1 s".into());
        }
        Ok(())
    }

    /// How many descriptors follow the frame.
    pub fn descriptors(&self) -> usize {
        1usize
            .saturating_add(usize::from(self.initrd))
            .saturating_add(self.drives.len())
            .saturating_add(usize::from(self.console))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            vcpus: 1,
            memory: 256 << 20,
            initrd: true,
            command_line: String::new(),
            drives: vec![DriveSpec { read_only: true }],
            console: false,
            profile_us: None,
        }
    }

    #[test]
    fn validate_each_field_out_of_range_is_named() {
        let cases: [(&str, MachineSpec); 7] = [
            ("cpus", MachineSpec { vcpus: 0, ..spec() }),
            ("cpus", MachineSpec { vcpus: 2, ..spec() }),
            ("memory", MachineSpec { memory: 0, ..spec() }),
            ("memory", MachineSpec { memory: (64 << 20) + 1, ..spec() }),
            ("memory", MachineSpec { memory: 1 << 40, ..spec() }),
            ("cmdline", MachineSpec { command_line: "a\nb".into(), ..spec() }),
            ("cmdline", MachineSpec { command_line: "x".repeat(2048), ..spec() }),
        ];
        for (field, bad) in cases {
            assert_eq!(bad.validate(1).unwrap_err().field, field);
        }
        assert_eq!(spec().validate(1), Ok(()));
        assert_eq!(spec().descriptors(), 3);
    }
}
