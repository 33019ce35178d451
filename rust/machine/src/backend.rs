//! Which kind of KVM this host has, asked once. Nothing else in the program asks.

use crate::error::CallError;
use crate::x86::cpuid;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use microvm_protocol::spec::MAX_VCPUS;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// How guest code at CPL0 runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// On the processor (VT-x, SVM).
    Hardware,
    /// In an emulator, one instruction at a time (`kvm-pvm`).
    Software,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware => "hardware KVM",
            Self::Software => "software KVM",
        })
    }
}

/// Why this host cannot run machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// No device, or no module behind it.
    #[error(
        "/dev/kvm is missing ({0}); hint: load the module with `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`; in a virtual machine nested virtualization must be enabled, in a container start it with --device /dev/kvm"
    )]
    Missing(#[source] vmm_sys_util::errno::Error),
    /// The user may not open it.
    #[error(
        "no permission to use /dev/kvm; hint: `sudo usermod -aG kvm $USER` and log in again, or for now `sudo setfacl -m u:$USER:rw /dev/kvm`"
    )]
    Permission,
    /// Another hypervisor has the processor's virtualization.
    #[error(
        "/dev/kvm is busy; hint: another hypervisor (VirtualBox, VMware) uses the processor's virtualization, stop it"
    )]
    Busy,
    /// It opens, but is not a KVM this program knows.
    #[error("/dev/kvm has API version {found}, expected {KVM_API_VERSION}")]
    ApiVersion {
        /// What it said.
        found: i32,
    },
    /// Something needed is not there.
    #[error("the host's KVM lacks {capability}; hint: Linux 5.10 or newer is needed")]
    Capability {
        /// Name of the capability.
        capability: &'static str,
    },
    /// It cannot be used for another reason.
    #[error("/dev/kvm cannot be used: {0}")]
    Unusable(#[from] CallError),
}

/// Kernel words for every guest: the serial console carries only what is about to kill the machine, because each
/// character costs an exit; a panic resets through the keyboard controller at once; nothing that is not there is
/// looked for.
macro_rules! common_words {
    () => {
        "console=ttyS0 quiet loglevel=1 panic=-1 reboot=k tsc=reliable no_timer_check \
         8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd random.trust_cpu=on cryptomgr.notests"
    };
}

/// `/dev/kvm`, opened, and what follows from its kind.
#[derive(Debug)]
pub struct Backend {
    kvm: Kvm,
    kind: Kind,
    max_vcpus: u8,
}

impl Backend {
    /// Opens `/dev/kvm` and finds out what it is.
    ///
    /// # Errors
    /// [`KvmError`] with what to do about it.
    pub fn detect() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(refusal)?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion { found });
        }
        for (capability, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Pit2, "KVM_CAP_PIT2"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Capability { capability: name });
            }
        }
        let kind = classify(Path::new("/sys/module/kvm_pvm").exists(), first_flags);
        let max_vcpus = match kind {
            Kind::Software => 1,
            Kind::Hardware => u8::try_from(kvm.get_max_vcpus()).unwrap_or(u8::MAX).min(MAX_VCPUS),
        };
        Ok(Self { kvm, kind, max_vcpus })
    }

    /// Hardware or software.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Most vCPUs of one machine.
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }

    /// Which build of the guest kernel runs well here: `"hardware"` or `"ring3"`.
    pub fn kernel_flavour(&self) -> &'static str {
        match self.kind {
            Kind::Hardware => "hardware",
            Kind::Software => "ring3",
        }
    }

    /// First words of the guest kernel's command line.
    pub fn base_command_line(&self) -> &'static str {
        match self.kind {
            Kind::Hardware => concat!(common_words!(), " pci=off"),
            // CPUID at CPL3 is the host's own, so what kernel code at CPL3 cannot use is switched off by name; so are
            // pages of 1 GiB, which software KVM takes for malformed entries. earlyprintk lets a panic be heard
            // before the console is up; a kernel that randomizes its addresses would always say so there.
            Kind::Software => concat!(
                common_words!(),
                " clearcpuid=smep,smap,umip,invpcid,xsaves,xsavec,rdtscp,rdpid nopcid nogbpages \
                 earlyprintk=serial"
            ),
        }
    }

    /// Whether guests get ACPI tables; an MP table they get always.
    pub(crate) fn has_acpi(&self) -> bool {
        self.kind == Kind::Hardware
    }

    /// Whether the guest must be told the frequency of its time stamp counter on the command line.
    pub(crate) fn tells_tsc_frequency(&self) -> bool {
        self.kind == Kind::Software
    }

    /// Whether instructions at CPL0 may be refused that [`crate::fixups`] knows.
    pub(crate) fn needs_fix_ups(&self) -> bool {
        self.kind == Kind::Software
    }

    /// Features of every vCPU: what KVM supports, without what must not be used here.
    pub(crate) fn cpuid(&self) -> Result<CpuId, CallError> {
        let mut supported =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CallError::of("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline_timer = self.kvm.check_extension(Cap::TscDeadlineTimer);
        cpuid::restrict(&mut supported, self.kind, deadline_timer);
        Ok(supported)
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

/// Feature names of the first processor, without making the kernel write about all of them.
fn first_flags() -> String {
    let Ok(cpuinfo) = File::open("/proc/cpuinfo") else {
        return String::new();
    };
    let mut lines = BufReader::new(cpuinfo).lines().map_while(Result::ok);
    lines.find(|line| line.starts_with("flags")).unwrap_or_default()
}

fn classify(pvm_loaded: bool, flags: impl FnOnce() -> String) -> Kind {
    let virtualizes = |flags: String| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    if !pvm_loaded && virtualizes(flags()) { Kind::Hardware } else { Kind::Software }
}

fn refusal(errno: vmm_sys_util::errno::Error) -> KvmError {
    match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing(errno),
        libc::EACCES | libc::EPERM => KvmError::Permission,
        libc::EBUSY => KvmError::Busy,
        _ => KvmError::Unusable(CallError { call: "open", errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::errno::Error as Errno;

    #[test]
    fn classify_needs_the_flag_and_no_software_module() {
        let with = || "flags\t\t: fpu svm lm".to_owned();
        let without = || "flags\t\t: fpu svmx lm".to_owned();
        assert_eq!(classify(false, with), Kind::Hardware);
        assert_eq!(classify(true, with), Kind::Software);
        assert_eq!(classify(false, without), Kind::Software);
        assert_eq!(classify(false, String::new), Kind::Software);
        assert!(first_flags().contains(" lm"));
    }

    #[test]
    fn refusal_names_the_fix() {
        for (errno, hint) in [(libc::ENOENT, "modprobe"), (libc::EACCES, "usermod"), (libc::EBUSY, "VirtualBox")] {
            assert!(refusal(Errno::new(errno)).to_string().contains(hint));
        }
        assert!(matches!(refusal(Errno::new(libc::EMFILE)), KvmError::Unusable(_)));
    }
}
