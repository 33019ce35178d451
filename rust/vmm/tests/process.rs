//! The VMM process from outside, as far as that needs no guest.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use microvm_link::ControlSocket;
use microvm_protocol::control::{CONTROL_FD, EndReason, EndReport, Event, Request};
use microvm_protocol::spec::MachineSpec;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const VMM: &str = env!("CARGO_BIN_EXE_microvm-vmm");

/// A VMM with a control socket.
fn spawn() -> (Child, ControlSocket) {
    let (control, theirs) = ControlSocket::pair().unwrap();
    let mut command = Command::new(VMM);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let number = theirs.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and `theirs` is open until the child has been spawned.
    unsafe {
        command.pre_exec(move || match libc::dup2(number, CONTROL_FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    (command.spawn().unwrap(), control)
}

/// The one report, after which the process exits with code 0.
fn end(mut child: Child, control: &ControlSocket) -> EndReport {
    let begun = Instant::now();
    let report = loop {
        match control.receive::<Event>(&mut Vec::new(), 0) {
            Ok(Some((Event::Ended(report), _))) => break report,
            Ok(other) => panic!("{other:?}"),
            Err(error) if error.is_would_block() => thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "no report");
    };
    assert!(child.wait().unwrap().success());
    report
}

fn spec() -> MachineSpec {
    MachineSpec {
        vcpus: 1,
        memory: 64 << 20,
        initrd: false,
        command_line: String::new(),
        drives: Vec::new(),
        console: false,
        profile_us: None,
    }
}

#[test]
fn started_by_hand_it_says_how_it_is_started() {
    let mut command = Command::new(VMM);
    // SAFETY: close is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::close(CONTROL_FD);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hint: this program is started by `microvm`"));
}

#[test]
fn without_a_client_it_exits_in_silence() {
    let (mut child, control) = spawn();
    drop(control);
    assert!(child.wait().unwrap().success());
    let mut words = String::new();
    child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
    assert_eq!(words, "");
}

#[test]
fn before_a_start_it_refuses_everything_else() {
    for request in [Request::Kill, Request::Connect { id: 1, port: 1024 }, Request::Start(spec())] {
        let (child, control) = spawn();
        control.send(&request, &[]).unwrap();
        assert_eq!(end(child, &control).reason, EndReason::Config, "{request:?}");
    }
}

#[test]
fn bytes_that_are_no_message_end_it_with_a_report() {
    let (child, control) = spawn();
    rustix::net::send(&control, &[0xff; 100], rustix::net::SendFlags::empty()).unwrap();
    let report = end(child, &control);
    assert_eq!(report.reason, EndReason::Config);
    assert!(report.message.contains("version"), "{}", report.message);
}

#[test]
fn a_kernel_that_is_none_is_refused_by_name() {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&[0x5a; 4096]).unwrap();
    kernel.rewind().unwrap();
    let (child, control) = spawn();
    control.send(&Request::Start(spec()), &[kernel.as_fd()]).unwrap();
    let report = end(child, &control);
    if File::open("/dev/kvm").is_ok() {
        assert_eq!(report.reason, EndReason::Config, "{}", report.message);
        assert!(report.message.contains("kernel"), "{}", report.message);
    } else {
        assert_eq!(report.reason, EndReason::Kvm, "{}", report.message);
        assert!(report.message.contains("hint"), "{}", report.message);
    }
}

#[test]
fn it_gives_up_privileges_core_files_and_the_clients_directory() {
    let (child, control) = spawn();
    let status = format!("/proc/{}/status", child.id());
    let begun = Instant::now();
    // It waits for a request now, or will in a moment.
    while !std::fs::read_to_string(&status).unwrap().contains("NoNewPrivs:\t1") {
        assert!(begun.elapsed() < Duration::from_secs(5), "it may still gain privileges");
        thread::sleep(Duration::from_millis(2));
    }
    thread::sleep(Duration::from_millis(50));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
    drop(control);
    let mut child = child;
    assert!(child.wait().unwrap().success());
}
