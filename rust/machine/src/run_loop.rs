//! What a vCPU thread does: run, serve, until the machine ends.

use crate::bus::Bus;
use crate::diagnostics::MachineEnd;
use crate::exit::Exit;
use crate::kick::{Kicker, Ticker};
use crate::legacy::i8042::ResetLine;
use crate::profile::Profile;
use crate::vcpu::{Vcpu, VcpuError};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How often a vCPU is looked at, to find one that sleeps for good.
const WATCH: Duration = Duration::from_secs(1);

/// Called once, on a vCPU thread, when the machine ends by itself.
pub(crate) type OnEnd = Box<dyn FnOnce(MachineEnd) + Send>;

/// What the vCPU threads of one machine share.
pub(crate) struct Shared {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    pub(crate) reset: ResetLine,
    pub(crate) stopping: AtomicBool,
    pub(crate) on_end: Mutex<Option<OnEnd>>,
    pub(crate) kickers: Vec<Kicker>,
    pub(crate) sleepers: Sleepers,
    pub(crate) profile: Profile,
    pub(crate) profile_interval: Option<Duration>,
}

impl Shared {
    /// Asks all vCPUs to stop; does not wait.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.kickers.iter().for_each(Kicker::kick);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn end(&self, end: MachineEnd) {
        let on_end = self.on_end.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.stop();
        if let Some(on_end) = on_end {
            on_end(end);
        }
    }
}

/// Body of a vCPU thread.
pub(crate) fn run(mut vcpu: Vcpu, shared: &Shared) {
    let signal = vcpu.kicker().signal();
    signal.block_all_others();
    let sampled = if vcpu.index() == 0 { shared.profile_interval } else { None };
    let interval = sampled.unwrap_or(WATCH);
    // A tick that is lost does no harm: the next one comes.
    let _ticker = match Ticker::start(signal, interval, interval) {
        Ok(ticker) => ticker,
        Err(error) => return shared.end(MachineEnd::host(&error)),
    };
    while !shared.is_stopping() {
        match serve(&mut vcpu, shared, sampled.is_some()) {
            Ok(None) => {}
            Ok(Some(end)) => return shared.end(end),
            Err(error) => return shared.end(MachineEnd::host(&error)),
        }
    }
}

/// One exit. Returns the machine's end, if this is it.
fn serve(vcpu: &mut Vcpu, shared: &Shared, sampled: bool) -> Result<Option<MachineEnd>, VcpuError> {
    match vcpu.run(None)? {
        Exit::IoOut { port, size, data } => {
            for value in data.chunks(usize::from(size).max(1)) {
                shared.ports.write(port.into(), value);
            }
            if shared.reset.is_pulled() {
                return Ok(Some(MachineEnd::reset("the guest reset the machine through its keyboard controller")));
            }
        }
        Exit::IoIn { port, size, count } => {
            let size = usize::from(size).max(1);
            let mut data = vec![0; size.saturating_mul(usize::try_from(count).unwrap_or(0))];
            for value in data.chunks_mut(size) {
                shared.ports.read(port.into(), value);
            }
            vcpu.answer(&data)?;
        }
        Exit::MmioWrite { address, data } => shared.mmio.write(address, &data),
        Exit::MmioRead { address, size } => {
            let mut data = [0; 8];
            if let Some(data) = data.get_mut(..usize::from(size)) {
                shared.mmio.read(address, data);
                vcpu.answer(data)?;
            }
        }
        Exit::Interrupted | Exit::Timeout => return Ok(look(vcpu, shared, sampled)),
        Exit::Shutdown => return Ok(Some(MachineEnd::triple_fault(vcpu))),
        Exit::InternalError(error) => return Ok(Some(MachineEnd::fault(&error.to_string(), vcpu))),
        Exit::FailEntry { reason, cpu } => {
            let what = format!("the processor refused to enter the guest: reason {reason:#x} on host CPU {cpu}");
            return Ok(Some(MachineEnd::fault(&what, vcpu)));
        }
        Exit::Halt => {
            return Ok(Some(MachineEnd::fault("the guest halted, and nothing can wake it", vcpu)));
        }
        Exit::SystemEvent { kind } => {
            return Ok(Some(MachineEnd::reset(&format!("the guest ended the machine: system event {kind}"))));
        }
        other @ (Exit::Debug { .. } | Exit::MemoryFault { .. } | Exit::Unexpected { .. }) => {
            return Ok(Some(MachineEnd::fault(&format!("unexpected exit of the vCPU: {other:?}"), vcpu)));
        }
    }
    Ok(None)
}

/// A tick or a kick: sample, and see whether anything can still wake the machine.
fn look(vcpu: &Vcpu, shared: &Shared, sampled: bool) -> Option<MachineEnd> {
    if shared.is_stopping() {
        return None;
    }
    if sampled && let Ok(regs) = vcpu.regs() {
        shared.profile.add(regs.rip);
    }
    let all = shared.sleepers.look(vcpu.index(), vcpu.sleeps_for_good());
    all.then(|| MachineEnd::fault("the guest halted with interrupts off, and nothing can wake it", vcpu))
}

/// Which vCPUs sleep in a way that only another vCPU can end. If all do, the machine is at its end.
#[derive(Debug)]
pub(crate) struct Sleepers(Vec<AtomicU8>);

impl Sleepers {
    /// So many looks in a row must find all asleep: one that was just woken by another counts until its next look.
    const LOOKS: u8 = 2;

    pub(crate) fn new(vcpus: u8) -> Self {
        Self((0..vcpus).map(|_| AtomicU8::new(0)).collect())
    }

    /// Notes one look at `vcpu`. Returns whether all sleep.
    fn look(&self, vcpu: u8, asleep: bool) -> bool {
        if let Some(looks) = self.0.get(usize::from(vcpu)) {
            let before = looks.load(Ordering::Relaxed);
            looks.store(if asleep { before.saturating_add(1) } else { 0 }, Ordering::Relaxed);
        }
        self.0.iter().all(|looks| looks.load(Ordering::Relaxed) >= Self::LOOKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn look_is_true_only_if_each_vcpus_last_looks_found_it_asleep(
            looks in proptest::collection::vec((0u8..3, any::<bool>()), 0..40),
        ) {
            let sleepers = Sleepers::new(3);
            for (index, (vcpu, asleep)) in looks.iter().enumerate() {
                let all = sleepers.look(*vcpu, *asleep);
                let past = &looks[..=index];
                let expected = (0..3).all(|vcpu| {
                    let mut last = past.iter().rev().filter(|(of, _)| *of == vcpu).map(|(_, asleep)| *asleep);
                    last.next() == Some(true) && last.next() == Some(true)
                });
                prop_assert_eq!(all, expected);
            }
        }
    }
}
