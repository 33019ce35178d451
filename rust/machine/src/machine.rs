//! The recipe: from a specification and files to a machine that runs.

use crate::backend::Backend;
use crate::boot::{self, BootError, BootPlan, MmioWindow};
use crate::bus::{Bus, BusDevice, BusError};
use crate::error::CallError;
use crate::kick::{KickError, KickSignal, SignalsBlocked};
use crate::legacy::console::Console;
use crate::legacy::debug_port::{self, DebugPort};
use crate::legacy::i8042::{self, I8042, ResetLine};
use crate::legacy::rtc::{self, Rtc};
use crate::legacy::serial::{self, Serial};
use crate::memory::{self, MemoryError};
use crate::profile::Profile;
use crate::run_loop::{self, OnEnd, Shared, Sleepers};
use crate::vcpu::Vcpu;
use crate::vm::{Vm, VmError};
use crate::x86::{msr, tables};
use kvm_bindings::kvm_regs;
use microvm_protocol::control::EndReason;
use microvm_protocol::spec::{MachineSpec, SpecError};
use microvm_virtio::device::Device;
use microvm_virtio::mmio::MmioTransport;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// First virtio-mmio window; the others follow.
const DEVICE_BASE: u64 = 0xD000_0000;
/// Interrupt lines of the devices, in order. 8 is left to the real-time clock, below 5 are timer and serial port.
const DEVICE_LINES: [u32; 11] = [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16];
/// Offset of QueueNotify in a window.
const QUEUE_NOTIFY: u64 = 0x50;
/// How long a vCPU thread may take to end after it has left guest code, and the console to take its last bytes.
const PATIENCE: Duration = Duration::from_secs(1);
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Why a machine could not be assembled, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A field of the specification is out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Kernel, initrd or command line was refused.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host has not that much memory to give.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// KVM refused a vCPU's first state.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The kick signal is taken, or a vCPU did not answer.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// More devices than interrupt lines.
    #[error("{count} devices, at most {}", DEVICE_LINES.len())]
    TooManyDevices {
        /// How many were given.
        count: usize,
    },
    /// A thread or descriptor could not be made.
    #[error("{what}: {source}")]
    Host {
        /// What was being made.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// A vCPU thread did not end.
    #[error("the thread of vCPU {vcpu} did not end within {PATIENCE:?}")]
    Stuck {
        /// Index of the vCPU.
        vcpu: usize,
    },
    /// `start` was called before.
    #[error("the machine was started before")]
    Started,
}

impl MachineError {
    /// The kind of end that this error is for a client.
    pub fn reason(&self) -> EndReason {
        match self {
            Self::Spec(_) | Self::Boot(_) | Self::TooManyDevices { .. } | Self::Bus(_) => EndReason::Config,
            Self::Vm(_) | Self::Call(_) => EndReason::Kvm,
            _ => EndReason::Host,
        }
    }
}

/// A virtio device to put into a machine.
pub struct NewDevice {
    /// For messages and the name of its thread.
    pub name: String,
    /// The device.
    pub device: Box<dyn Device>,
}

/// What a machine boots from.
#[derive(Debug)]
pub struct Files {
    /// ELF vmlinux or bzImage.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Gets the serial console's output.
    pub console: Option<OwnedFd>,
}

/// Where a machine's first state comes from.
#[derive(Debug)]
pub enum Origin {
    /// A kernel's first instruction.
    Boot(Files),
}

/// A machine: memory, vCPUs, devices. Stops when dropped.
pub struct Machine {
    /// vCPUs that do not run yet.
    vcpus: Vec<Vcpu>,
    threads: Vec<VcpuThread>,
    shared: Arc<Shared>,
    transports: Vec<Arc<MmioTransport>>,
    console: Console,
    memory: GuestMemoryMmap,
    /// Last, so that everything that uses it is gone before.
    _vm: Vm,
}

struct VcpuThread {
    handle: JoinHandle<()>,
    /// Disconnected when the thread is about to end.
    ended: Receiver<()>,
}

impl Machine {
    /// Puts a machine together. Nothing runs yet but the devices' own threads.
    ///
    /// # Errors
    /// [`MachineError`]; [`MachineError::reason`] says whose fault it is.
    pub fn assemble(
        backend: &Backend,
        spec: &MachineSpec,
        devices: Vec<NewDevice>,
        origin: Origin,
    ) -> Result<Self, MachineError> {
        spec.validate(backend.max_vcpus())?;
        let windows = windows(devices.len())?;
        let signal = KickSignal::install_default()?;
        // Threads are made deaf to signals by inheritance, so that none ever hears one.
        let _blocked = SignalsBlocked::new();

        let memory = memory::ram(spec.memory)?;
        let vm = Vm::new(backend, spec.vcpus)?;
        vm.add_memory(&memory)?;
        vm.create_interrupt_controllers()?;

        let Origin::Boot(files) = origin;
        let console = Console::new(files.console).map_err(host("console thread"))?;
        let reset = ResetLine::default();
        let ports = legacy_devices(&vm, &console, &reset)?;
        let (mmio, transports) = virtio_devices(&vm, &memory, devices, &windows)?;

        let vcpus = (0..spec.vcpus).map(|index| vm.create_vcpu(index, signal)).collect::<Result<Vec<_>, _>>()?;
        for vcpu in &vcpus {
            msr::set_boot(vcpu)?;
        }
        if let Some(first) = vcpus.first() {
            let plan = BootPlan {
                kernel: &files.kernel,
                initrd: files.initrd.as_ref(),
                command_line: &command_line(backend, first, &windows, &spec.command_line)?,
                vcpus: spec.vcpus,
                devices: &windows,
                acpi: backend.has_acpi(),
                rng_seed: random().map_err(host("random seed"))?,
            };
            enter_kernel(first, &boot::load(&memory, &plan)?)?;
        }

        let shared = Shared {
            ports,
            mmio,
            reset,
            stopping: AtomicBool::new(false),
            on_end: Mutex::new(None),
            kickers: vcpus.iter().map(Vcpu::kicker).collect(),
            sleepers: Sleepers::new(spec.vcpus),
            profile: Profile::default(),
            profile_interval: spec.profile_us.map(|us| Duration::from_micros(us.into())),
        };
        Ok(Self { vcpus, threads: Vec::new(), shared: Arc::new(shared), transports, console, memory, _vm: vm })
    }

    /// Lets the vCPUs run, each on a thread of its own.
    ///
    /// `on_end` is called once, on one of these threads, if the machine ends by itself; not after [`Machine::stop`].
    /// It should pass the news on and return: `stop` waits for the thread it runs on.
    ///
    /// # Errors
    /// [`MachineError::Started`], or [`MachineError::Host`] if there are no more threads.
    pub fn start(&mut self, on_end: OnEnd) -> Result<(), MachineError> {
        if self.vcpus.is_empty() {
            return Err(MachineError::Started);
        }
        *self.shared.on_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(on_end);
        let _blocked = SignalsBlocked::new();
        for vcpu in std::mem::take(&mut self.vcpus) {
            let shared = Arc::clone(&self.shared);
            let (ends, ended) = channel::<()>();
            let name = format!("vcpu{}", vcpu.index());
            let handle = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    run_loop::run(vcpu, &shared);
                    drop(ends);
                })
                .map_err(host(&name))?;
            self.threads.push(VcpuThread { handle, ended });
        }
        Ok(())
    }

    /// Stops the vCPUs and the devices, and waits for them, at most a second each. Does nothing the second time.
    ///
    /// # Errors
    /// [`MachineError::Kick`] or [`MachineError::Stuck`] if a vCPU does not come back; it is then left alone.
    pub fn stop(&mut self) -> Result<(), MachineError> {
        drop(self.shared.on_end.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.shared.stop();
        let mut result = Ok(());
        for (vcpu, thread) in std::mem::take(&mut self.threads).into_iter().enumerate() {
            let kicked = self.shared.kickers.get(vcpu).map_or(Ok(()), |kicker| kicker.kick_and_wait());
            // The channel carries nothing: the wait ends when the thread drops its end, or runs out.
            let ended = thread.ended.recv_timeout(PATIENCE) != Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if ended {
                // It has nothing left to do but return; whether it panicked makes no difference here.
                let _ = thread.handle.join();
            } else {
                result = result.and(kicked.map_err(MachineError::from)).and(Err(MachineError::Stuck { vcpu }));
            }
        }
        self.vcpus.clear();
        for transport in std::mem::take(&mut self.transports) {
            transport.stop();
        }
        self.console.flush(LAST_WORDS);
        result
    }

    /// The last bytes the guest wrote to its serial console or debug port.
    pub fn console_tail(&self) -> Vec<u8> {
        self.console.tail()
    }

    /// RIP samples so far, most frequent first; empty unless the specification asked for them.
    pub fn profile(&self) -> Vec<(u64, u32)> {
        self.shared.profile.samples()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody is left to hear about a stuck thread.
        let _ = self.stop();
    }
}

fn host(what: &str) -> impl FnOnce(io::Error) -> MachineError {
    let what = what.to_owned();
    move |source| MachineError::Host { what, source }
}

fn windows(count: usize) -> Result<Vec<MmioWindow>, MachineError> {
    if count > DEVICE_LINES.len() {
        return Err(MachineError::TooManyDevices { count });
    }
    let bases = (0..).map(|number: u64| DEVICE_BASE.saturating_add(number.saturating_mul(MmioTransport::SIZE)));
    let lines = DEVICE_LINES.iter().take(count);
    Ok(lines.zip(bases).map(|(irq, base)| MmioWindow { base, size: MmioTransport::SIZE, irq: *irq }).collect())
}

fn legacy_devices(vm: &Vm, console: &Console, reset: &ResetLine) -> Result<Bus, MachineError> {
    let mut ports = Bus::default();
    let keyboard = I8042::new(reset.clone());
    ports.insert(serial::BASE, serial::SIZE, Arc::new(Serial::new(vm.interrupt(serial::IRQ)?, console.clone())))?;
    ports.insert(i8042::BASE, 1, keyboard.data_port())?;
    ports.insert(i8042::BASE.saturating_add(i8042::COMMAND_OFFSET), 1, keyboard.command_port())?;
    ports.insert(rtc::BASE, rtc::SIZE, Arc::new(Rtc::default()))?;
    ports.insert(debug_port::PORT, 1, Arc::new(DebugPort(console.clone())))?;
    Ok(ports)
}

type Transports = Vec<Arc<MmioTransport>>;

fn virtio_devices(
    vm: &Vm,
    memory: &GuestMemoryMmap,
    devices: Vec<NewDevice>,
    windows: &[MmioWindow],
) -> Result<(Bus, Transports), MachineError> {
    let mut mmio = Bus::default();
    let mut transports = Vec::new();
    for (NewDevice { name, device }, window) in devices.into_iter().zip(windows) {
        let interrupt = vm.interrupt(window.irq)?;
        let transport = MmioTransport::spawn(&name, device, memory.clone(), interrupt).map_err(host(&name))?;
        for (queue, event) in (0..).zip(transport.queue_events()) {
            vm.notify_on_write(window.base.saturating_add(QUEUE_NOTIFY), queue, event)?;
        }
        mmio.insert(window.base, window.size, Arc::new(Window(Arc::clone(&transport))))?;
        transports.push(transport);
    }
    Ok((mmio, transports))
}

/// A transport on the MMIO bus.
struct Window(Arc<MmioTransport>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// The backend's words, where the devices are, and last what the specification adds.
fn command_line(backend: &Backend, vcpu: &Vcpu, windows: &[MmioWindow], added: &str) -> Result<String, MachineError> {
    let mut words = backend.base_command_line().to_owned();
    if backend.tells_tsc_frequency() {
        // Writing to a String cannot fail.
        let _ = write!(words, " tsc_early_khz={}", vcpu.tsc_khz()?);
    }
    for window in windows {
        let _ = write!(words, " virtio_mmio.device={}K@{:#x}:{}", window.size / 1024, window.base, window.irq);
    }
    if !added.is_empty() {
        let _ = write!(words, " {added}");
    }
    Ok(words)
}

fn enter_kernel(vcpu: &Vcpu, entry: &boot::Entry) -> Result<(), MachineError> {
    let mut sregs = vcpu.sregs()?;
    tables::initial_sregs(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    // Bit 1 of the flags is always set; interrupts are off.
    vcpu.set_regs(&kvm_regs { rip: entry.rip, rsi: entry.rsi, rflags: 2, ..Default::default() })?;
    Ok(())
}

fn random() -> io::Result<[u8; 32]> {
    let mut seed = [0u8; 32];
    let start = Instant::now();
    loop {
        // SAFETY: writes at most the buffer's length into it.
        let filled = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
        if usize::try_from(filled) == Ok(seed.len()) {
            return Ok(seed);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted || start.elapsed() > PATIENCE {
            return Err(error);
        }
    }
}
