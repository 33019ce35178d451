//! Ends a command's processes where there are no control groups: by ancestry and session, as `/proc` shows them.
//!
//! A process that forked twice *and* opened a session of its own before the kill began is not found this way;
//! that is why [`crate::group`] comes first.

use std::collections::BTreeSet;

/// Most looks at the process table: each stops what it finds, so new processes soon have no parent to make them.
const ROUNDS: usize = 32;

/// A line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
}

/// Kills `leader`, its descendants, and everything in its session.
pub fn kill(leader: i32) {
    kill_all(|process| process.pid == leader || process.session == leader || process.group == leader);
}

/// Kills all descendants of the calling process, but not itself.
pub fn kill_descendants() {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    kill_all(|process| process.parent == own);
}

fn kill_all(is_root: impl Fn(&Process) -> bool) {
    let mut found = BTreeSet::new();
    for _ in 0..ROUNDS {
        let table = processes();
        let before = found.len();
        for pid in members(&table, &is_root) {
            if found.insert(pid) {
                // Stopped, it cannot fork while the others are looked for.
                send(pid, libc::SIGSTOP);
            }
        }
        if found.len() == before {
            break;
        }
    }
    for pid in found {
        send(pid, libc::SIGKILL);
    }
}

/// The roots and all their descendants.
fn members(table: &[Process], is_root: impl Fn(&Process) -> bool) -> BTreeSet<i32> {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let mut members: BTreeSet<i32> = table.iter().filter(|p| is_root(p)).map(|p| p.pid).collect();
    loop {
        let before = members.len();
        for process in table {
            if members.contains(&process.parent) {
                members.insert(process.pid);
            }
        }
        members.remove(&own);
        if members.len() == before {
            return members;
        }
    }
}

fn send(pid: i32, signal: i32) {
    // SAFETY: kill touches no memory of this process.
    unsafe { libc::kill(pid, signal) };
}

fn processes() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)).collect()
}

/// Reads "pid (name) state parent group session …"; the name may hold anything, also parentheses and spaces.
fn parse(pid: i32, stat: &[u8]) -> Option<Process> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end_of_name..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace().skip(2).map(|field| field.parse().ok());
    Some(Process { pid, parent: fields.next()??, group: fields.next()??, session: fields.next()?? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parse_any_name_is_skipped(name in proptest::collection::vec(any::<u8>(), 0..16), ids in any::<[u16; 3]>()) {
            let [parent, group, session] = ids.map(i32::from);
            let mut line = b"7 (".to_vec();
            line.extend(&name);
            line.extend(format!(") S {parent} {group} {session} 0 -1 4194304").bytes());
            prop_assert_eq!(parse(7, &line), Some(Process { pid: 7, parent, group, session }));
        }

        #[test]
        fn parse_any_bytes_never_panics(line in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(7, &line);
        }
    }

    #[test]
    fn members_follow_parents_in_any_order_and_spare_strangers() {
        let process = |pid, parent, session| Process { pid, parent, group: session, session };
        let table = [
            process(9_000_004, 9_000_003, 9_000_004),
            process(9_000_003, 9_000_002, 9_000_002),
            process(9_000_002, 1, 9_000_002),
            process(9_000_005, 1, 9_000_002),
            process(9_000_006, 1, 9_000_006),
        ];
        let found = members(&table, |p| p.session == 9_000_002);
        assert_eq!(found, BTreeSet::from([9_000_002, 9_000_003, 9_000_004, 9_000_005]));
    }
}
