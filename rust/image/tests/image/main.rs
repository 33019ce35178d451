//! Laws of this crate, tested from outside.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test fails by panicking"
)]

mod cache;
mod common;
mod erofs;
mod host;
mod initramfs;
mod modules;
mod tree;
