//! Runs one command in a machine of its own, without Python, and prints how long each step took:
//!
//! `run VMM KERNEL INITRD|- ROOTFS|- [-c CONSOLE-FILE] [-n TIMES] [-j THREADS] [-t SECONDS] [-i] [-s]
//! -- PROGRAM ARGUMENTS…`
//!
//! `-i` passes standard input on; `-n` runs the command that many times in the one machine, `-j` in that many
//! threads at once; `-s` ends the machine in order.

use microvm_sandbox::{DriveSpec, ExecRequest, ExitStatus, Input, Launch, MachineSpec, Output, Sandbox, Streams};
use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
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
    threads: u32,
    stdin: bool,
    stop: bool,
    argv: Vec<String>,
}

fn words() -> Result<Words, Box<dyn Error>> {
    let mut words = Words {
        files: Vec::new(),
        console: None,
        times: 1,
        timeout: None,
        threads: 1,
        stdin: false,
        stop: false,
        argv: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "-c" => words.console = Some(File::create(value()?)?.into()),
            "-n" => words.times = value()?.parse()?,
            "-t" => words.timeout = Some(Duration::from_secs_f64(value()?.parse()?)),
            "-j" => words.threads = value()?.parse()?,
            "-i" => words.stdin = true,
            "-s" => words.stop = true,
            "--" => words.argv = arguments.by_ref().collect(),
            _ => words.files.push(word),
        }
    }
    Ok(words)
}

fn run() -> Result<u8, Box<dyn Error>> {
    let begun = Instant::now();
    let mut words = words()?;
    let console = words.console.take();
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
        console,
        boot_timeout: Duration::from_secs(30),
    };
    let mut check = || Ok(());
    let sandbox = Sandbox::launch(launch, &mut check)?;
    eprintln!("kernel {}, {:?}", sandbox.kernel(), sandbox.timings());
    let code = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..words.threads)
            .map(|_| scope.spawn(|| commands(&sandbox, &words).map_err(|error| error.to_string())))
            .collect();
        threads
            .into_iter()
            .try_fold(0, |code, thread| thread.join().map_err(|_| "panic".to_owned())?.map(|new| code | new))
    })?;
    let stopping = Instant::now();
    if words.stop {
        eprintln!("{:?}", sandbox.stop(Duration::from_secs(5), &mut check)?);
    }
    drop(sandbox);
    eprintln!("ended in {:?}, all in {:?}", stopping.elapsed(), begun.elapsed());
    Ok(code)
}

fn commands(sandbox: &Sandbox, words: &Words) -> Result<u8, Box<dyn Error>> {
    let mut code = 0;
    for _ in 0..words.times {
        let request = ExecRequest {
            argv: words.argv.iter().map(|word| word.clone().into_bytes().into()).collect(),
            env: vec![(b"PATH".to_vec().into(), b"/usr/local/bin:/usr/bin:/bin".to_vec().into())],
            timeout_ms: words.timeout.map(|limit| u64::try_from(limit.as_millis())).transpose()?,
            ..ExecRequest::default()
        };
        let own = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
        let streams = Streams {
            stdin: if words.stdin { Input::Fd(own(&std::io::stdin())?) } else { Input::Null },
            stdout: Output::Fd(own(&std::io::stdout())?),
            stderr: Output::Fd(own(&std::io::stderr())?),
            signals: None,
        };
        let exited = sandbox.exec(request, streams, &mut || Ok(()))?;
        eprintln!("{:?} after {:?}", exited.status, exited.duration);
        code = match exited.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(_) => 128,
            ExitStatus::TimedOut => 124,
        };
    }
    Ok(code)
}
