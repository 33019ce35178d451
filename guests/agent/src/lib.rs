//! PID 1 of a microvm guest.
//!
//! In order of what happens:
//!
//! * [`boot`]: from the first instruction to the end of the machine, one linear recipe, of which
//!   [`modules`] loads drivers, [`root`] mounts the root file system and [`mounts`] the rest;
//! * [`link`]: the sockets to the host;
//! * [`server`]: one epoll loop for every stream, pipe, child and timer, over [`connection`] (one stream from
//!   the host) and [`command`] (one running command);
//! * [`request`]: an `ExecRequest` checked and made ready, and its failures put in words;
//! * [`spawn`]: vfork and exec; [`group`] and [`tree`]: ending everything a command started.
//!
//! The server does not know whether its streams are vsock or Unix sockets nor whether it is PID 1, so the same
//! binary runs on the host under test: `microvm-agent --serve-unix PATH [--cgroup DIRECTORY]`.

pub mod boot;
pub mod command;
pub mod connection;
pub mod console;
pub mod group;
pub mod link;
pub mod modules;
pub mod mounts;
pub mod request;
pub mod root;
pub mod server;
pub mod spawn;
pub mod tree;
pub mod watch;
