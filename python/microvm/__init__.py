"""Real Linux virtual machines with the manners of :mod:`subprocess`.

    import microvm

    print(microvm.run(["python3", "-c", "print(1 + 1)"]).stdout)

    with microvm.Sandbox(memory="1G") as sandbox:
        sandbox.run(["sh", "-c", "echo hello > /tmp/file"])
        sandbox.run("cat /tmp/file")

:mod:`microvm.vm` has the parts underneath: guest memory, vCPUs and their exits. Errors are in
:mod:`microvm.exceptions`. Names are loaded when they are first used, so that importing this costs little.
"""

from __future__ import annotations

# Type checkers take this name for true. Importing it from typing would double what importing this package costs.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from microvm import exceptions, vm
    from microvm._microvm import __version__
    from microvm.config import DEFAULT_ENV
    from microvm.exceptions import ConfigError, ExecTimeout, KvmUnavailable, MicrovmError, SandboxExited
    from microvm.process import CompletedProcess
    from microvm.sandbox import Sandbox, run

__all__ = [
    "DEFAULT_ENV",
    "CompletedProcess",
    "ConfigError",
    "ExecTimeout",
    "KvmUnavailable",
    "MicrovmError",
    "Sandbox",
    "SandboxExited",
    "__version__",
    "exceptions",
    "run",
    "vm",
]

_HOMES = {
    "DEFAULT_ENV": "microvm.config",
    "CompletedProcess": "microvm.process",
    "ConfigError": "microvm.exceptions",
    "ExecTimeout": "microvm.process",
    "KvmUnavailable": "microvm.exceptions",
    "MicrovmError": "microvm.exceptions",
    "Sandbox": "microvm.sandbox",
    "SandboxExited": "microvm.exceptions",
    "__version__": "microvm._microvm",
    "run": "microvm.sandbox",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if home := _HOMES.get(name):
        value: object = getattr(import_module(home), name)
    elif name in ("exceptions", "vm"):
        return import_module(f"microvm.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
