//! The initial ramdisk: a newc cpio archive, which the kernel unpacks before it starts `/init`.

use crate::ImageError;
use std::path::PathBuf;

/// Directories the agent mounts on; without them it could not even report an error.
const DIRECTORIES: [&str; 6] = ["dev", "proc", "sys", "run", "root", "modules"];
const DIRECTORY: u32 = 0o040_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
/// The kernel opens `/dev/console` for the standard streams of `/init` before anything is mounted.
const CONSOLE: (u32, u32) = (5, 1);
/// Names in an archive end with this entry.
const TRAILER: &str = "TRAILER!!!";

/// An archive with `agent` as `/init`, `/dev/console`, empty directories to mount on, and `modules`
/// (name without suffix, content) as `/modules/NNN-name.ko`. `/modules/order` lists those file names in
/// load order, one a line. The same input gives the same bytes.
///
/// # Errors
/// [`ImageError::Limit`] for content over 4 GiB, [`ImageError::InvalidPath`] for a module name with a "/" or NUL.
pub fn build(agent: &[u8], modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>, ImageError> {
    let mut archive = Archive { bytes: Vec::new(), entries: 0 };
    for name in DIRECTORIES {
        archive.add(name, DIRECTORY, (0, 0), &[])?;
    }
    archive.add("dev/console", CHARACTER_DEVICE, CONSOLE, &[])?;
    archive.add("init", PROGRAM, (0, 0), agent)?;
    let mut order = String::new();
    for (number, (name, content)) in modules.iter().enumerate() {
        let file = format!("{number:03}-{name}.ko");
        if name.is_empty() || name.contains(['/', '\0', '\n']) {
            return Err(ImageError::InvalidPath { path: PathBuf::from(file), reason: "not the name of a module" });
        }
        archive.add(&format!("modules/{file}"), FILE, (0, 0), content)?;
        order.push_str(&file);
        order.push('\n');
    }
    if !modules.is_empty() {
        archive.add("modules/order", FILE, (0, 0), order.as_bytes())?;
    }
    archive.finish()
}

struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<(), ImageError> {
        self.entries = self.entries.saturating_add(1);
        self.entry(name, self.entries, mode, device, content)
    }

    fn entry(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<(), ImageError> {
        let size = u32::try_from(content.len()).map_err(|_| ImageError::Limit {
            what: "length in bytes of a file in the initial ramdisk",
            path: Some(PathBuf::from(name)),
            value: content.len() as u64,
            limit: u64::from(u32::MAX),
        })?;
        let name_size = u32::try_from(name.len()).unwrap_or(u32::MAX).saturating_add(1);
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, owner, group, links, time, size, device of the file (2), device it is (2), name, checksum
        for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align(4);
        self.bytes.extend_from_slice(content);
        self.align(4);
        Ok(())
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>, ImageError> {
        self.entry(TRAILER, 0, 0, (0, 0), &[])?;
        self.align(512);
        Ok(self.bytes)
    }
}
