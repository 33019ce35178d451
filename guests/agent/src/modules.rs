//! Loads the drivers that a distribution's kernel has as modules, from `/modules` of the initramfs.
//!
//! `/modules/order` names one file a line, dependencies first; words after the name are module parameters.

use crate::console;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::CString;

/// Directory in the initramfs.
pub const DIRECTORY: &str = "/modules";

/// `MODULE_INIT_COMPRESSED_FILE`: the kernel decompresses the file itself.
const COMPRESSED_FILE: i32 = 4;

/// Loads every module of the list. One that fails is reported and not fatal: what needs it will say so.
pub fn load_all() {
    let Ok(order) = std::fs::read_to_string(format!("{DIRECTORY}/order")) else {
        return;
    };
    for line in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (name, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match load(name, parameters.trim()) {
            // Built in or loaded already.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => console::report(&format!("module {name}: {}", std::io::Error::from(error))),
        }
    }
}

fn load(name: &str, parameters: &str) -> Result<(), Errno> {
    let path = if name.starts_with('/') { name.to_owned() } else { format!("{DIRECTORY}/{name}") };
    let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let parameters = CString::new(parameters).map_err(|_| Errno::INVAL)?;
    let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED_FILE };
    rustix::system::finit_module(&file, &parameters, flags)
}
