//! A VMM and an agent for tests, made of threads and socketpairs.

use crate::Sandbox;
use crate::monitor::Shared;
use crate::process::VmmProcess;
use microvm_link::ControlSocket;
use microvm_protocol::agent::{ExecRequest, FromAgent, ToAgent};
use microvm_protocol::control::{EndReason, EndReport, Event, Request};
use microvm_protocol::frame::{FrameBuffer, encode_prefixed};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The VMM's end of a control link.
pub struct FakeVmm {
    pub control: ControlSocket,
    pub shared: Arc<Shared>,
}

/// A sandbox whose VMM is the caller's; the process behind it only sleeps.
pub fn sandbox() -> (Sandbox, FakeVmm) {
    let (control, there) = ControlSocket::pair().unwrap();
    control.set_send_timeout(Duration::from_millis(50)).unwrap();
    let (_, unused) = ControlSocket::pair().unwrap();
    let process = VmmProcess::spawn(Path::new("/bin/sleep"), &[c"600"], unused.as_fd()).unwrap();
    let shared = Shared::watch(control, process).unwrap();
    let vmm = FakeVmm { control: ControlSocket::from_fd(there).unwrap(), shared: Arc::clone(&shared) };
    (Sandbox::over(shared), vmm)
}

impl FakeVmm {
    /// The next request, or `None` at the end of the link.
    pub fn request(&self) -> Option<Request> {
        let begun = Instant::now();
        loop {
            match self.control.receive::<Request>(&mut Vec::new(), 0) {
                Ok(received) => return received.map(|(request, _)| request),
                Err(error) if error.is_would_block() => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("{error}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "no request came");
        }
    }

    pub fn send(&self, event: &Event) {
        self.control.send(event, &[]).unwrap();
    }

    pub fn say_ready(&self) {
        self.send(&Event::Ready { kernel: "6.12".into(), started_us: 1, ready_us: 2 });
    }

    /// Answers the next request, a connect, with a stream to an agent.
    pub fn connect(&self) -> FakeAgent {
        let Some(Request::Connect { id, .. }) = self.request() else { panic!("not a connect") };
        let (here, there) = UnixStream::pair().unwrap();
        // So small that frames are sent in parts.
        rustix::net::sockopt::set_socket_send_buffer_size(&there, 16 << 10).unwrap();
        self.control.send(&Event::Connected { id }, &[there.as_fd()]).unwrap();
        FakeAgent::new(here)
    }

    /// Serves `count` commands with `serve`, each in a thread of its own.
    pub fn serve(self, count: usize, serve: impl Fn(FakeAgent) + Clone + Send + 'static) -> JoinHandle<FakeVmm> {
        thread::spawn(move || {
            let agents: Vec<_> = (0..count)
                .map(|_| {
                    let agent = self.connect();
                    let serve = serve.clone();
                    thread::spawn(move || serve(agent))
                })
                .collect();
            agents.into_iter().for_each(|agent| agent.join().unwrap());
            self
        })
    }
}

/// The agent's end of one command's stream.
pub struct FakeAgent {
    pub stream: UnixStream,
    buffer: FrameBuffer,
}

impl FakeAgent {
    pub fn new(stream: UnixStream) -> FakeAgent {
        FakeAgent { stream, buffer: FrameBuffer::default() }
    }

    /// The next message, or `None` once the client has closed the stream.
    pub fn next(&mut self) -> Option<ToAgent> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(message) = self.buffer.next().unwrap() {
                return Some(message);
            }
            match self.stream.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(length) => self.buffer.extend(&bytes[..length]),
            }
        }
    }

    pub fn exec(&mut self) -> ExecRequest {
        match self.next() {
            Some(ToAgent::Exec(request)) => request,
            other => panic!("not an exec: {other:?}"),
        }
    }

    /// False once the client has closed the stream.
    pub fn say(&mut self, message: &FromAgent) -> bool {
        self.stream.write_all(&encode_prefixed(message).unwrap()).is_ok()
    }
}

pub fn report(reason: EndReason) -> EndReport {
    EndReport { reason, message: "why".into(), console: b"last words\n".to_vec(), profile: Vec::new() }
}

pub fn command() -> ExecRequest {
    ExecRequest { argv: vec![serde_bytes::ByteBuf::from("true")], ..ExecRequest::default() }
}
