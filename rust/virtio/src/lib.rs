//! Virtio devices behind the virtio-mmio transport (VIRTIO 1.2). No KVM in this crate.
//!
//! The guest is the attacker. Data flows one way through the modules, and each one is a gate:
//!
//! * [`mmio`]: registers and status machine; owns the device's worker thread.
//! * [`device`]: what the transport asks of a device.
//! * [`queue`]: the only place where a descriptor chain becomes host memory, or [`queue::Malformed`].
//! * [`block`], [`vsock`], [`rng`]: the devices.
//! * [`interrupt`]: the interrupt line and its status register.
//!
//! A guest fault ends in DEVICE_NEEDS_RESET for that device; the machine and its other devices go on,
//! and a reset makes the device work again.

pub mod block;
pub mod device;
pub mod interrupt;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod vsock;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
