//! The event loop: streams, pipes, children and timers, in one thread.
//!
//! Each round takes the events that have come, then settles the connections they touched: a command that wrote
//! and ended in the meantime is told to the host in one piece.

use crate::connection::{Connection, Context};
use crate::group::Groups;
use crate::mounts::last_error;
use crate::spawn::{Limits, Spawner};
use crate::watch::{Source, Token};
use crate::{link, tree};
use microvm_protocol::agent::ExitStatus;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

/// Most streams at once; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 768;
/// Most events of one round.
const ROUND: usize = 64;
/// How long processes have to end after SIGTERM when the machine ends, and again after SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
/// When a stream could not be accepted, for want of memory or descriptors, the next try comes after this.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Connections have numbers from 1, so these are free.
const LISTENER: Token = Token { connection: 0, source: Source::Socket };
const SIGNALS: Token = Token { connection: 0, source: Source::Stdin };

/// What the server is in its system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// PID 1: at the end, every process ends.
    Machine,
    /// One process among others: at the end, what it started ends.
    Process,
}

/// Serves commands until the machine is to end.
#[derive(Debug)]
pub struct Server {
    context: Context,
    listener: OwnedFd,
    /// When to listen again, while not listening.
    accept_at: Option<Instant>,
    signals: OwnedFd,
    role: Role,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    ending: Option<Ending>,
}

/// The end of the machine, under way.
#[derive(Debug, Clone, Copy)]
struct Ending {
    killed: bool,
    deadline: Instant,
}

impl Server {
    /// Prepares to serve `listener`, which must not block. Blocks all signals of the process.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(listener: OwnedFd, role: Role, groups: Groups, limits: Limits) -> Result<Server, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let signals = signals()?;
        epoll::add(&epoll, &signals, SIGNALS.into(), EventFlags::IN)?;
        epoll::add(&epoll, &listener, LISTENER.into(), EventFlags::IN)?;
        Ok(Server {
            context: Context::new(epoll, Spawner::new(limits)?, groups),
            listener,
            accept_at: None,
            signals,
            role,
            connections: BTreeMap::new(),
            next: 1,
            ending: None,
        })
    }

    /// Serves until the host (or SIGTERM) asks for the end and all processes have ended.
    ///
    /// # Errors
    /// The event loop itself fails; nothing that a connection or command does.
    pub fn run(&mut self) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(ROUND);
        loop {
            events.clear();
            let timeout = self.next_deadline().map(time_until);
            match epoll::wait(&self.context.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            let mut touched = BTreeSet::new();
            let mut children = self.ending.is_some();
            for event in &events {
                match Token::from(event.data) {
                    LISTENER => self.accept(&mut touched)?,
                    SIGNALS => {
                        children = true;
                        self.take_signals();
                    }
                    token => {
                        if let Some(connection) = self.connections.get_mut(&token.connection) {
                            connection.ready(token.source, event.flags, &mut self.context);
                            touched.insert(token.connection);
                        }
                    }
                }
            }
            let childless = children && self.reap(&mut touched);
            self.expire(&mut touched);
            self.settle(&touched);
            self.listen_again()?;
            if self.context.power_off && self.has_ended(childless) {
                return Ok(());
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let commands = self.connections.values().filter_map(Connection::deadline);
        let ending = self.ending.map(|ending| ending.deadline);
        commands.chain(ending).chain(self.accept_at).min()
    }

    fn accept(&mut self, touched: &mut BTreeSet<u64>) -> Result<(), Errno> {
        while self.connections.len() < MAX_CONNECTIONS {
            match link::accept(&self.listener) {
                Ok(socket) => {
                    let id = self.next;
                    self.next = self.next.wrapping_add(1);
                    let mut connection = Connection::new(id, socket);
                    // The request is usually here already.
                    connection.ready(Source::Socket, EventFlags::IN, &mut self.context);
                    self.connections.insert(id, connection);
                    touched.insert(id);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => break,
            }
        }
        epoll::delete(&self.context.epoll, &self.listener)?;
        self.accept_at = Instant::now().checked_add(ACCEPT_AGAIN);
        Ok(())
    }

    fn listen_again(&mut self) -> Result<(), Errno> {
        let now = Instant::now();
        if self.accept_at.is_some_and(|at| now >= at) {
            self.accept_at = if self.connections.len() < MAX_CONNECTIONS {
                epoll::add(&self.context.epoll, &self.listener, LISTENER.into(), EventFlags::IN)?;
                None
            } else {
                now.checked_add(ACCEPT_AGAIN)
            };
        }
        Ok(())
    }

    fn take_signals(&mut self) {
        let mut information = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(length) = rustix::io::read(&self.signals, &mut information) {
            // The structure begins with the signal's number.
            let number = information.first_chunk().filter(|_| length > 0).map(|bytes| i32::from_ne_bytes(*bytes));
            if matches!(number, Some(libc::SIGTERM | libc::SIGINT)) {
                self.context.power_off = true;
            }
        }
    }

    /// Collects all processes that have ended. Returns whether none is left, dead or alive.
    fn reap(&mut self, touched: &mut BTreeSet<u64>) -> bool {
        let mut strangers = false;
        let childless = loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let connection = self.context.leaders.get(&pid.as_raw_nonzero().get());
                    if let Some(id) = connection
                        && let Some(connection) = self.connections.get_mut(id)
                    {
                        connection.reaped(exit_status(status));
                        touched.insert(*id);
                    } else {
                        strangers = true;
                    }
                }
                Ok(None) => break false,
                Err(Errno::INTR) => {}
                Err(_) => break true,
            }
        };
        if strangers {
            self.context.groups.sweep();
        }
        childless
    }

    fn expire(&mut self, touched: &mut BTreeSet<u64>) {
        let now = Instant::now();
        for (id, connection) in &mut self.connections {
            if connection.deadline().is_some_and(|deadline| now >= deadline) {
                connection.expire(now);
                touched.insert(*id);
            }
        }
    }

    fn settle(&mut self, touched: &BTreeSet<u64>) {
        for id in touched {
            let goes_on = self.connections.get_mut(id).is_some_and(|connection| connection.settle(&mut self.context));
            if !goes_on && let Some(connection) = self.connections.remove(id) {
                connection.abandon(&mut self.context);
            }
        }
        if self.context.leaders.is_empty() {
            self.context.groups.stock_up();
        }
    }

    /// Takes the end of the machine one step further: SIGTERM, time, SIGKILL, time. Returns whether it is reached.
    fn has_ended(&mut self, childless: bool) -> bool {
        let now = Instant::now();
        let deadline = now.checked_add(GRACE).unwrap_or(now);
        match self.ending {
            None => {
                self.signal_everything(libc::SIGTERM);
                self.ending = Some(Ending { killed: false, deadline });
                // Whether anything runs at all is seen at once.
                let mut touched = BTreeSet::new();
                let childless = self.reap(&mut touched);
                self.settle(&touched);
                childless && !self.connections.values().any(Connection::is_busy)
            }
            Some(_) if childless && !self.connections.values().any(Connection::is_busy) => true,
            Some(ending) if now < ending.deadline => false,
            Some(ending) if ending.killed => true,
            Some(_) => {
                self.signal_everything(libc::SIGKILL);
                self.ending = Some(Ending { killed: true, deadline });
                false
            }
        }
    }

    fn signal_everything(&self, signal: i32) {
        match self.role {
            Role::Machine => {
                // SAFETY: kill touches no memory of this process, and -1 spares PID 1.
                unsafe { libc::kill(-1, signal) };
            }
            Role::Process if signal == libc::SIGKILL => {
                for command in self.connections.values().filter_map(Connection::command) {
                    command.kill_all();
                }
                self.context.groups.kill_left();
                tree::kill_descendants();
            }
            Role::Process => {
                for command in self.connections.values().filter_map(Connection::command) {
                    command.signal(signal);
                }
            }
        }
    }
}

/// Blocks all signals and reads those of interest: a child ended, or somebody wants the end.
fn signals() -> Result<OwnedFd, Errno> {
    // SAFETY: sigfillset and sigemptyset initialise the sets they are given; the others read them.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: a descriptor the kernel has just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, signal) => ExitStatus::Signal(signal.unwrap_or_default()),
    }
}

/// Rounded up to a millisecond, so that the deadline has passed when the wait ends.
fn time_until(deadline: Instant) -> Timespec {
    let rest = deadline.saturating_duration_since(Instant::now());
    let milliseconds = i64::try_from(rest.as_millis()).unwrap_or(i64::MAX).saturating_add(1);
    let seconds = milliseconds.checked_div(1000).unwrap_or_default();
    let nanoseconds = milliseconds.checked_rem(1000).unwrap_or_default().saturating_mul(1_000_000);
    Timespec { tv_sec: seconds, tv_nsec: nanoseconds }
}
