//! The laws of the host side, against a VMM and an agent made of threads.

use crate::exec::TIMEOUT_GRACE;
use crate::testing::{FakeAgent, FakeVmm, command, report, sandbox};
use crate::*;
use microvm_protocol::agent::{FromAgent, ToAgent};
use microvm_protocol::control::{Event, Request};
use microvm_protocol::frame::MAX_CHUNK;
use proptest::prelude::*;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

fn never() -> Result<(), Interrupted> {
    Ok(())
}

/// A check that gives up after `limit`.
fn patience(limit: Duration) -> impl FnMut() -> Result<(), Interrupted> {
    let begun = Instant::now();
    move || if begun.elapsed() < limit { Ok(()) } else { Err(Interrupted) }
}

fn captured() -> Streams {
    Streams { stdout: Output::Buffer, stderr: Output::Buffer, ..Streams::default() }
}

/// An agent that writes its standard input to standard output, in pieces of these sizes.
fn echo(mut agent: FakeAgent, sizes: &[usize]) {
    agent.exec();
    agent.say(&FromAgent::Started { pid: 1 });
    let mut sizes = sizes.iter().copied().cycle();
    loop {
        match agent.next() {
            Some(ToAgent::Stdin(mut bytes)) => {
                while !bytes.is_empty() {
                    let rest = bytes.split_off(sizes.next().unwrap().min(bytes.len()));
                    agent.say(&FromAgent::Stdout(bytes));
                    bytes = rest;
                }
            }
            Some(ToAgent::StdinEnd) => break,
            other => panic!("{other:?}"),
        }
    }
    agent.say(&FromAgent::Exited(ExitStatus::Code(0)));
}

fn feed(mut writer: PipeWriter, bytes: Vec<u8>, sizes: Vec<usize>) {
    let mut rest = &bytes[..];
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at((*size).min(rest.len()));
        writer.write_all(now).unwrap();
        rest = later;
    }
}

fn drain(mut reader: PipeReader, sizes: Vec<usize>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for size in sizes.iter().cycle() {
        let mut piece = vec![0; *size];
        match reader.read(&mut piece).unwrap() {
            0 => break,
            length => bytes.extend_from_slice(&piece[..length]),
        }
    }
    bytes
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![1usize..40, 1000usize..5000, Just(MAX_CHUNK)], 1..6)
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    (prop_oneof![0usize..2000, 60_000usize..900_000], any::<u8>())
        .prop_map(|(length, seed)| (0..length).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bytes_pass_intact_through_any_chunking(
        input in bytes(), written in sizes(), echoed in sizes(), read in sizes(), by_descriptor in any::<bool>(),
    ) {
        let (sandbox, vmm) = sandbox();
        let served = vmm.serve(1, move |agent| echo(agent, &echoed));
        let output = if by_descriptor {
            let (stdin, feeder) = pipe().unwrap();
            let (drainer, stdout) = pipe().unwrap();
            let fed = { let input = input.clone(); thread::spawn(move || feed(feeder, input, written)) };
            let drained = thread::spawn(move || drain(drainer, read));
            let streams = Streams { stdin: Input::Fd(stdin.into()), stdout: Output::Fd(stdout.into()), ..captured() };
            sandbox.exec(command(), streams, &mut never).unwrap();
            fed.join().unwrap();
            drained.join().unwrap()
        } else {
            let streams = Streams { stdin: Input::Bytes(input.clone()), ..captured() };
            sandbox.exec(command(), streams, &mut never).unwrap().stdout
        };
        served.join().unwrap();
        prop_assert!(output == input, "{} bytes in, {} out", input.len(), output.len());
    }

    #[test]
    fn any_bytes_from_the_vmm_end_the_machine_or_are_a_message(garbage in proptest::collection::vec(any::<u8>(), 1..200)) {
        let (sandbox, vmm) = sandbox();
        rustix::net::send(&vmm.control, &garbage, rustix::net::SendFlags::empty()).unwrap();
        drop(vmm.control);
        let begun = Instant::now();
        prop_assert!(sandbox.exec(command(), captured(), &mut never).is_err());
        prop_assert!(begun.elapsed() < SECOND);
    }

    #[test]
    fn any_bytes_from_the_agent_end_the_command(garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (sandbox, vmm) = sandbox();
        let served = vmm.serve(1, move |mut agent| {
            agent.exec();
            let _ = agent.stream.write_all(&garbage);
        });
        let begun = Instant::now();
        let _ = sandbox.exec(command(), captured(), &mut never);
        prop_assert!(begun.elapsed() < Duration::from_secs(2));
        served.join().unwrap();
    }
}

#[test]
fn outputs_stay_apart_and_the_status_arrives() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        let request = agent.exec();
        assert!(!request.stdin);
        agent.say(&FromAgent::Started { pid: 1 });
        agent.say(&FromAgent::Stdout(b"out".to_vec()));
        agent.say(&FromAgent::Stderr(b"err".to_vec()));
        agent.say(&FromAgent::Exited(ExitStatus::Code(3)));
    });
    let exited = sandbox.exec(command(), captured(), &mut never).unwrap();
    served.join().unwrap();
    assert_eq!((exited.status, &*exited.stdout, &*exited.stderr), (ExitStatus::Code(3), &b"out"[..], &b"err"[..]));
}

#[test]
fn a_command_that_leaves_its_input_unread_still_gives_its_status() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        agent.say(&FromAgent::Stdout(b"enough".to_vec()));
        agent.say(&FromAgent::Exited(ExitStatus::Code(0)));
    });
    let streams = Streams { stdin: Input::Bytes(vec![7; 8 << 20]), ..captured() };
    let exited = sandbox.exec(command(), streams, &mut never).unwrap();
    served.join().unwrap();
    assert_eq!((exited.status, &*exited.stdout), (ExitStatus::Code(0), &b"enough"[..]));
}

#[test]
fn a_command_that_closes_its_input_runs_on_to_its_status() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        agent.stream.shutdown(std::net::Shutdown::Read).unwrap();
        thread::sleep(Duration::from_millis(100));
        agent.say(&FromAgent::Exited(ExitStatus::Code(5)));
    });
    let streams = Streams { stdin: Input::Bytes(vec![7; 8 << 20]), ..captured() };
    let exited = sandbox.exec(command(), streams, &mut never).unwrap();
    served.join().unwrap();
    assert_eq!(exited.status, ExitStatus::Code(5));
}

#[test]
fn an_answer_wakes_the_waiter_at_once() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(10, |agent| echo(agent, &[1]));
    let fastest = (0..10)
        .map(|_| {
            let streams = Streams { stdin: Input::Bytes(Vec::new()), ..captured() };
            sandbox.exec(command(), streams, &mut never).unwrap().duration
        })
        .min();
    served.join().unwrap();
    // Nobody waits for the end of a slice (50 ms), however busy the machine is at times.
    assert!(fastest.unwrap() < Duration::from_millis(25), "{fastest:?}");
}

#[test]
fn many_threads_run_commands_at_once() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(32, |agent| echo(agent, &[100]));
    thread::scope(|scope| {
        for n in 0..32u8 {
            let sandbox = &sandbox;
            scope.spawn(move || {
                let streams = Streams { stdin: Input::Bytes(vec![n; 5000]), ..captured() };
                assert_eq!(sandbox.exec(command(), streams, &mut never).unwrap().stdout, vec![n; 5000]);
            });
        }
    });
    served.join().unwrap();
}

#[test]
fn signals_reach_the_command() {
    let (sandbox, vmm) = sandbox();
    let signals = SignalSender::new().unwrap();
    let served = {
        let signals = signals.clone();
        vmm.serve(1, move |mut agent| {
            agent.exec();
            signals.send(2);
            assert_eq!(agent.next(), Some(ToAgent::Signal(2)));
            agent.say(&FromAgent::Exited(ExitStatus::Signal(2)));
        })
    };
    let streams = Streams { signals: Some(signals), ..captured() };
    assert_eq!(sandbox.exec(command(), streams, &mut never).unwrap().status, ExitStatus::Signal(2));
    served.join().unwrap();
}

#[test]
fn a_failure_to_start_is_the_agents_own_words() {
    let (sandbox, vmm) = sandbox();
    let failure = ExecFailure { kind: ExecFailureKind::NotFound, errno: 2, message: "no such program: x".into() };
    let served = {
        let failure = failure.clone();
        vmm.serve(1, move |mut agent| {
            agent.exec();
            agent.say(&FromAgent::Failed(failure.clone()));
        })
    };
    let error = sandbox.exec(command(), captured(), &mut never).unwrap_err();
    served.join().unwrap();
    assert!(matches!(&error, SandboxError::Exec(found) if *found == failure), "{error:?}");
}

#[test]
fn a_refused_stream_says_why() {
    let (sandbox, vmm) = sandbox();
    let refuser = thread::spawn(move || {
        let Some(Request::Connect { id, .. }) = vmm.request() else { panic!() };
        vmm.send(&Event::ConnectFailed { id, reason: "nobody listens".into() });
        vmm
    });
    let error = sandbox.exec(command(), captured(), &mut never).unwrap_err();
    refuser.join().unwrap();
    assert!(matches!(&error, SandboxError::Connect { reason } if reason == "nobody listens"), "{error:?}");
}

/// Runs a command during which `end` ends the machine; gives the error and how long it took from then on.
fn ended_by(end: impl FnOnce(FakeVmm, FakeAgent) + Send + 'static) -> (SandboxError, Duration) {
    let (sandbox, vmm) = sandbox();
    vmm.say_ready();
    let ender = thread::spawn(move || {
        let mut agent = vmm.connect();
        agent.exec();
        agent.say(&FromAgent::Started { pid: 1 });
        thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        end(vmm, agent);
        begun
    });
    let error = sandbox.exec(command(), captured(), &mut never).unwrap_err();
    (error, ender.join().unwrap().elapsed())
}

#[test]
fn a_killed_vmm_ends_the_command_with_its_signal() {
    let (error, waited) = ended_by(|vmm, agent| {
        vmm.shared.process.kill();
        drop(agent);
    });
    assert!(matches!(&error, SandboxError::VmmCrashed(crash) if crash.signal == Some(9)), "{error:?}");
    assert!(waited < SECOND, "{waited:?}");
}

#[test]
fn a_guest_panic_ends_the_command_with_the_console() {
    let (error, waited) = ended_by(|vmm, agent| {
        drop(agent);
        vmm.send(&Event::Ended(report(EndReason::Reset)));
    });
    assert!(matches!(&error, SandboxError::Ended(report) if report.reason == EndReason::Reset), "{error:?}");
    assert_eq!(error.console_tail(), Some(&b"last words\n"[..]));
    assert!(waited < SECOND, "{waited:?}");
}

#[test]
fn a_vmm_that_closes_the_link_and_lingers_is_killed() {
    let (error, waited) = ended_by(|vmm, agent| {
        drop(vmm.control);
        drop(agent);
    });
    assert!(matches!(&error, SandboxError::VmmCrashed(crash) if crash.signal == Some(9)), "{error:?}");
    assert!(waited < SECOND, "{waited:?}");
}

#[test]
fn a_stream_that_ends_early_is_an_error_although_the_machine_lives() {
    let (error, waited) = ended_by(|vmm, agent| {
        drop(agent);
        thread::sleep(Duration::from_secs(2));
        drop(vmm);
    });
    assert!(matches!(error, SandboxError::Protocol { peer: "the agent", .. }), "{error:?}");
    assert!(waited < Duration::from_secs(3), "{waited:?}");
}

#[test]
fn a_missing_or_unasked_descriptor_is_a_broken_protocol() {
    let input = std::io::stdin();
    for (event, descriptors) in [(Event::Connected { id: 0 }, vec![]), (Event::Started, vec![input.as_fd()])] {
        let (sandbox, vmm) = sandbox();
        vmm.control.send(&event, &descriptors).unwrap();
        let error = sandbox.exec(command(), captured(), &mut never).unwrap_err();
        assert!(matches!(error, SandboxError::Protocol { peer: "the VMM", .. }), "{error:?}");
    }
}

#[test]
fn an_answer_nobody_waits_for_closes_its_stream() {
    let (_sandbox, vmm) = sandbox();
    let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    vmm.control.send(&Event::Connected { id: 99 }, &[there.as_fd()]).unwrap();
    drop(there);
    assert_eq!(here.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_reader_that_is_gone_ends_the_command_as_sigpipe_would() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        while agent.say(&FromAgent::Stdout(b"yes\n".repeat(1000))) {}
    });
    let (reader, stdout) = pipe().unwrap();
    drop(reader);
    let streams = Streams { stdout: Output::Fd(stdout.into()), ..captured() };
    let exited = sandbox.exec(command(), streams, &mut never).unwrap();
    served.join().unwrap();
    assert_eq!(exited.status, ExitStatus::Signal(libc::SIGPIPE));
}

#[test]
fn a_reader_that_does_not_read_stops_the_guest_and_not_the_check() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        let mut sent = 0usize;
        while agent.say(&FromAgent::Stdout(vec![b'x'; MAX_CHUNK])) {
            sent += MAX_CHUNK;
        }
        assert!(sent < 4 << 20, "{sent} bytes went out to somebody who does not read");
    });
    let (_reader, stdout) = pipe().unwrap();
    let streams = Streams { stdout: Output::Fd(stdout.into()), ..captured() };
    let begun = Instant::now();
    let error = sandbox.exec(command(), streams, &mut patience(Duration::from_millis(200))).unwrap_err();
    assert!(matches!(error, SandboxError::Interrupted), "{error:?}");
    assert!(begun.elapsed() < Duration::from_millis(600), "{:?}", begun.elapsed());
    served.join().unwrap();
}

#[test]
fn one_blocked_output_does_not_block_the_other() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        agent.say(&FromAgent::Stdout(vec![b'x'; MAX_CHUNK]));
        agent.say(&FromAgent::Stdout(vec![b'x'; MAX_CHUNK]));
        agent.say(&FromAgent::Stderr(b"still here".to_vec()));
        agent.say(&FromAgent::Exited(ExitStatus::Code(0)));
    });
    let (mut slow, stdout) = pipe().unwrap();
    let (mut quick, stderr) = pipe().unwrap();
    let reader = thread::spawn(move || {
        let mut words = String::new();
        quick.read_to_string(&mut words).unwrap();
        words
    });
    let drained = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    let streams = Streams { stdout: Output::Fd(stdout.into()), stderr: Output::Fd(stderr.into()), ..captured() };
    sandbox.exec(command(), streams, &mut never).unwrap();
    served.join().unwrap();
    assert_eq!(reader.join().unwrap(), "still here");
    assert_eq!(drained.join().unwrap(), 2 * MAX_CHUNK);
}

#[test]
fn an_agent_that_does_not_read_stops_the_input_and_not_the_check() {
    let (sandbox, vmm) = sandbox();
    let agent = thread::spawn(move || vmm.connect());
    let streams = Streams { stdin: Input::Bytes(vec![0; 64 << 20]), ..captured() };
    let error = sandbox.exec(command(), streams, &mut patience(Duration::from_millis(200))).unwrap_err();
    assert!(matches!(error, SandboxError::Interrupted), "{error:?}");
    agent.join().unwrap();
}

#[test]
fn a_time_limit_holds_although_the_guest_does_not_keep_it() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |mut agent| {
        agent.exec();
        agent.say(&FromAgent::Stdout(b"until then".to_vec()));
        assert_eq!(agent.next(), None);
    });
    let request = ExecRequest { timeout_ms: Some(100), ..command() };
    let exited = sandbox.exec(request, captured(), &mut never).unwrap();
    served.join().unwrap();
    assert_eq!((exited.status, &*exited.stdout), (ExitStatus::TimedOut, &b"until then"[..]));
    assert!(
        exited.duration >= TIMEOUT_GRACE && exited.duration < TIMEOUT_GRACE.saturating_add(SECOND),
        "{:?}",
        exited.duration
    );
}

#[test]
fn a_time_limit_holds_although_the_guest_does_not_even_answer() {
    let (sandbox, _vmm) = sandbox();
    let request = ExecRequest { timeout_ms: Some(100), ..command() };
    let exited = sandbox.exec(request, captured(), &mut never).unwrap();
    assert_eq!(exited.status, ExitStatus::TimedOut);
    assert!(exited.duration < TIMEOUT_GRACE.saturating_add(SECOND), "{:?}", exited.duration);
}

#[test]
fn the_callers_descriptors_stay_blocking() {
    let (sandbox, vmm) = sandbox();
    let served = vmm.serve(1, |agent| echo(agent, &[1000]));
    let (stdin, feeder) = pipe().unwrap();
    let (reader, stdout) = pipe().unwrap();
    let (stdin_copy, stdout_copy) = (stdin.try_clone().unwrap(), stdout.try_clone().unwrap());
    drop(feeder);
    let streams = Streams { stdin: Input::Fd(stdin.into()), stdout: Output::Fd(stdout.into()), ..captured() };
    sandbox.exec(command(), streams, &mut never).unwrap();
    served.join().unwrap();
    for fd in [stdin_copy.as_fd(), stdout_copy.as_fd()] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }
    drop(reader);
}

#[test]
fn requests_no_guest_could_run_are_refused_by_field() {
    let word = |bytes: &[u8]| serde_bytes::ByteBuf::from(bytes);
    let (sandbox, _vmm) = sandbox();
    let cases = [
        ("argv", ExecRequest { argv: Vec::new(), ..command() }),
        ("argv", ExecRequest { argv: vec![word(b"a\0b")], ..command() }),
        ("argv", ExecRequest { argv: vec![word(&[b'x'; 300 * 1024])], ..command() }),
        ("env", ExecRequest { env: vec![(word(b"A=B"), word(b""))], ..command() }),
        ("env", ExecRequest { env: vec![(word(b""), word(b""))], ..command() }),
        ("env", ExecRequest { env: vec![(word(b"A"), word(b"x\0"))], ..command() }),
        ("cwd", ExecRequest { cwd: Some(word(b"/\0")), ..command() }),
    ];
    for (expected, request) in cases {
        let error = sandbox.exec(request, captured(), &mut never).unwrap_err();
        assert!(matches!(error, SandboxError::Config { field: Some(field), .. } if field == expected), "{error:?}");
    }
}

#[test]
fn a_guest_that_never_gets_ready_is_killed_and_its_console_shown() {
    let (sandbox, vmm) = sandbox();
    let served = thread::spawn(move || {
        assert_eq!(vmm.request(), Some(Request::Kill));
        vmm.send(&Event::Ended(report(EndReason::Stopped)));
    });
    let error = sandbox.wait_ready(Duration::from_millis(100), &mut never).unwrap_err();
    served.join().unwrap();
    assert!(matches!(error, SandboxError::BootTimeout { .. }), "{error:?}");
    assert_eq!(error.console_tail(), Some(&b"last words\n"[..]));
    assert!(error.to_string().contains("console: last words"), "{error}");
}

#[test]
fn a_machine_that_ends_before_it_is_ready_did_not_boot() {
    for (reason, expected) in [(EndReason::Reset, "did not boot"), (EndReason::Kvm, "why"), (EndReason::Config, "why")]
    {
        let (sandbox, vmm) = sandbox();
        vmm.send(&Event::Ended(report(reason)));
        let error = sandbox.wait_ready(SECOND, &mut never).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!matches!(error, SandboxError::BootTimeout { .. } | SandboxError::Ended(_)), "{error:?}");
    }
}

#[test]
fn a_missing_vmm_and_a_bad_specification_are_named() {
    let null = || std::fs::File::open("/dev/null").unwrap();
    let spec = MachineSpec {
        vcpus: 1,
        memory: 64 << 20,
        initrd: false,
        command_line: String::new(),
        drives: Vec::new(),
        console: false,
        profile_us: None,
    };
    let launch = |spec, drives| Launch {
        vmm: "/no/such/vmm".into(),
        spec,
        kernel: null(),
        initrd: None,
        drives,
        console: None,
        boot_timeout: SECOND,
    };
    let error = Sandbox::launch(launch(spec.clone(), vec![]), &mut never).unwrap_err();
    assert!(matches!(error, SandboxError::Spawn { .. }) && error.to_string().contains("/no/such/vmm"), "{error}");
    let error = Sandbox::launch(launch(spec.clone(), vec![null()]), &mut never).unwrap_err();
    assert!(matches!(error, SandboxError::Config { field: Some("drives"), .. }), "{error:?}");
    let error = Sandbox::launch(launch(MachineSpec { memory: 1, ..spec }, vec![]), &mut never).unwrap_err();
    assert!(matches!(error, SandboxError::Config { field: Some("memory"), .. }), "{error:?}");
}

#[test]
fn stop_asks_the_agent_and_gives_the_report() {
    let (sandbox, vmm) = sandbox();
    let served = thread::spawn(move || {
        let mut agent = vmm.connect();
        assert_eq!(agent.next(), Some(ToAgent::PowerOff));
        vmm.send(&Event::Ended(report(EndReason::Stopped)));
    });
    let status = sandbox.stop(Duration::from_secs(5), &mut never).unwrap();
    served.join().unwrap();
    assert_eq!(status, Status::Ended(report(EndReason::Stopped)));
    assert_eq!(sandbox.console_tail(), b"last words\n");
}

#[test]
fn kill_asks_the_vmm_and_then_does_it() {
    let (sandbox, vmm) = sandbox();
    let begun = Instant::now();
    let status = sandbox.kill();
    assert_eq!(vmm.request(), Some(Request::Kill));
    assert!(matches!(status, Status::Crashed(VmmCrash { signal: Some(9), .. })), "{status:?}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!(sandbox.kill(), status);
}

#[test]
fn dropping_a_sandbox_ends_the_link_and_reaps_the_vmm() {
    let (sandbox, vmm) = sandbox();
    drop(sandbox);
    assert_eq!(vmm.request(), None);
    let begun = Instant::now();
    while vmm.shared.state().exit.is_none() {
        assert!(begun.elapsed() < Duration::from_secs(2), "the VMM is still there");
        thread::sleep(Duration::from_millis(5));
    }
}
