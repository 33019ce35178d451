//! Asks the host's Python about itself.

use microvm_image::host::Python;
use std::path::PathBuf;
use std::process::Command;

/// The Python that `python3` means here, as the package would describe it; `None` without one.
pub fn installed() -> Option<Python> {
    let program = "import sys, sysconfig as s; print(getattr(sys, '_base_executable', sys.executable), \
                   s.get_path('stdlib'), s.get_path('platstdlib'), sys.implementation.cache_tag, sep='\\n')";
    let output = Command::new("python3").args(["-I", "-c", program]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut lines = text.lines().map(str::to_owned);
    let executable = PathBuf::from(lines.next()?);
    let mut standard_library: Vec<PathBuf> = lines.by_ref().take(2).map(PathBuf::from).collect();
    standard_library.dedup();
    Some(Python { executable, standard_library, cache_tag: lines.next()? })
}
