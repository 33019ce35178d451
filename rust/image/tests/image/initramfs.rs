//! The archive holds what the kernel and the agent look for.

use microvm_image::{ImageError, initramfs};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

/// Mode, device and content.
type Entry = (u32, (u32, u32), Vec<u8>);

/// Entries by name; refuses what the kernel's unpacker would.
fn read(archive: &[u8]) -> BTreeMap<String, Entry> {
    let mut found = BTreeMap::new();
    let mut at = 0;
    loop {
        let field = |index: usize| {
            let start = at + 6 + index * 8;
            u32::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16).unwrap()
        };
        assert_eq!(&archive[at..at + 6], b"070701");
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name_end = at + 110 + name_size;
        assert_eq!(archive[name_end - 1], 0);
        let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
        let start = name_end.next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert!(archive[start..].iter().all(|byte| *byte == 0));
            return found;
        }
        let content = archive[start..start + size].to_vec();
        // A directory must come before what is in it.
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(found.contains_key(parent), "{parent} before {name}");
        }
        let entry = (field(1), (field(9), field(10)), content);
        at = (start + size).next_multiple_of(4);
        assert!(found.insert(name, entry).is_none());
    }
}

proptest! {
    #[test]
    fn an_archive_holds_the_agent_and_the_modules(
        agent in prop::collection::vec(any::<u8>(), 0..300),
        modules in prop::collection::vec(("[a-z_]{1,20}", prop::collection::vec(any::<u8>(), 0..50)), 0..12),
    ) {
        let archive = initramfs::build(&agent, &modules).unwrap();
        prop_assert_eq!(&archive, &initramfs::build(&agent, &modules).unwrap());
        prop_assert_eq!(archive.len() % 512, 0);
        let found = read(&archive);
        prop_assert_eq!(&found["init"], &(0o100_755, (0, 0), agent));
        prop_assert_eq!(&found["dev/console"], &(0o020_600, (5, 1), Vec::new()));
        for name in ["dev", "proc", "sys", "run", "root", "modules"] {
            prop_assert_eq!(found[name].0, 0o040_755);
        }
        let order = found.get("modules/order").map(|entry| String::from_utf8(entry.2.clone()).unwrap());
        let order = order.unwrap_or_default();
        prop_assert_eq!(order.lines().count(), modules.len());
        for (line, (name, content)) in order.lines().zip(&modules) {
            let end = format!("-{name}.ko");
            prop_assert!(line.ends_with(&end));
            prop_assert_eq!(&found[&format!("modules/{line}")].2, content);
        }
    }
}

#[test]
fn build_with_a_path_for_a_module_name_is_refused() {
    for name in ["../x", "", "a\nb", "a\0b"] {
        let result = initramfs::build(b"", &[(name.to_owned(), Vec::new())]);
        assert!(matches!(result, Err(ImageError::InvalidPath { .. })), "{name:?}");
    }
}

#[test]
fn cpio_lists_the_archive() {
    if crate::common::have("cpio", "cpio") {
        let archive = initramfs::build(b"agent", &[("erofs".to_owned(), b"module".to_vec())]).unwrap();
        let mut cpio = Command::new("cpio");
        let mut child = cpio.arg("-it").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("init\n") && text.contains("modules/000-erofs.ko\n"), "{text}");
    }
}
