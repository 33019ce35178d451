//! Runs one command in a machine of its own, without Python, and prints how long each step took:
//!
//! `run VMM KERNEL INITRD|- ROOTFS|- [-c CONSOLE-FILE] [-n TIMES] [-t SECONDS] [-i] -- PROGRAM ARGUMENTS…`
//!
//! `-i` passes standard input on; `-n` runs the command that many times in the one machine.

use microvm_sandbox::{DriveSpec, ExecRequest, Input, Launch, MachineSpec, Output, Sandbox, Streams};
use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("run: {error}");
            ExitCode::from(125)
        }
    }
}

struct Words {
    files: Vec<String>,
    console: Option<OwnedFd>,
    times: u32,
    timeout: Option<Duration>,
    stdin: bool,
    argv: Vec<String>,
}

fn words() -> Result<Words, Box<dyn Error>> {
    let mut words = Words { files: Vec::new(), console: None, times: 1, timeout: None, stdin: false, argv: Vec::new() };
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "-c" => words.console = Some(File::create(value()?)?.into()),
            "-n" => words.times = value()?.parse()?,
            "-t" => words.timeout = Some(Duration::from_secs_f64(value()?.parse()?)),
            "-i" => words.stdin = true,
            "--" => words.argv = arguments.by_ref().collect(),
            _ => words.files.push(word),
        }
    }
    Ok(words)
}

fn run() -> Result<u8, Box<dyn Error>> {
    let begun = Instant::now();
    let words = words()?;
    let [vmm, kernel, initrd, rootfs] = words.files.as_slice() else {
        return Err("usage: run VMM KERNEL INITRD|- ROOTFS|- [options] -- PROGRAM ARGUMENTS…".into());
    };
    let optional = |path: &String| if path == "-" { Ok(None) } else { File::open(path).map(Some) };
    let drives: Vec<File> = optional(rootfs)?.into_iter().collect();
    let spec = MachineSpec {
        vcpus: 1,
        memory: 256 << 20,
        initrd: false,
        command_line: std::env::var("CMDLINE").unwrap_or_default(),
        drives: drives.iter().map(|_| DriveSpec { read_only: true }).collect(),
        console: false,
        profile_us: None,
    };
    let launch = Launch {
        vmm: vmm.into(),
        spec,
        kernel: File::open(kernel)?,
        initrd: optional(initrd)?,
        drives,
        console: words.console,
        boot_timeout: Duration::from_secs(30),
    };
    let mut check = || Ok(());
    let sandbox = Sandbox::launch(launch, &mut check)?;
    eprintln!("kernel {}, {:?}", sandbox.kernel(), sandbox.timings());
    let mut code = 0;
    for _ in 0..words.times {
        let request = ExecRequest {
            argv: words.argv.iter().map(|word| word.clone().into_bytes().into()).collect(),
            env: vec![(b"PATH".to_vec().into(), b"/usr/local/bin:/usr/bin:/bin".to_vec().into())],
            timeout_ms: words.timeout.map(|limit| u64::try_from(limit.as_millis())).transpose()?,
            ..ExecRequest::default()
        };
        let own = |fd: &dyn std::os::fd::AsFd| fd.as_fd().try_clone_to_owned();
        let streams = Streams {
            stdin: if words.stdin { Input::Fd(own(&std::io::stdin())?) } else { Input::Null },
            stdout: Output::Fd(own(&std::io::stdout())?),
            stderr: Output::Fd(own(&std::io::stderr())?),
            signals: None,
        };
        let exited = sandbox.exec(request, streams, &mut check)?;
        eprintln!("{:?} after {:?}", exited.status, exited.duration);
        code = match exited.status {
            microvm_sandbox::ExitStatus::Code(code) => code,
            microvm_sandbox::ExitStatus::Signal(_) => 128,
            microvm_sandbox::ExitStatus::TimedOut => 124,
        };
    }
    let stopping = Instant::now();
    drop(sandbox);
    eprintln!("ended in {:?}, all in {:?}", stopping.elapsed(), begun.elapsed());
    Ok(code)
}
