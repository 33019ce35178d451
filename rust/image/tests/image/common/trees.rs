//! Generated trees.

use microvm_image::Tree;
use microvm_image::tree::{DeviceNumber, Kind, Metadata, Node, Timestamp};
use proptest::prelude::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What to put at a path: a node, or another name of an earlier one.
#[derive(Debug, Clone)]
pub enum Step {
    Insert(PathBuf, Node),
    Link(PathBuf, prop::sample::Index),
}

/// A name of an entry: often one of a few, so that paths meet; sometimes any bytes, sometimes the longest.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let legal = |byte: u8| if matches!(byte, 0 | b'/') { b'.' } else { byte };
    let few = prop::sample::select(vec!["a", "b", "c", "aa", "ab", "b c", "-"]);
    prop_oneof![
        6 => few.prop_map(|name| name.as_bytes().to_vec()),
        2 => any::<[u8; 4]>().prop_map(move |bytes| bytes.map(legal).to_vec()),
        1 => (any::<u8>(), 240..=255usize).prop_map(move |(byte, length)| vec![legal(byte); length]),
    ]
    .prop_filter("names of their own", |name| name != b"." && name != b"..")
}

fn path() -> impl Strategy<Value = PathBuf> {
    prop::collection::vec(name(), 1..5).prop_map(|names| names.iter().map(|name| OsStr::from_bytes(name)).collect())
}

fn kind() -> impl Strategy<Value = Kind> {
    let boundary = prop::sample::select(vec![0, 1, 63, 2047, 2048, 2049, 4032, 4033, 4095, 4096, 4097, 8192, 20_000]);
    let content = (boundary, any::<u8>()).prop_map(|(length, seed): (usize, u8)| {
        let bytes = (0..length).map(|at| seed.wrapping_mul(31).wrapping_add((at % 251) as u8)).collect::<Vec<u8>>();
        Node::file(0, bytes).kind
    });
    let device = || (0u32..4096, 0u32..(1 << 20)).prop_map(|(major, minor)| DeviceNumber { major, minor });
    let target_length = prop_oneof![1usize..40, Just(2048), Just(2049), Just(4095)];
    prop_oneof![
        5 => content,
        3 => Just(Node::directory(0).kind),
        2 => target_length.prop_map(|length| Kind::Symlink(vec![b't'; length])),
        1 => device().prop_map(Kind::CharacterDevice),
        1 => device().prop_map(Kind::BlockDevice),
        1 => Just(Kind::Fifo),
    ]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let modified = (-(1i64 << 40)..(1i64 << 40), 0u32..1_000_000_000)
        .prop_map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds });
    (0u16..=0o7777, any::<u32>(), any::<u32>(), modified).prop_map(|(mode, uid, gid, modified)| Metadata {
        mode,
        uid,
        gid,
        modified,
    })
}

/// Steps that make a tree.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = (metadata(), kind()).prop_map(|(metadata, kind)| Node { metadata, kind });
    let step = prop_oneof![
        8 => (path(), node).prop_map(|(path, node)| Step::Insert(path, node)),
        1 => (path(), any::<prop::sample::Index>()).prop_map(|(path, of)| Step::Link(path, of)),
    ];
    prop::collection::vec(step, 0..40)
}

/// Follows the steps; those that would go through a file are passed over.
pub fn build(steps: &[Step]) -> Tree {
    let mut tree = Tree::new();
    let mut inserted = Vec::new();
    for step in steps {
        let (path, done) = match step {
            Step::Insert(path, node) => (path, tree.insert(path, node.clone())),
            Step::Link(_, _) if inserted.is_empty() => continue,
            Step::Link(path, of) => {
                let existing: &PathBuf = of.get(&inserted);
                (path, tree.insert_link(path, existing))
            }
        };
        if done.is_ok() {
            inserted.push(path.clone());
        }
    }
    tree
}
