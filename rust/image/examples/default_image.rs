//! Builds the default image of this host and tells how long the steps took:
//! `cargo run --release --example default_image -- [CACHE] [FOLDER]`. With FOLDER, packs that folder instead.

#[path = "../tests/image/common/python.rs"]
mod python;

use microvm_image::{Cache, HostOptions, ImageError, Tree, host, silent};
use std::path::{Path, PathBuf};
use std::time::Instant;

fn main() -> Result<(), ImageError> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let cache = match arguments.next() {
        Some(directory) => Cache::at(directory),
        None => Cache::from_environment()?,
    };
    let folder = arguments.next();
    let options = HostOptions::new(python::installed());
    for run in ["first", "second"] {
        let begin = Instant::now();
        let tree = match &folder {
            Some(folder) => Tree::from_directory(folder)?,
            None => host::tree(&options)?,
        };
        let listed = begin.elapsed();
        let (mut nodes, mut bytes) = (0u64, 0u64);
        tree.walk(|_, node| {
            nodes = nodes.saturating_add(1);
            if let microvm_image::tree::Kind::File(content) = &node.kind {
                bytes = bytes.saturating_add(content.size());
            }
            Ok::<(), ImageError>(())
        })?;
        let begin = Instant::now();
        let image = cache.image(&tree, &mut silent)?;
        let built = begin.elapsed();
        let size = Path::new(&image).metadata().map_or(0, |status| status.len());
        println!(
            "{run}: {nodes} nodes, {:.1} MB; tree {:.1} ms, image {:.1} ms, {:.1} MB: {}",
            bytes as f64 / 1e6,
            listed.as_secs_f64() * 1e3,
            built.as_secs_f64() * 1e3,
            size as f64 / 1e6,
            image.display()
        );
    }
    Ok(())
}
