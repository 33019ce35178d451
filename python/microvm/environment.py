"""The environment variables this package reads; ``microvm environment`` prints this table."""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "get"]

VARIABLES = {
    "MICROVM_VMM": "Path of the microvm-vmm program, instead of the one in the wheel.",
    "MICROVM_AGENT": "Path of the guest agent, instead of the one in the wheel.",
    "MICROVM_KERNEL": "Guest kernel (ELF vmlinux or bzImage), as with --kernel.",
    "MICROVM_MODULES": "Directory with the modules of a given kernel (such as /lib/modules/6.12.0-amd64).",
    "MICROVM_CACHE": "Where kernels and images are kept; default $XDG_CACHE_HOME/microvm or ~/.cache/microvm.",
}


def get(name: str) -> str | None:
    """The value of one of :data:`VARIABLES`; an empty one counts as not set."""
    if name not in VARIABLES:
        raise KeyError(name)
    return os.environ.get(name) or None


def cache_directory() -> str:
    """Where kernels and images are kept. The directory may not exist yet."""
    if cache := get("MICROVM_CACHE"):
        return cache
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "microvm")
