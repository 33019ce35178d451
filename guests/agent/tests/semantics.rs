//! Commands behave as they do under `std::process::Command` and Python's `subprocess`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod common;

use common::{Agent, Outcome, env, exec, sh};
use microvm_protocol::agent::{ExecFailureKind, ExecRequest, ExitStatus, ToAgent};
use microvm_protocol::frame::MAX_CHUNK;
use proptest::prelude::*;
use serde_bytes::ByteBuf;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// Prints its arguments and its environment, copies its input, and ends as its first argument says.
const PROBE: &str = r#"end=$1; shift; printf '%s\0' "$@"; env -0; cat; echo "$#" >&2; eval "$end""#;

#[derive(Debug, Clone)]
struct Case {
    arguments: Vec<Vec<u8>>,
    variables: Vec<(Vec<u8>, Vec<u8>)>,
    stdin: Option<Vec<u8>>,
    end: String,
}

fn case() -> impl Strategy<Value = Case> {
    let word = || proptest::collection::vec(1u8..=255, 0..40);
    let name = "[A-Za-z_][A-Za-z0-9_]{0,8}".prop_map(|name| format!("X{name}").into_bytes());
    let end = prop_oneof![
        (0u8..=255).prop_map(|code| format!("exit {code}")),
        prop_oneof![Just(1), Just(2), Just(6), Just(9), Just(13), Just(15), Just(34), Just(64)]
            .prop_map(|signal| format!("kill -{signal} $$; sleep 5")),
    ];
    (
        proptest::collection::vec(word(), 0..6),
        proptest::collection::btree_map(name, word(), 0..6),
        proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200_000)),
        end,
    )
        .prop_map(|(arguments, variables, stdin, end)| Case {
            arguments,
            variables: variables.into_iter().collect(),
            stdin,
            end,
        })
}

fn by_agent(agent: &Agent, case: &Case) -> Outcome {
    let mut argv: Vec<Vec<u8>> = ["sh", "-c", PROBE, "sh", &case.end].map(|word| word.as_bytes().to_vec()).into();
    argv.extend(case.arguments.clone());
    let mut variables = env(common::ENV);
    variables.extend(env(case.variables.iter().map(|(name, value)| (name, value))));
    let mut stream = agent.exec(ExecRequest { env: variables, stdin: case.stdin.is_some(), ..exec(argv) });
    if let Some(input) = &case.stdin {
        for chunk in input.chunks(MAX_CHUNK) {
            stream.send(&ToAgent::Stdin(chunk.to_vec()));
        }
        stream.send(&ToAgent::StdinEnd);
    }
    Outcome { pid: 0, ..stream.finish() }
}

fn by_standard_library(case: &Case) -> Outcome {
    let mut command = Command::new("sh");
    command.args(["-c", PROBE, "sh", &case.end]).args(case.arguments.iter().map(|word| OsStr::from_bytes(word)));
    command.env_clear().envs(common::ENV).current_dir("/");
    command.envs(case.variables.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    command.stdin(if case.stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdin = child.stdin.take();
    let input = case.stdin.clone().unwrap_or_default();
    let writer = std::thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    let code = output.status.code().map(|code| ExitStatus::Code(u8::try_from(code).unwrap()));
    let status = code.or_else(|| output.status.signal().map(ExitStatus::Signal));
    Outcome { stdout: output.stdout, stderr: output.stderr, status, ..Outcome::default() }
}

#[test]
fn commands_give_what_the_standard_library_gives() {
    let agents = Agent::all();
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(case in case())| {
        // The order of the environment is not part of it.
        let sorted = |mut outcome: Outcome| {
            let mut words: Vec<_> = outcome.stdout.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
            words.sort();
            outcome.stdout = words.join(&0);
            outcome
        };
        let expected = by_standard_library(&case);
        for agent in &agents {
            let got = by_agent(agent, &case);
            prop_assert_eq!(got.stdout.len(), expected.stdout.len());
            if case.stdin.as_ref().is_none_or(|input| !input.contains(&0)) {
                prop_assert_eq!(sorted(got.clone()), sorted(expected.clone()));
            } else {
                prop_assert_eq!(&got.stdout[got.stdout.len() - 1000.min(got.stdout.len())..],
                    &expected.stdout[expected.stdout.len() - 1000.min(expected.stdout.len())..]);
            }
            prop_assert_eq!(&got.stderr, &expected.stderr);
            prop_assert_eq!(got.status, expected.status);
        }
    });
}

/// Runs each (program, PATH, cwd) with Python's subprocess: 0 or the errno of the exception, one a line.
const PYTHON: &str = r#"
import subprocess, sys, os
words = sys.stdin.buffer.read().split(b"\0")[:-1]
for program, path, cwd in zip(words[0::3], words[1::3], words[2::3]):
    env = {} if path == b"-" else {b"PATH": path}
    try:
        subprocess.run([program], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        print(0)
    except OSError as error:
        print(error.errno)
"#;

#[test]
fn programs_are_found_and_refused_as_by_subprocess() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let file = |name: &str, mode: u32, content: &[u8]| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    file("plain/tool", 0o644, b"#!/bin/sh\n");
    file("good/tool", 0o755, b"#!/bin/sh\n");
    file("good/lost", 0o755, b"#!/no/such/interpreter\n");
    file("good/text", 0o755, b"echo hello\n");
    file("good/empty", 0o755, b"");
    file("file", 0o755, b"#!/bin/sh\n");
    std::fs::create_dir_all(root.join("folder/tool")).unwrap();
    std::os::unix::fs::symlink("loop", root.join("good/loop")).unwrap();
    let at = |path: &str| root.join(path).into_os_string();
    let long: OsString = OsString::from_vec(vec![b'x'; 300]);
    let programs: Vec<OsString> = vec![
        "tool".into(),
        "lost".into(),
        "text".into(),
        "empty".into(),
        "loop".into(),
        "true".into(),
        "absent".into(),
        "".into(),
        at("plain/tool"),
        at("good/tool"),
        at("good/lost"),
        at("good/text"),
        at("good/"),
        at("file/tool"),
        at("absent"),
        "good/tool".into(),
        "./tool".into(),
        "../good/tool".into(),
        "/".into(),
        "..".into(),
        long,
    ];
    let join = |parts: &[OsString]| parts.join(OsStr::new(":"));
    let paths: Vec<OsString> = vec![
        "-".into(),
        "".into(),
        ":".into(),
        "good".into(),
        "/usr/bin/".into(),
        at("good"),
        at("plain"),
        at("absent"),
        at("file"),
        join(&[at("plain"), at("good")]),
        join(&[at("absent"), at("file"), at("plain")]),
        join(&[at("folder"), "/bin".into()]),
        join(&["".into(), "/usr/bin".into()]),
    ];
    let directories = [at("."), at("good"), at("file"), at("absent"), OsString::new()];
    let mut cases = Vec::new();
    for program in &programs {
        for path in &paths {
            cases.extend(directories.iter().map(|directory| [program.clone(), path.clone(), directory.clone()]));
        }
    }
    let mut python = Command::new("python3");
    let mut python = python.args(["-c", PYTHON]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let words = cases.iter().flatten().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect::<Vec<u8>>();
    python.stdin.take().unwrap().write_all(&words).unwrap();
    let expected = String::from_utf8(python.wait_with_output().unwrap().stdout).unwrap();
    let agent = Agent::start();

    let got = cases.iter().map(|[program, path, directory]| {
        let path = if path == "-" { vec![] } else { env([(b"PATH".as_slice(), path.as_bytes())]) };
        let cwd = Some(ByteBuf::from(directory.as_bytes()));
        let outcome = agent.run(ExecRequest { env: path, cwd, ..exec([program.as_bytes()]) });
        outcome.failure.map_or(0, |failure| failure.errno)
    });

    let got: Vec<i32> = got.collect();
    let expected: Vec<i32> = expected.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(got.len(), expected.len());
    for ((case, got), expected) in cases.iter().zip(got).zip(expected) {
        assert_eq!(got, expected, "{case:?}");
    }
}

#[test]
fn failures_have_their_kind_and_name_the_culprit() {
    use ExecFailureKind::{Invalid, NotExecutable, NotFound, WorkingDirectory};
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "#! /no/interpreter -x\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = script.to_str().unwrap();
    let agent = Agent::start();
    let in_directory = |cwd: &str| ExecRequest { cwd: Some(ByteBuf::from(cwd)), ..exec(["true"]) };
    let in_environment = |name: &str, value: &str| ExecRequest { env: env([(name, value)]), ..exec(["true"]) };
    let cases = [
        (exec(["no-such-program"]), NotFound, "no-such-program"),
        (exec(["no-such-program"]), NotFound, "/usr/bin:/bin"),
        (exec(["/no/such/program"]), NotFound, "/no/such/program"),
        (exec(["/etc/passwd/program"]), NotFound, "/etc/passwd/program"),
        (exec([script]), NotFound, "/no/interpreter"),
        (exec(["/etc/passwd"]), NotExecutable, "/etc/passwd"),
        (exec(["/etc"]), NotExecutable, "/etc"),
        (in_directory("/no/directory"), WorkingDirectory, "/no/directory"),
        (in_directory("/etc/passwd"), WorkingDirectory, "/etc/passwd"),
        (exec([""; 0]), Invalid, "argv is empty"),
        (exec(["true", "a\0b"]), Invalid, "argv[1]"),
        (exec(["tr\0ue"]), Invalid, "argv[0]"),
        (in_directory("/t\0mp"), Invalid, "cwd"),
        (in_environment("NA\0ME", "value"), Invalid, "env"),
        (in_environment("NAME", "val\0ue"), Invalid, "NAME"),
        (in_environment("NA=ME", "value"), Invalid, "NA=ME"),
        (in_environment("PATH", &":/x".repeat(2000)), Invalid, "PATH"),
        (exec(["true", &"x".repeat(200_000)]), Invalid, "too long"),
    ];
    for (request, kind, culprit) in cases {
        let failure = agent.run(request.clone()).failure.unwrap();
        assert_eq!(failure.kind, kind, "{failure:?}");
        assert!(failure.message.contains(culprit), "{culprit:?} is not in {:?}", failure.message);
        assert!(!failure.message.contains('\n') && failure.message.len() < 1000, "{failure:?}");
        assert_ne!(failure.errno, 0);
    }
    assert_eq!(agent.children(), []);
}

/// What a process has from its parent, as text: blocked, pending and ignored signals, limits, descriptors.
/// (Signals 32 and 33 are the C library's own, and it ignores them in whatever it spawns.)
const INHERITED: &str = "grep -E 'Sig(Blk|Pnd)' /proc/self/status; \
                         echo $((0x$(sed -n 's/SigIgn:.//p' /proc/self/status) & ~0x180000000)); \
                         umask; ulimit -Sn; ulimit -Hn; pwd; \
                         for fd in /proc/$$/fd/*; do [ -e $fd ] && echo ${fd##*/}; done";

#[test]
fn a_command_inherits_nothing_from_the_agent() {
    // The agent itself inherits from this process what a child of it does.
    let expected = Command::new("sh").args(["-c", INHERITED]).current_dir("/").output().unwrap();
    for agent in Agent::all() {
        let got = agent.sh(INHERITED);
        assert_eq!(String::from_utf8(got.stdout).unwrap(), std::str::from_utf8(&expected.stdout).unwrap());
    }
}

#[test]
fn a_command_leads_its_own_session() {
    let agent = Agent::start();
    let outcome = agent.sh("cat /proc/$$/stat");
    let line = String::from_utf8(outcome.stdout).unwrap();
    let fields: Vec<_> = line.split(' ').collect();
    let pid = outcome.pid.to_string();
    assert_eq!([fields[0], fields[4], fields[5]], [&pid; 3]);
}

#[test]
fn signals_reach_the_process_group() {
    for agent in Agent::all() {
        let mut stream = agent.exec(sh("trap 'echo got it; exit 3' USR1; echo ready; while :; do sleep 0.02; done"));
        stream.started();
        assert_eq!(stream.receive(), Some(microvm_protocol::agent::FromAgent::Stdout(b"ready\n".to_vec())));
        for harmless in [0, -1, 65, i32::MAX, i32::MIN] {
            stream.send(&ToAgent::Signal(harmless));
        }
        stream.send(&ToAgent::Signal(libc::SIGUSR1));
        let outcome = stream.finish();
        assert_eq!((outcome.stdout, outcome.status), (b"got it\n".to_vec(), Some(ExitStatus::Code(3))));
    }
}

#[test]
fn stdin_that_nobody_reads_is_ignored() {
    let agent = Agent::start();
    let mut stream = agent.exec(ExecRequest { stdin: true, ..sh("exec <&-; echo closed; sleep 0.2; exit 4") });
    stream.started();
    stream.receive();
    for _ in 0..20 {
        stream.send(&ToAgent::Stdin(vec![b'x'; MAX_CHUNK]));
    }
    stream.send(&ToAgent::StdinEnd);
    stream.send(&ToAgent::Stdin(vec![b'x']));
    assert_eq!(stream.finish().status, Some(ExitStatus::Code(4)));
}

#[test]
fn a_command_without_stdin_reads_the_null_device() {
    let outcome = Agent::start().sh("readlink /proc/self/fd/0; cat");
    assert_eq!(outcome.stdout, b"/dev/null\n");
}

#[test]
fn output_is_complete_when_the_end_is_told() {
    for agent in Agent::all() {
        let outcome = agent.sh("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 7");
        assert_eq!((outcome.stdout.len(), outcome.stderr.len()), (3_000_000, 2_000_000));
        assert_eq!(outcome.status, Some(ExitStatus::Code(7)));
    }
}

#[test]
fn a_background_process_that_holds_the_pipes_keeps_the_command_running() {
    let agent = Agent::start();
    let outcome = agent.sh("(sleep 0.3; echo late) & exit 5");
    assert_eq!((outcome.stdout, outcome.status), (b"late\n".to_vec(), Some(ExitStatus::Code(5))));
}
