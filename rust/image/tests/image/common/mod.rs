//! What several tests need.

pub mod python;
pub mod reader;
pub mod trees;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Whether a program the tests compare with is there. Where tests must not be skipped (`CI`), its absence fails.
pub fn have(program: &str, package: &str) -> bool {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .chain(["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from))
        .any(|directory| directory.join(program).is_file());
    let required = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "0" && value != "false");
    if !found {
        let message = format!("{program} is not installed; hint: apt-get install {package}");
        assert!(!required, "{message}");
        eprintln!("skipped: {message}");
    }
    found
}

/// Runs fsck.erofs on an image; fails the test on anything it says against it.
pub fn check(image: &Path) {
    succeed(Command::new("fsck.erofs").arg("-d1").arg(image));
}

/// Unpacks an image with fsck.erofs into `directory`, which must not exist.
pub fn extract(image: &Path, directory: &Path) {
    let option = format!("--extract={}", directory.display());
    succeed(Command::new("fsck.erofs").args([&option, "--preserve"]).arg(image));
}

/// Runs a program that must succeed.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&text));
    output
}
