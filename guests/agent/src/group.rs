//! A control group for each command, so that everything it started can be ended: processes that forked twice
//! and opened a session of their own have no other link to it.
//!
//! The groups limit nothing and have no controllers. Each command gets a fresh one (what a command does to its
//! group, like freezing it, must not meet the next command); one is kept in stock, made while nobody waits.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::path::PathBuf;

/// Start of the names of the groups' directories.
const PREFIX: &str = "command-";

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The groups of all commands.
#[derive(Debug)]
pub struct Groups {
    /// Directory that holds them; `None` when there are no control groups.
    parent: Option<OwnedFd>,
    spare: Option<Group>,
    /// Of ended commands, with daemons that live on.
    left: Vec<Group>,
    next: u64,
}

/// The group of one command.
#[derive(Debug)]
pub struct Group {
    directory: OwnedFd,
    name: String,
}

impl Groups {
    /// No control groups: commands are ended by [`crate::tree`].
    pub fn unavailable() -> Groups {
        Groups::below(None)
    }

    fn below(parent: Option<OwnedFd>) -> Groups {
        Groups { parent, spare: None, left: Vec::new(), next: 0 }
    }

    /// Groups below `directory`, of a cgroup2 file system whose groups can be killed as a whole (Linux 5.14).
    ///
    /// # Errors
    /// There is no such file system, or no right to use it.
    pub fn in_directory(directory: PathBuf) -> Result<Groups, Errno> {
        let parent = rustix::fs::open(&directory, DIRECTORY, Mode::empty())?;
        let mut groups = Groups::below(Some(parent));
        let first = groups.make()?;
        rustix::fs::accessat(&first.directory, "cgroup.kill", rustix::fs::Access::WRITE_OK, AtFlags::empty())
            .inspect_err(|_| groups.remove(&first))?;
        groups.spare = Some(first);
        Ok(groups)
    }

    /// A fresh group for one command, or `None` where there are none.
    pub fn take(&mut self) -> Option<Group> {
        self.spare.take().or_else(|| self.make().ok())
    }

    /// Puts a group into stock again. To be called when there is time.
    pub fn stock_up(&mut self) {
        if self.spare.is_none() {
            self.spare = self.make().ok();
        }
    }

    /// Removes a command's group, now or as soon as the last process in it is gone.
    pub fn retire(&mut self, group: Group) {
        self.left.push(group);
        self.sweep();
    }

    /// Removes the groups that have become empty. To be called when a process ended that was no command.
    pub fn sweep(&mut self) {
        let left = std::mem::take(&mut self.left);
        self.left = left.into_iter().filter(|group| !self.is_removed(group)).collect();
    }

    /// Ends all processes that outlived their commands.
    pub fn kill_left(&self) {
        for group in &self.left {
            let _ = group.kill();
        }
    }

    fn make(&mut self) -> Result<Group, Errno> {
        let parent = self.parent.as_ref().ok_or(Errno::OPNOTSUPP)?;
        loop {
            let name = format!("{PREFIX}{}", self.next);
            self.next = self.next.wrapping_add(1);
            match rustix::fs::mkdirat(parent, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let directory = rustix::fs::openat(parent, &name, DIRECTORY, Mode::empty())?;
                    return Ok(Group { directory, name });
                }
                // A command was quicker to think of the name.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn is_removed(&self, group: &Group) -> bool {
        let Some(parent) = &self.parent else {
            return true;
        };
        // Busy means processes, or groups that a command made inside its own.
        rustix::fs::unlinkat(parent, &group.name, AtFlags::REMOVEDIR) != Err(Errno::BUSY)
    }

    fn remove(&self, group: &Group) {
        let _ = self.is_removed(group);
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in self.left.iter().chain(&self.spare) {
            self.remove(group);
        }
    }
}

impl Group {
    /// Kills every process in the group, also those that are being forked meanwhile.
    ///
    /// # Errors
    /// The group was removed, or the kernel is older than Linux 5.14.
    pub fn kill(&self) -> Result<(), Errno> {
        let file = rustix::fs::openat(&self.directory, "cgroup.kill", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, b"1").map(drop)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}
