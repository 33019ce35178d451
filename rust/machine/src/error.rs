//! The error that all KVM and host calls share.

use vmm_sys_util::errno::Error as Errno;

/// A call into the host kernel that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed: {errno}")]
pub struct CallError {
    /// Name of the ioctl or system call.
    pub call: &'static str,
    /// What the kernel answered.
    pub errno: Errno,
}

impl CallError {
    /// For `map_err`: names the call.
    pub(crate) fn of(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self { call, errno }
    }

    /// The same for calls that report through `std::io`.
    pub(crate) fn of_io(call: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| Self { call, errno: Errno::new(error.raw_os_error().unwrap_or(libc::EIO)) }
    }

    /// The error number, as in `errno.h`.
    pub fn errno(&self) -> i32 {
        self.errno.errno()
    }
}
