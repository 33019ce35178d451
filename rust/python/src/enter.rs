//! The one way from Python into something that may wait.

use crate::error::ToPython;
use microvm_sandbox::{Check, Interrupted};
use pyo3::prelude::*;

/// Runs `work` detached from the interpreter and maps its error.
///
/// `work` gets a check to call at least every 100 ms. On the main thread the check runs Python's signal handlers; if
/// one of them raises, the check fails, `work` should give up, and what was raised is what the caller sees.
pub fn enter<T, E>(py: Python<'_>, work: impl Send + FnOnce(Check<'_>) -> Result<T, E>) -> PyResult<T>
where
    T: Send,
    E: Send + ToPython,
{
    let mut raised: Option<PyErr> = None;
    let result = py.detach(|| {
        work(&mut || {
            // No interpreter to attach to: it shuts down, and nobody waits for the result any more.
            let signals = Python::try_attach(|py| py.check_signals());
            match signals {
                Some(Ok(())) => Ok(()),
                Some(Err(error)) => {
                    raised = Some(error);
                    Err(Interrupted)
                }
                None => Err(Interrupted),
            }
        })
    });
    match (raised, result) {
        (Some(error), _) => Err(error),
        (None, result) => result.map_err(|error| error.to_python(py)),
    }
}
