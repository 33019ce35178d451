//! Entry of the agent. PID 1 boots the guest; any other process is the test mode on a host.
//!
//! There is no Rust `main`: the standard library's start-up would cost system calls and would ignore SIGPIPE,
//! which every command would inherit.
#![no_main]

use std::ffi::{c_char, c_int};

/// Called by the C runtime.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    if rustix::process::getpid().is_init() {
        microvm_agent::boot::run()
    } else {
        microvm_agent::boot::run_on_host(std::env::args_os().skip(1))
    }
}
