//! Words for whoever reads the guest's console. In a run without trouble there are none: every character on a
//! serial port costs two exits to the VMM.

use rustix::fs::{Mode, OFlags};
use std::time::{Duration, Instant};

/// How long the console may take to send what was written, before the machine restarts under it.
const DRAIN: Duration = Duration::from_millis(200);

/// Reports trouble that the guest survives.
pub fn report(message: &str) {
    let line = format!("microvm-agent: {message}\n");
    if rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).is_err() {
        to_kernel_log("<4>", &line);
    }
}

/// Reports the trouble that ends the machine, and waits (briefly) until it has left the machine.
pub fn report_fatal(message: &str) {
    let line = format!("microvm-agent: fatal: {message}\n");
    let written =
        rustix::fs::open("/dev/console", OFlags::WRONLY | OFlags::NOCTTY, Mode::empty()).and_then(|console| {
            rustix::io::write(&console, line.as_bytes())?;
            drain(&console);
            Ok(())
        });
    // The kernel prints an alert on the console itself; told twice it would only be harder to read.
    to_kernel_log(if written.is_ok() { "<6>" } else { "<1>" }, &line);
}

fn to_kernel_log(level: &str, line: &str) {
    if let Ok(log) = rustix::fs::open("/dev/kmsg", OFlags::WRONLY, Mode::empty()) {
        // One write is one record.
        let _ = rustix::io::write(&log, format!("{level}{line}").as_bytes());
    }
}

/// `tcdrain` with an end: a serial port that is stuck must not keep the machine from restarting.
fn drain(console: &rustix::fd::OwnedFd) {
    use std::os::fd::AsRawFd;
    let start = Instant::now();
    while start.elapsed() < DRAIN {
        let mut pending: libc::c_int = 0;
        // SAFETY: TIOCOUTQ stores one int through the pointer, which is valid for that.
        let result = unsafe { libc::ioctl(console.as_raw_fd(), libc::TIOCOUTQ, &raw mut pending) };
        if result != 0 || pending == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
