//! What a guest sees of an x86-64 machine before its first instruction: CPUID, MSRs, and tables in memory.

pub mod acpi;
pub mod boot_params;
pub mod cpuid;
pub mod mptable;
pub mod msr;
pub mod tables;
