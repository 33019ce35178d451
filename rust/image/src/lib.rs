//! Root file systems and initial ramdisks.
//!
//! ```text
//! a folder ───────────── tree::Tree::from_directory ─┐
//! the host's userland ── host::tree ─────────────────┴─ tree::Tree ── cache ── erofs::write ── <key>.erofs
//! agent, modules ─────── initramfs::build ── newc archive
//! ```
//!
//! - [`tree`]: what an image will hold, in memory; file content stays on the host.
//! - [`erofs`]: writes a tree as an EROFS image (read-only, uncompressed, deterministic).
//! - [`host`]: the tree of the default image: the host's Python, shell and tools with their libraries.
//! - [`cache`]: images by content, built once: [`default_image`], [`from_directory`].
//! - [`initramfs`]: the newc archive with the agent as `/init`.
//! - [`modules`]: kernel modules with their dependencies, in load order.

pub mod cache;
pub mod erofs;
mod error;
pub mod host;
pub mod initramfs;
pub mod modules;
mod progress;
mod scan;
pub mod tree;

pub use cache::{Cache, default_image, from_directory};
pub use error::ImageError;
pub use host::HostOptions;
pub use progress::{Progress, Stage, Watch, silent};
pub use tree::Tree;
