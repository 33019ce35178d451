//! Boots a kernel with an initramfs and prints its console: `boot KERNEL [INITRD] [WORDS…]`.
//!
//! `VCPUS`, `MEMORY_MIB`, `SECONDS`, `DRIVE` (a raw image, read-only) and `PROFILE_US` in the environment change the
//! machine; `QUIET` prints only the times. Times are counted from the start of the vCPUs.

use microvm_machine::{Backend, Files, Machine, NewDevice, Origin};
use microvm_protocol::spec::MachineSpec;
use microvm_virtio::block::Block;
use microvm_virtio::rng::Rng;
use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = File::open(arguments.next().ok_or("usage: boot KERNEL [INITRD] [WORDS…]")?)?;
    let initrd = arguments.next().filter(|path| path != "-").map(File::open).transpose()?;
    let words: Vec<String> = arguments.collect();
    let (reader, writer) = UnixStream::pair()?;

    let begin = Instant::now();
    let backend = Backend::detect()?;
    let detected = begin.elapsed();
    let spec = MachineSpec {
        vcpus: u8::try_from(variable("VCPUS", 1))?,
        memory: variable("MEMORY_MIB", 256) << 20,
        initrd: initrd.is_some(),
        command_line: words.join(" "),
        drives: Vec::new(),
        console: true,
        profile_us: std::env::var("PROFILE_US").ok().and_then(|us| us.parse().ok()),
    };
    let mut devices = Vec::new();
    if let Some(path) = std::env::var_os("DRIVE") {
        let device = Box::new(Block::new(File::open(path)?, true)?);
        devices.push(NewDevice { name: "drive".into(), device });
    }
    devices.push(NewDevice { name: "rng".into(), device: Box::new(Rng::new()) });
    let files = Files { kernel, initrd, console: Some(writer.into()) };
    let mut machine = Machine::assemble(&backend, &spec, devices, Origin::Boot(files))?;
    let assembled = begin.elapsed();

    let start = Instant::now();
    let console = std::thread::spawn(move || print_console(reader, start));
    let (ends, ended) = channel();
    machine.start(Box::new(move |end| {
        let _ = ends.send((Instant::now(), end));
    }))?;
    let end = ended.recv_timeout(Duration::from_secs(variable("SECONDS", 60)));
    let stop = Instant::now();
    machine.stop()?;
    let stopped = stop.elapsed();
    let profile = machine.profile();
    drop(machine);
    let first = console.join().ok().flatten();
    eprintln!("{}: detected {detected:?}, assembled {assembled:?}, stopped {stopped:?}", backend.kind());
    eprintln!("first byte on the console after {first:?}");
    match end {
        Ok((at, end)) => eprintln!("ended after {:?}: {:?}: {}", at.duration_since(start), end.reason, end.message),
        Err(_) => eprintln!("still running"),
    }
    for (address, count) in &profile {
        println!("{address:016x} {count}");
    }
    Ok(())
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Copies the console to standard output; returns when the first byte came.
fn print_console(mut reader: UnixStream, start: Instant) -> Option<Duration> {
    let quiet = std::env::var_os("QUIET").is_some();
    let mut first = None;
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = reader.read(&mut buffer) {
        first = first.or_else(|| Some(start.elapsed()));
        if let (false, Some(bytes)) = (quiet, buffer.get(..length)) {
            let _ = std::io::stdout().write_all(bytes);
            let _ = std::io::stdout().flush();
        }
    }
    first
}
