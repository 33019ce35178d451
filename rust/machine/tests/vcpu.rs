//! The low-level machine: guests of a few real-mode instructions, one exit at a time.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests fail by panicking"
)]

mod support;

use microvm_machine::{Exit, VcpuError};
use std::time::{Duration, Instant};
use support::{CODE, backend, real_mode};

const FOREVER: [u8; 2] = [0xeb, 0xfe]; // jmp .

#[test]
fn run_port_accesses_come_out_and_answers_go_in() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(
        &backend,
        &[
            0xb0, 0x41, 0xe6, 0x10, // mov al, 'A'; out 0x10, al
            0xe4, 0x11, 0xe6, 0x12, // in al, 0x11; out 0x12, al
            0xe5, 0x13, 0xe7, 0x14, // in ax, 0x13; out 0x14, ax
            0xf4, // hlt
        ],
    );
    let out = |port, data: &[u8]| Exit::IoOut { port, size: data.len() as u8, data: data.to_vec() };

    assert_eq!(vcpu.run(None).unwrap(), out(0x10, b"A"));
    assert_eq!(vcpu.answer(&[1]), Err(VcpuError::Answer { expected: 0, found: 1 }));
    assert_eq!(vcpu.run(None).unwrap(), Exit::IoIn { port: 0x11, size: 1, count: 1 });
    assert_eq!(vcpu.answer(&[1, 2]), Err(VcpuError::Answer { expected: 1, found: 2 }));
    vcpu.answer(&[0x5a]).unwrap();
    assert_eq!(vcpu.run(None).unwrap(), out(0x12, &[0x5a]));
    assert_eq!(vcpu.run(None).unwrap(), Exit::IoIn { port: 0x13, size: 2, count: 1 });
    // Not answered: all ones.
    assert_eq!(vcpu.run(None).unwrap(), out(0x14, &[0xff, 0xff]));
    assert_eq!(vcpu.run(None).unwrap(), Exit::Halt);
}

#[test]
fn run_string_output_brings_all_values_in_order() {
    let Some(backend) = backend() else { return };
    let mut code = vec![
        0xbe, 0x11, 0x10, // mov si, 0x1011
        0xba, 0x20, 0x00, // mov dx, 0x20
        0xb9, 0x05, 0x00, // mov cx, 5
        0xfc, 0xf3, 0x6e, // cld; rep outsb
        0xf4, 0, 0, 0, 0, // hlt
    ];
    code.extend(b"hello");
    let mut vcpu = real_mode(&backend, &code);
    let mut all = Vec::new();
    while let Exit::IoOut { port: 0x20, size: 1, data } = vcpu.run(None).unwrap() {
        all.extend(data);
    }
    assert_eq!(all, b"hello");
}

#[test]
fn run_memory_accesses_outside_ram_come_out_and_answers_go_in() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(
        &backend,
        &[
            0xb8, 0x00, 0x90, 0x8e, 0xd8, // mov ax, 0x9000; mov ds, ax
            0xc6, 0x06, 0x04, 0x00, 0x7e, // mov byte [4], 0x7e
            0xa1, 0x08, 0x00, 0xe7, 0x30, // mov ax, [8]; out 0x30, ax
            0xa0, 0x0a, 0x00, 0xe6, 0x31, // mov al, [10]; out 0x31, al
        ],
    );
    assert_eq!(vcpu.run(None).unwrap(), Exit::MmioWrite { address: 0x9_0004, data: vec![0x7e] });
    assert_eq!(vcpu.run(None).unwrap(), Exit::MmioRead { address: 0x9_0008, size: 2 });
    vcpu.answer(&[0x34, 0x12]).unwrap();
    assert_eq!(vcpu.run(None).unwrap(), Exit::IoOut { port: 0x30, size: 2, data: vec![0x34, 0x12] });
    assert_eq!(vcpu.run(None).unwrap(), Exit::MmioRead { address: 0x9_000a, size: 1 });
    // Not answered: all ones.
    assert_eq!(vcpu.run(None).unwrap(), Exit::IoOut { port: 0x31, size: 1, data: vec![0xff] });
}

#[test]
fn run_endless_guest_ends_when_the_time_is_over() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(&backend, &FOREVER);
    for timeout in [0, 1, 30].map(Duration::from_millis) {
        let start = Instant::now();
        assert_eq!(vcpu.run(Some(timeout)).unwrap(), Exit::Timeout);
        assert!(start.elapsed() >= timeout && start.elapsed() < timeout + Duration::from_secs(2));
    }
    assert_eq!(vcpu.regs().unwrap().rip, CODE);
}

#[test]
fn run_endless_refused_instructions_ends_when_the_time_is_over() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(&backend, &[0x9b, 0xeb, 0xfd]); // again: fwait; jmp again
    let start = Instant::now();
    assert_eq!(vcpu.run(Some(Duration::from_millis(50))).unwrap(), Exit::Timeout);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn run_with_no_time_completes_the_access_before() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(&backend, &[0xe4, 0x11, 0xeb, 0xfe]); // in al, 0x11; jmp .
    assert!(matches!(vcpu.run(None).unwrap(), Exit::IoIn { .. }));
    vcpu.answer(&[0x77]).unwrap();
    assert_eq!(vcpu.run(Some(Duration::ZERO)).unwrap(), Exit::Timeout);
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rip, regs.rax & 0xff), (CODE + 2, 0x77));
}

#[test]
fn kick_before_run_is_not_lost_and_counts_once() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(&backend, &FOREVER);
    vcpu.kicker().kick();
    vcpu.kicker().kick_and_wait().unwrap();
    let start = Instant::now();
    assert_eq!(vcpu.run(Some(Duration::from_secs(5))).unwrap(), Exit::Interrupted);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(vcpu.run(Some(Duration::from_millis(5))).unwrap(), Exit::Timeout);
}

#[test]
fn kick_from_another_thread_is_always_answered() {
    let Some(backend) = backend() else { return };
    let mut vcpu = real_mode(&backend, &FOREVER);
    let kicker = vcpu.kicker();
    let runner = std::thread::spawn(move || {
        let mut interrupted = 0;
        while vcpu.run(Some(Duration::from_secs(1))).unwrap() == Exit::Interrupted {
            interrupted += 1;
        }
        interrupted
    });
    for _ in 0..200 {
        kicker.kick_and_wait().unwrap();
    }
    // Several kicks may be answered at once, but only those that come between two runs.
    assert!(runner.join().unwrap() >= 1);
    // The vCPU is gone; its kicker may stay.
    kicker.kick_and_wait().unwrap();
}

#[test]
fn read_virtual_stops_where_memory_does() {
    let Some(backend) = backend() else { return };
    let vcpu = real_mode(&backend, b"abc");
    assert_eq!(vcpu.read_virtual(CODE, 3), b"abc");
    assert_eq!(vcpu.read_virtual(0xfffe, 100), [0, 0]);
    assert_eq!(vcpu.translate(CODE).unwrap(), Some(CODE));
}
