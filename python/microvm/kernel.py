"""Guest kernels: the ones packed into the wheel, and the ones built on this machine.

A kernel of our own has a *flavour*: ``hardware`` for hosts with VT-x or SVM, ``ring3`` for hosts without. It is packed
into the wheel, or built once from Debian's sources by ``guests/kernel/build`` and kept in the user's cache under a key
made of everything that goes into it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from microvm.exceptions import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    #: Called with what is being done, units done and units in all.
    Progress = Callable[[str, int, int], object]

__all__ = ["FLAVOURS", "Kernel", "build", "find", "ls"]

FLAVOURS = ("hardware", "ring3")

_PACKAGE = Path(__file__).resolve().parent
_BUNDLE = _PACKAGE / "_bundle"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest kernel on this machine. It can be used wherever a path can: it is its ``vmlinux``."""

    flavour: str
    path: Path
    #: Names for the addresses of a profile; None when it was not kept.
    system_map: Path | None
    #: What ``uname -r`` says in the guest.
    version: str
    #: Whether it came with the wheel or was built here.
    source: Literal["bundled", "cache"]
    #: The sha256 of everything that went into it.
    key: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def find(flavour: str) -> Kernel | None:
    """The kernel for a backend of this flavour: the wheel's, else the one that :func:`build` would make, if built."""
    _check(flavour)
    bundled = _BUNDLE / "kernels" / flavour
    if (bundled / "vmlinux").is_file():
        return _kernel(bundled, "bundled", flavour)
    if _script_path() is None:
        return None
    directory = _script().cached(flavour)
    return None if directory is None else _kernel(directory, "cache", flavour)


def build(flavour: str, *, progress: Progress | None = None) -> Kernel:
    """Builds the kernel of this flavour, minutes of work, or returns at once when the cache has it.

    Raises :class:`KernelError` when something is missing; its hint is the command that mends it.
    """
    _check(flavour)
    if _script_path() is None:
        hint = "reinstall microvm-kvm, or give a kernel with --kernel or MICROVM_KERNEL"
        raise KernelError("this installation has no kernel sources", hint=hint)
    script = _script()

    def report(part: float, _step: str) -> None:
        if progress is not None:
            progress(f"building the {flavour} kernel", int(part * 1000), 1000)

    try:
        directory = script.build(flavour, progress=report)
    except script.BuildError as error:
        message, _, hint = str(error).partition("\nhint: ")
        raise KernelError(message, hint=hint or None) from error
    built = _kernel(directory, "cache", flavour)
    if built is None:
        raise KernelError(f"{directory} has no vmlinux", hint="remove the directory and build again")
    return built


def ls() -> list[Kernel]:
    """All kernels on this machine: those of the wheel, then those in the cache, newest first."""
    found = [_kernel(_BUNDLE / "kernels" / flavour, "bundled", flavour) for flavour in FLAVOURS]
    if _script_path() is not None:
        built = _script().kernels_directory().glob("*/info.json")
        newest_first = sorted(built, key=lambda info: info.stat().st_mtime, reverse=True)
        found += [_kernel(info.parent, "cache") for info in newest_first]
    return [kernel for kernel in found if kernel is not None]


def _check(flavour: str) -> None:
    if flavour not in FLAVOURS:
        raise KernelError(f"no kernel flavour is called {flavour!r}", hint=f"one of {', '.join(FLAVOURS)}")


def _kernel(directory: Path, source: Literal["bundled", "cache"], flavour: str = "") -> Kernel | None:
    """The kernel in a directory as the build script leaves it, or None when there is none."""
    path = directory / "vmlinux"
    if not path.is_file():
        return None
    try:
        info: dict[str, Any] = json.loads((directory / "info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = {}
    system_map = directory / "System.map"
    return Kernel(
        flavour=info.get("flavour", flavour),
        path=path,
        system_map=system_map if system_map.is_file() else None,
        version=info.get("version", "unknown"),
        source=source,
        key=info.get("key", directory.name),
    )


def _script_path() -> Path | None:
    """The build script: the wheel's, or in a source checkout the one in the tree."""
    candidates = [_BUNDLE / "kernel-source" / "build"]
    # python/microvm/kernel.py of a checkout: the tree is two levels above the package.
    candidates.append(_PACKAGE.parent.parent / "guests" / "kernel" / "build")
    return next((path for path in candidates if path.is_file()), None)


@lru_cache(maxsize=1)
def _script() -> ModuleType:
    """The build script as a module: it has the key's recipe, and there must be only one."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    path = _script_path()
    if path is None:
        raise KernelError("this installation has no kernel sources")
    spec = spec_from_loader("microvm._kernel_build", SourceFileLoader("microvm._kernel_build", os.fspath(path)))
    if spec is None or spec.loader is None:
        raise KernelError(f"{path} cannot be loaded")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
