//! Stands in for the virtio crate until that compiles.
#![allow(missing_docs, unused_variables)]
pub mod device {
    pub trait Device: Send {}
}
pub mod mmio {
    use std::sync::Arc;
    use vmm_sys_util::eventfd::EventFd;
    pub struct MmioTransport;
    impl MmioTransport {
        pub const SIZE: u64 = 0x1000;
        pub fn spawn(name: &str, device: Box<dyn super::device::Device>, memory: vm_memory::GuestMemoryMmap, interrupt: EventFd) -> std::io::Result<Arc<Self>> { Ok(Arc::new(Self)) }
        pub fn read(&self, offset: u64, data: &mut [u8]) {}
        pub fn write(&self, offset: u64, data: &[u8]) {}
        pub fn queue_events(&self) -> &[EventFd] { &[] }
        pub fn stop(&self) {}
    }
}
