//! How long work tells where it is, and how it is told to stop.

use std::ops::ControlFlow;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Another process builds the same image; this one waits for it.
    Waiting,
    /// Files are copied into the image.
    Packing,
    /// The image is being written out to the disk.
    Syncing,
}

/// Where the work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Files finished.
    pub files: u64,
    /// Files in all.
    pub files_total: u64,
    /// Bytes of content copied.
    pub bytes: u64,
    /// Bytes of content in all.
    pub bytes_total: u64,
}

/// Called now and then during long work, at least every 100 ms while waiting and once per MiB while
/// copying. `Break` ends the work with [`crate::ImageError::Cancelled`].
pub type Watch<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// A [`Watch`] that shows nothing and never stops.
pub fn silent(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
