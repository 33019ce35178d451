//! An `ExecRequest` made ready for `execve`, and the words for what can go wrong with it.
//!
//! The semantics are those of Python's `subprocess`: a program without a slash is looked up in the `PATH` of the
//! request's own environment (`/bin:/usr/bin` without one), relative paths count from the working directory.

use crate::spawn::SpawnError;
use microvm_protocol::agent::{ExecFailure, ExecFailureKind, ExecRequest};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use std::ffi::{CStr, CString};

/// Where programs are looked up when the environment has no `PATH` (Python's `os.defpath`).
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";
/// Most directories in `PATH`.
const MAX_PATH_DIRECTORIES: usize = 1024;
/// Bytes of a program's name beyond which it makes no difference how long it is: no path has so many.
const MAX_PATH: usize = 4096;
/// Most bytes of a name that are repeated in a message.
const QUOTED: usize = 200;

/// Everything `execve` needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Program name and arguments.
    pub argv: Vec<CString>,
    /// `NAME=value`.
    pub env: Vec<CString>,
    /// Files to try, in order.
    pub candidates: Vec<CString>,
    /// Where to run; `None` is `/`, where the agent is itself.
    pub directory: Option<CString>,
    /// Whether standard input is a pipe.
    pub stdin: bool,
}

impl Prepared {
    /// Checks a request.
    ///
    /// # Errors
    /// [`ExecFailureKind::Invalid`], naming the part that is not valid.
    pub fn new(request: ExecRequest) -> Result<Prepared, ExecFailure> {
        let program = request.argv.first().ok_or_else(|| invalid("argv is empty: it must name a program"))?;
        let candidates = candidates(program, &request.env)?;
        let argv = request.argv.into_iter().enumerate();
        let argv = argv.map(|(index, word)| c_string(word.into_vec(), || format!("argv[{index}]")));
        let env = request.env.into_iter().map(|(name, value)| {
            if name.contains(&b'=') {
                return Err(invalid(&format!("env: the name {} contains '='", quoted(&name))));
            }
            let what = format!("env {}", quoted(&name));
            let mut entry = name.into_vec();
            entry.push(b'=');
            entry.extend_from_slice(&value);
            c_string(entry, || what)
        });
        Ok(Prepared {
            argv: argv.collect::<Result<_, _>>()?,
            env: env.collect::<Result<_, _>>()?,
            candidates,
            directory: match request.cwd {
                Some(path) => Some(c_string(path.into_vec(), || "cwd".into())?),
                None => None,
            },
            stdin: request.stdin,
        })
    }

    /// Puts a failed start in words.
    pub fn explain(&self, error: SpawnError) -> ExecFailure {
        match error {
            SpawnError::Resources(errno) => {
                failure(ExecFailureKind::Resources, errno, format!("cannot start a process: {}", words(errno)))
            }
            SpawnError::WorkingDirectory(errno) => {
                let path = self.directory.as_deref().unwrap_or_default();
                let message = format!("working directory {}: {}", quoted(path.to_bytes()), words(errno));
                failure(ExecFailureKind::WorkingDirectory, errno, message)
            }
            SpawnError::Execute { errno: errno @ (Errno::NOENT | Errno::NOTDIR), .. } => self.explain_missing(errno),
            SpawnError::Execute { errno, candidate } => {
                let kind = match errno {
                    Errno::TOOBIG => ExecFailureKind::Invalid,
                    Errno::NOMEM | Errno::AGAIN | Errno::NFILE | Errno::MFILE => ExecFailureKind::Resources,
                    _ => ExecFailureKind::NotExecutable,
                };
                let program = quoted(self.candidates.get(candidate).map_or(b"", |path| path.to_bytes()));
                let hint = match errno {
                    Errno::TOOBIG => "; hint: arguments and environment are too long, pass data on standard input",
                    Errno::NOEXEC => "; hint: neither a program for this machine nor a script that begins with #!",
                    Errno::ACCESS => "; hint: is it a file, with its executable bit set?",
                    _ => "",
                };
                failure(kind, errno, format!("{program}: {}{hint}", words(errno)))
            }
        }
    }

    fn explain_missing(&self, errno: Errno) -> ExecFailure {
        let program = self.argv.first().map_or(&b""[..], |name| name.to_bytes());
        let message = match self.candidates.iter().find_map(|path| self.missing_interpreter(path)) {
            Some(message) => message,
            None if program.contains(&b'/') => format!("{}: {}", quoted(program), words(errno)),
            None => format!("{}: no such program in PATH ({})", quoted(program), quoted(&self.searched())),
        };
        failure(ExecFailureKind::NotFound, errno, message)
    }

    /// `execve` says "no such file" also of a script or program that exists, when what should run it does not.
    fn missing_interpreter(&self, path: &CStr) -> Option<String> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let directory = rustix::fs::open(
            self.directory.as_deref().unwrap_or(c"/"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        let name = quoted(path.to_bytes());
        let status = rustix::fs::statat(&directory, path, AtFlags::empty()).ok()?;
        if rustix::fs::FileType::from_raw_mode(status.st_mode) != rustix::fs::FileType::RegularFile {
            return None;
        }
        let mut start = [0; 256];
        let length = rustix::fs::openat(&directory, path, flags, Mode::empty())
            .and_then(|file| rustix::io::read(&file, &mut start))
            .ok()?;
        let start = start.get(..length)?;
        Some(match start.strip_prefix(b"#!") {
            Some(line) => {
                let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii();
                let interpreter = line.split(u8::is_ascii_whitespace).next().unwrap_or_default();
                format!("{name}: the script's interpreter {} does not exist", quoted(interpreter))
            }
            None => {
                format!("{name}: the program's loader (ld.so) does not exist; hint: its libraries are not in the image")
            }
        })
    }

    fn searched(&self) -> Vec<u8> {
        let directories = self.candidates.iter().map(|path| {
            let path = path.to_bytes();
            let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or_default();
            path.get(..slash).unwrap_or_default()
        });
        directories.collect::<Vec<_>>().join(&b':')
    }
}

/// The files that a program's name can mean.
fn candidates(program: &[u8], env: &[(ByteBuf, ByteBuf)]) -> Result<Vec<CString>, ExecFailure> {
    let path = || "argv[0]".to_owned();
    if program.contains(&b'/') {
        return Ok(vec![c_string(program.to_vec(), path)?]);
    }
    let program = program.get(..MAX_PATH).unwrap_or(program);
    let search = env.iter().find(|(name, _)| name.as_slice() == b"PATH");
    let search = search.map_or(DEFAULT_PATH, |(_, value)| value.as_slice());
    if search.split(|byte| *byte == b':').count() > MAX_PATH_DIRECTORIES {
        return Err(invalid(&format!("env PATH has more than {MAX_PATH_DIRECTORIES} directories")));
    }
    let files = search.split(|byte| *byte == b':').map(|directory| {
        // An empty directory is the current one.
        let mut file = directory.to_vec();
        if !file.is_empty() && !file.ends_with(b"/") {
            file.push(b'/');
        }
        file.extend_from_slice(program);
        c_string(file, || "argv[0] or env PATH".into())
    });
    files.collect()
}

fn c_string(bytes: Vec<u8>, what: impl FnOnce() -> String) -> Result<CString, ExecFailure> {
    CString::new(bytes).map_err(|_| invalid(&format!("{} contains a NUL byte", what())))
}

fn invalid(message: &str) -> ExecFailure {
    failure(ExecFailureKind::Invalid, Errno::INVAL, message.to_owned())
}

/// The error with which a command over a limit of the agent is refused.
pub fn too_many(limit: usize) -> ExecFailure {
    let message = format!("{limit} commands run in this machine already, which is the limit");
    failure(ExecFailureKind::Resources, Errno::AGAIN, message)
}

fn failure(kind: ExecFailureKind, errno: Errno, message: String) -> ExecFailure {
    ExecFailure { kind, errno: errno.raw_os_error(), message }
}

fn words(errno: Errno) -> std::io::Error {
    errno.into()
}

/// A name as a person can read it, on one line and not too long.
fn quoted(name: &[u8]) -> String {
    match name.get(..QUOTED) {
        Some(start) if name.len() > QUOTED => format!("{:?}…", String::from_utf8_lossy(start)),
        _ => format!("{:?}", String::from_utf8_lossy(name)),
    }
}
