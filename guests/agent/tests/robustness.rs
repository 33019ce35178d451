//! Limits, ends, and hosts that misbehave.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod common;

use common::{Agent, PATIENCE, exec, lives, marker, sh, sleepers, wait_until, with_timeout};
use microvm_protocol::agent::{ExecFailureKind, ExecRequest, ExitStatus, FromAgent, ToAgent};
use microvm_protocol::frame::{self, MAX_CHUNK};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

/// Forks twice and opens a session of its own, with its output elsewhere.
fn daemon(mark: &str) -> String {
    format!("(setsid sh -c 'sleep {mark}; :' >/dev/null 2>&1 </dev/null &)")
}

#[test]
fn a_timeout_kills_the_whole_tree() {
    for agent in Agent::all() {
        let (child, orphan) = (marker(), marker());
        let script = format!("echo begun; sleep {child} & (sleep {orphan} &) ; wait");
        let start = Instant::now();
        let outcome = agent.run(with_timeout(sh(&script), 300));
        assert_eq!((outcome.stdout, outcome.status), (b"begun\n".to_vec(), Some(ExitStatus::TimedOut)));
        assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < Duration::from_millis(1200));
        wait_until("children are gone", || !lives(&child) && !lives(&orphan));
        wait_until("zombies are gone", || agent.children().is_empty());
    }
}

#[test]
fn a_timeout_kills_daemons_in_the_command_s_group() {
    let Some(agent) = Agent::start_with_groups() else {
        return;
    };
    let mark = marker();
    let script = format!("{}; sleep 1000", daemon(&mark));
    let mut stream = agent.exec(with_timeout(sh(&script), 500));
    stream.started();
    wait_until("the daemon runs", || lives(&mark));
    assert_eq!(stream.finish().status, Some(ExitStatus::TimedOut));
    wait_until("the daemon is gone", || !lives(&mark));
    wait_until("its group is gone", || agent.groups() == 1);
}

#[test]
fn a_timeout_counts_also_when_only_a_background_process_is_left() {
    for agent in Agent::all() {
        let mark = marker();
        let outcome = agent.run(with_timeout(sh(&format!("sleep {mark} & exit 0")), 200));
        assert_eq!(outcome.status, Some(ExitStatus::TimedOut));
        wait_until("the process is gone", || !lives(&mark));
    }
}

#[test]
fn timeouts_of_any_length_are_kept() {
    let agent = Agent::start();
    assert_eq!(agent.run(with_timeout(exec(["sleep", "1000"]), 0)).status, Some(ExitStatus::TimedOut));
    assert_eq!(agent.run(with_timeout(exec(["true"]), u64::MAX)).status, Some(ExitStatus::Code(0)));
}

#[test]
fn closing_the_stream_kills_the_whole_tree() {
    for agent in Agent::all() {
        let (child, far) = (marker(), marker());
        let far_script = if agent.has_groups() { daemon(&far) } else { format!("setsid sleep {far} &") };
        let mut stream = agent.exec(sh(&format!("sleep {child} &\n{far_script}\nsleep 1000")));
        stream.started();
        wait_until("all run", || lives(&child) && lives(&far));
        drop(stream);
        wait_until("all are gone", || !lives(&child) && !lives(&far));
        wait_until("zombies are gone", || agent.children().is_empty());
    }
}

#[test]
fn closing_the_stream_is_noticed_while_input_and_output_are_stuck() {
    for agent in Agent::all() {
        let mark = marker();
        let mut stream = agent.exec(ExecRequest { stdin: true, ..sh(&format!("yes & sleep {mark}")) });
        stream.started();
        wait_until("it runs", || lives(&mark));
        fill(&mut stream.socket);
        stream.socket.shutdown(Shutdown::Write).unwrap();
        wait_until("it is gone", || !lives(&mark));
    }
}

#[test]
fn a_daemon_outlives_its_command_and_its_group_goes_with_it() {
    let Some(agent) = Agent::start_with_groups() else {
        return;
    };
    let mark = marker();
    let script = format!("{}; sleep 0.1", daemon(&mark));
    assert_eq!(agent.sh(&script).status, Some(ExitStatus::Code(0)));
    wait_until("the daemon runs", || lives(&mark));
    // Its own, and the one kept spare, which is made when there is nothing else to do.
    wait_until("there are two groups", || agent.groups() == 2);
    for pid in sleepers(&mark) {
        // SAFETY: kill touches no memory of this process.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    wait_until("its group is gone", || agent.groups() == 1);
}

#[test]
fn each_command_gets_a_fresh_group() {
    let Some(agent) = Agent::start_with_groups() else {
        return;
    };
    let script = "d=/sys/fs/cgroup; [ -e $d/cgroup.procs ] || d=$d/unified; \
                  g=$d$(grep '^0::' /proc/self/cgroup | cut -d: -f3); mkdir $g/inner && rmdir $g/inner; echo $g";
    let first = agent.sh(script);
    let second = agent.sh(script);
    assert_eq!((first.status, first.stderr), (Some(ExitStatus::Code(0)), vec![]));
    assert_ne!(first.stdout, second.stdout);
}

/// Writes standard input until nothing more is taken for a while.
fn fill(socket: &mut std::os::unix::net::UnixStream) -> usize {
    socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = frame::encode_prefixed(&ToAgent::Stdin(vec![b'x'; MAX_CHUNK])).unwrap();
    let mut total = 0;
    while let Ok(length) = socket.write(&chunk[total % chunk.len()..]) {
        total += length;
        assert!(total < 100 << 20, "everything is taken");
    }
    total
}

#[test]
fn memory_is_bounded_while_the_host_does_not_read() {
    let agent = Agent::start();
    let before = agent.status("VmRSS");
    let size = 300 << 20;
    let mut stream = agent.exec(sh(&format!("head -c {size} /dev/zero & head -c {size} /dev/zero >&2; wait; exit 9")));
    stream.started();
    std::thread::sleep(Duration::from_millis(500));
    assert!(agent.status("VmRSS") < before + 4096, "{} KiB, before {before}", agent.status("VmRSS"));

    let (mut stdout, mut stderr) = (0, 0);
    loop {
        match stream.receive().unwrap() {
            FromAgent::Stdout(bytes) => stdout += bytes.len(),
            FromAgent::Stderr(bytes) => stderr += bytes.len(),
            FromAgent::Exited(status) => break assert_eq!(status, ExitStatus::Code(9)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((stdout, stderr), (size, size));
    assert!(agent.status("VmHWM") < before + 8192, "{} KiB, before {before}", agent.status("VmHWM"));
}

#[test]
fn memory_is_bounded_while_the_command_does_not_read() {
    let agent = Agent::start();
    let before = agent.status("VmRSS");
    let script = "read line; cat >/dev/null; exit 6";
    let mut stream = agent.exec(ExecRequest { stdin: true, ..sh(&format!("kill -STOP $$; {script}")) });
    let pid = stream.started();
    let taken = fill(&mut stream.socket);
    assert!(taken < 4 << 20, "{taken}");
    assert!(agent.status("VmHWM") < before + 4096, "{} KiB, before {before}", agent.status("VmHWM"));

    // SAFETY: kill touches no memory of this process.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGCONT) };
    let chunk = frame::encode_prefixed(&ToAgent::Stdin(vec![b'x'; MAX_CHUNK])).unwrap();
    stream.socket.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.socket.write_all(&chunk[taken % chunk.len()..]).unwrap();
    stream.send(&ToAgent::StdinEnd);
    assert_eq!(stream.finish().status, Some(ExitStatus::Code(6)));
}

#[test]
fn many_commands_run_at_once() {
    for agent in Agent::all() {
        let mut streams: Vec<_> = (0..200)
            .map(|number| {
                let mut stream = agent.exec(ExecRequest { stdin: true, ..sh(&format!("cat; exit {}", number % 100)) });
                stream.send(&ToAgent::Stdin(format!("input {number}").into_bytes()));
                stream
            })
            .collect();
        for stream in streams.iter_mut().rev() {
            stream.send(&ToAgent::StdinEnd);
        }
        for (number, stream) in streams.into_iter().enumerate() {
            let outcome = stream.finish();
            assert_eq!(outcome.stdout, format!("input {number}").into_bytes());
            assert_eq!(outcome.status, Some(ExitStatus::Code(u8::try_from(number % 100).unwrap())));
        }
    }
}

#[test]
fn the_command_over_the_limit_is_refused_and_leaves_room_again() {
    let agent = Agent::start();
    let mut streams: Vec<_> = (0..512).map(|_| agent.exec(ExecRequest { stdin: true, ..exec(["cat"]) })).collect();
    for stream in &mut streams {
        stream.started();
    }
    let failure = agent.sh("true").failure.unwrap();
    assert_eq!(failure.kind, ExecFailureKind::Resources);
    assert!(failure.message.contains("512"), "{}", failure.message);
    streams.truncate(500);
    wait_until("the closed ones are gone", || agent.children().len() == 500);
    assert_eq!(agent.sh("true").status, Some(ExitStatus::Code(0)));
}

#[test]
fn streams_over_the_limit_wait_for_their_turn() {
    let agent = Agent::start();
    let idle: Vec<_> = (0..768).map(|_| agent.connect()).collect();
    let waiting = agent.exec(exec(["true"]));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(agent.children(), []);
    drop(idle);
    assert_eq!(waiting.finish().status, Some(ExitStatus::Code(0)));
}

#[test]
fn nothing_is_left_behind() {
    for agent in Agent::all() {
        agent.sh("true");
        let (files, memory) = (agent.open_files(), agent.status("VmRSS"));
        for number in 0..200 {
            let outcome = if number % 2 == 0 { agent.sh("echo $$; (sleep 0 &)") } else { agent.run(exec(["/absent"])) };
            assert!(outcome.status.is_some() || outcome.failure.is_some());
        }
        // The first command's stream may still have been open when they were counted, and the spare group not yet;
        // a leak would be one for each of the 200.
        wait_until("descriptors are closed", || agent.open_files() <= files + 4);
        wait_until("processes are reaped", || agent.children().is_empty());
        assert!(agent.status("VmRSS") < memory + 512);
        if agent.has_groups() {
            wait_until("groups are removed", || agent.groups() == 1);
        }
    }
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let agent = Agent::start();
    let mut bystander = agent.exec(ExecRequest { stdin: true, ..exec(["cat"]) });
    bystander.started();
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(bytes in proptest::collection::vec(any::<u8>(), 0..300), announce in any::<bool>())| {
        let mut stream = agent.connect();
        if announce {
            stream.socket.write_all(&u32::try_from(bytes.len()).unwrap().to_le_bytes()).unwrap();
        }
        // The agent may have closed the stream before all of it was written.
        let _ = stream.socket.write_all(&bytes);
        let _ = stream.socket.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.socket.read_to_end(&mut answer);
        prop_assert_eq!(answer, b"");
    });
    bystander.send(&ToAgent::Stdin(b"still here".to_vec()));
    bystander.send(&ToAgent::StdinEnd);
    assert_eq!(bystander.finish().stdout, b"still here");
}

#[test]
fn truncated_frames_run_nothing() {
    let agent = Agent::start();
    let mark = marker();
    let whole = frame::encode_prefixed(&ToAgent::Exec(exec(["sleep", &mark]))).unwrap();
    for length in 0..whole.len() {
        let mut stream = agent.connect();
        stream.socket.write_all(&whole[..length]).unwrap();
        stream.socket.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.receive(), None);
    }
    assert!(!lives(&mark));
}

#[test]
fn messages_out_of_turn_end_the_connection_and_the_command() {
    let agent = Agent::start();
    for first in [ToAgent::Stdin(vec![1]), ToAgent::StdinEnd, ToAgent::Signal(9)] {
        let mut stream = agent.connect();
        stream.send(&first);
        assert_eq!(stream.receive(), None);
    }
    for second in [ToAgent::Exec(exec(["true"])), ToAgent::PowerOff] {
        let mark = marker();
        let mut stream = agent.exec(exec(["sleep", &mark]));
        stream.started();
        wait_until("it runs", || lives(&mark));
        stream.send(&second);
        assert_eq!(stream.receive(), None);
        wait_until("it is gone", || !lives(&mark));
    }
    assert_eq!(agent.sh("true").status, Some(ExitStatus::Code(0)));
}

#[test]
fn a_request_in_single_bytes_is_understood() {
    let agent = Agent::start();
    let mut stream = agent.connect();
    for byte in frame::encode_prefixed(&ToAgent::Exec(exec(["echo", "hello"]))).unwrap() {
        stream.socket.write_all(&[byte]).unwrap();
    }
    assert_eq!(stream.finish().stdout, b"hello\n");
}

#[test]
fn power_off_without_commands_is_immediate() {
    for mut agent in Agent::all() {
        let start = Instant::now();
        agent.connect().send(&ToAgent::PowerOff);
        assert!(agent.wait().success());
        assert!(start.elapsed() < Duration::from_millis(450), "{:?}", start.elapsed());
    }
}

#[test]
fn power_off_ends_commands_and_tells_their_end() {
    for mut agent in Agent::all() {
        let (stubborn_mark, daemon_mark) = (marker(), marker());
        let mut obedient = agent.exec(exec(["sleep", "1000"]));
        let mut stubborn = agent.exec(sh(&format!("trap '' TERM; sleep {stubborn_mark}")));
        let launcher = agent.sh(&format!("{}; sleep 0.1", daemon(&daemon_mark)));
        assert_eq!(launcher.status, Some(ExitStatus::Code(0)));
        obedient.started();
        stubborn.started();
        wait_until("all run", || lives(&stubborn_mark) && lives(&daemon_mark));
        let mut ending = agent.connect();
        ending.send(&ToAgent::PowerOff);
        assert_eq!(obedient.finish().status, Some(ExitStatus::Signal(libc::SIGTERM)));
        assert_eq!(stubborn.finish().status, Some(ExitStatus::Signal(libc::SIGKILL)));
        assert_eq!(ending.receive(), None);
        assert!(agent.wait().success());
        wait_until("all are gone", || !lives(&stubborn_mark) && !lives(&daemon_mark));
    }
}
