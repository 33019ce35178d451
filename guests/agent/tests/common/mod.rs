//! Runs the agent as an ordinary process and speaks to it as the host does.
#![allow(dead_code, missing_docs, reason = "each test file uses its part")]

use microvm_protocol::agent::{ExecFailure, ExecRequest, ExitStatus, FromAgent, ToAgent};
use microvm_protocol::frame::{self, FrameBuffer};
use serde_bytes::ByteBuf;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus as HostStatus, Stdio};
use std::time::{Duration, Instant};

/// No step of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Agent {
    process: Child,
    directory: tempfile::TempDir,
    cgroup: Option<PathBuf>,
}

impl Agent {
    /// Without control groups.
    pub fn start() -> Agent {
        Agent::launch(None)
    }

    /// With a control group for each command; `None` (and words on stderr) where that is not allowed.
    pub fn start_with_groups() -> Option<Agent> {
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let root = roots.iter().find(|root| Path::new(root).join("cgroup.procs").exists());
        let name = format!("microvm-agent-test-{}-{:?}", std::process::id(), std::thread::current().id());
        let directory = root.map(|root| Path::new(root).join(name));
        match directory {
            Some(directory) if std::fs::create_dir(&directory).is_ok() => Some(Agent::launch(Some(directory))),
            _ => {
                eprintln!("skipped: no cgroup2 that may be written to");
                None
            }
        }
    }

    /// Every kind that can run here.
    pub fn all() -> Vec<Agent> {
        [Some(Agent::start()), Agent::start_with_groups()].into_iter().flatten().collect()
    }

    fn launch(cgroup: Option<PathBuf>) -> Agent {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_microvm-agent"));
        command.arg("--serve-unix").arg(directory.path().join("socket")).stdin(Stdio::null());
        if let Some(path) = &cgroup {
            command.arg("--cgroup").arg(path);
        }
        let process = command.spawn().unwrap();
        let agent = Agent { process, directory, cgroup };
        wait_until("the agent listens", || UnixStream::connect(agent.socket()).is_ok());
        agent
    }

    pub fn has_groups(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Number of control groups of commands, the one in stock included.
    pub fn groups(&self) -> usize {
        let entries = std::fs::read_dir(self.cgroup.as_ref().unwrap()).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir()).count()
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub fn connect(&self) -> Stream {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Stream { socket, frames: FrameBuffer::default() }
    }

    pub fn exec(&self, request: ExecRequest) -> Stream {
        let mut stream = self.connect();
        stream.send(&ToAgent::Exec(request));
        stream
    }

    /// Runs a command to its end.
    pub fn run(&self, request: ExecRequest) -> Outcome {
        self.exec(request).finish()
    }

    /// Runs `sh -c script` to its end.
    pub fn sh(&self, script: &str) -> Outcome {
        self.run(sh(script))
    }

    /// A field of the agent's /proc/PID/status, in its unit.
    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Its children, zombies included.
    pub fn children(&self) -> Vec<u32> {
        children_of(self.process.id())
    }

    /// Waits for its own end.
    pub fn wait(&mut self) -> HostStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the agent does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SAFETY: kill touches no memory of this process.
        unsafe { libc::kill(i32::try_from(self.process.id()).unwrap(), libc::SIGTERM) };
        let start = Instant::now();
        while self.process.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(cgroup) = &self.cgroup {
            let removed = std::fs::remove_dir(cgroup);
            if !std::thread::panicking() {
                removed.unwrap();
            }
        }
    }
}

pub struct Stream {
    pub socket: UnixStream,
    frames: FrameBuffer,
}

/// What the host gets to see of a command.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub status: Option<ExitStatus>,
    pub failure: Option<ExecFailure>,
}

impl Stream {
    pub fn send(&mut self, message: &ToAgent) {
        self.socket.write_all(&frame::encode_prefixed(message).unwrap()).unwrap();
    }

    /// The next message; `None` at the end of the stream.
    pub fn receive(&mut self) -> Option<FromAgent> {
        let mut bytes = vec![0; 64 * 1024];
        loop {
            if let Some(message) = self.frames.next().unwrap() {
                return Some(message);
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => {
                    assert!(!self.frames.is_partial(), "the stream ends in the middle of a frame");
                    return None;
                }
                Ok(length) => self.frames.extend(&bytes[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The process id, when it has started.
    pub fn started(&mut self) -> u32 {
        match self.receive() {
            Some(FromAgent::Started { pid }) => pid,
            other => panic!("{other:?}"),
        }
    }

    /// Collects everything up to the end of the stream, and checks the order of messages.
    pub fn finish(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(message) = self.receive() {
            assert!(outcome.status.is_none() && outcome.failure.is_none(), "{message:?} after the last message");
            match message {
                FromAgent::Started { pid } => {
                    assert_eq!(outcome, Outcome::default(), "Started is not the first message");
                    outcome.pid = pid;
                }
                FromAgent::Stdout(bytes) => outcome.stdout.extend(bytes),
                FromAgent::Stderr(bytes) => outcome.stderr.extend(bytes),
                FromAgent::Exited(status) => outcome.status = Some(status),
                FromAgent::Failed(failure) => outcome.failure = Some(failure),
                other => panic!("{other:?}"),
            }
        }
        outcome
    }
}

pub const ENV: [(&str, &str); 1] = [("PATH", "/usr/bin:/bin")];

pub fn exec<T: AsRef<[u8]>>(argv: impl IntoIterator<Item = T>) -> ExecRequest {
    ExecRequest {
        argv: argv.into_iter().map(|word| ByteBuf::from(word.as_ref())).collect(),
        env: env(ENV),
        ..ExecRequest::default()
    }
}

pub fn env<T: AsRef<[u8]>>(pairs: impl IntoIterator<Item = (T, T)>) -> Vec<(ByteBuf, ByteBuf)> {
    let buffer = |bytes: T| ByteBuf::from(bytes.as_ref());
    pairs.into_iter().map(|(name, value)| (buffer(name), buffer(value))).collect()
}

pub fn sh(script: &str) -> ExecRequest {
    exec(["sh", "-c", script])
}

pub fn with_timeout(request: ExecRequest, milliseconds: u64) -> ExecRequest {
    ExecRequest { timeout_ms: Some(milliseconds), ..request }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn children_of(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit(')').next().unwrap_or_default();
        rest.split_whitespace().nth(1) == Some(&parent.to_string())
    })
    .collect()
}

/// The processes that sleep until this marker (zombies have no arguments).
pub fn sleepers(mark: &str) -> Vec<i32> {
    let line = [b"sleep\0", mark.as_bytes(), b"\0"].concat();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| std::fs::read(entry.path().join("cmdline")).is_ok_and(|found| found == line))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether a process sleeps until this marker.
pub fn lives(mark: &str) -> bool {
    !sleepers(mark).is_empty()
}

/// A number of seconds for `sleep` that no other process sleeps.
pub fn marker() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("9{:07}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
