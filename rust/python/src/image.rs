//! Root file systems, and what goes into the initial one.

use crate::enter::enter;
use crate::error::{ToPython, image};
use microvm_image::cache::Cache;
use microvm_image::host::HostOptions;
use microvm_image::{ImageError, Tree, Watch, host, initramfs as ramdisk, modules};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

impl ToPython for ImageError {
    fn to_python(self, py: Python<'_>) -> PyErr {
        image(py, &self.to_string())
    }
}

/// An error of the work, or of the progress callback.
enum Failed {
    Work(ImageError),
    Callback(PyErr),
}

impl ToPython for Failed {
    fn to_python(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Work(error) => error.to_python(py),
            Self::Callback(error) => error,
        }
    }
}

/// Runs `work` with a watch that looks for signals and calls `progress(bytes done, bytes in all)`.
fn with_progress(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl Send + FnOnce(Watch<'_>) -> Result<PathBuf, ImageError>,
) -> PyResult<OsString> {
    let made = enter(py, |check| {
        let mut failed = None;
        let result = work(&mut |now| {
            if check().is_err() {
                return ControlFlow::Break(());
            }
            let called = progress.as_ref().map_or(Some(Ok(())), |progress| {
                Python::try_attach(|py| progress.call1(py, (now.bytes, now.bytes_total)).map(drop))
            });
            match called {
                Some(Ok(())) => ControlFlow::Continue(()),
                Some(Err(error)) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
                None => ControlFlow::Break(()),
            }
        });
        match failed {
            Some(error) => Err(Failed::Callback(error)),
            None => result.map_err(Failed::Work),
        }
    })?;
    Ok(made.into_os_string())
}

/// `default_image(cache, executable, standard_library, cache_tag, progress)`: the image of the host's userland.
#[pyfunction]
#[pyo3(signature = (cache, executable, standard_library, cache_tag, progress=None, /))]
pub fn default_image(
    py: Python<'_>,
    cache: PathBuf,
    executable: PathBuf,
    standard_library: Vec<PathBuf>,
    cache_tag: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<OsString> {
    with_progress(py, progress, |watch| {
        let options = HostOptions::new(Some(host::Python { executable, standard_library, cache_tag }));
        Cache::at(cache).image(&host::tree(&options)?, watch)
    })
}

/// `directory_image(cache, directory, progress)`: the image of a folder.
#[pyfunction]
#[pyo3(signature = (cache, directory, progress=None, /))]
pub fn directory_image(
    py: Python<'_>,
    cache: PathBuf,
    directory: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<OsString> {
    with_progress(py, progress, |watch| Cache::at(cache).image(&Tree::from_directory(&directory)?, watch))
}

/// `initramfs(agent, modules)`: the archive with the agent as `/init`.
#[pyfunction]
#[pyo3(signature = (agent, modules, /))]
pub fn initramfs<'py>(py: Python<'py>, agent: &[u8], modules: Vec<(String, Vec<u8>)>) -> PyResult<Bound<'py, PyBytes>> {
    let archive = ramdisk::build(agent, &modules).map_err(|error| error.to_python(py))?;
    Ok(PyBytes::new(py, &archive))
}

/// `kernel_modules(root, release, wanted)`: the modules and what they depend on, in load order.
#[pyfunction]
#[pyo3(signature = (root, release, wanted, /))]
pub fn kernel_modules(
    py: Python<'_>,
    root: PathBuf,
    release: String,
    wanted: Vec<String>,
) -> PyResult<Vec<(String, Bound<'_, PyBytes>)>> {
    let found = enter(py, |_| {
        let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        modules::for_release(Path::new(&root), &release, &wanted)
    })?;
    Ok(found.into_iter().map(|(name, content)| (name, PyBytes::new(py, &content))).collect())
}

/// `kernel_release(path)`: what a bzImage says it is; `None` for anything else.
#[pyfunction]
#[pyo3(signature = (path, /))]
pub fn kernel_release(py: Python<'_>, path: PathBuf) -> PyResult<Option<String>> {
    let file = std::fs::File::open(path)?;
    enter(py, |_| Ok::<_, std::convert::Infallible>(microvm_machine::boot::kernel_release(&file)))
}
