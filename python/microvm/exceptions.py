"""Everything this package raises.

Each error has a stable ``code``, a ``hint`` that says what to do about it, and, where a machine was
involved, the end of its console as ``log_tail``. Where Python has an exception for the case already
(``ValueError``, ``FileNotFoundError``, ``TimeoutError``…), the error is one of those too.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microvm.process import ExecTimeout

__all__ = [
    "BootError",
    "CommandNotExecutable",
    "CommandNotFound",
    "CommandNotLoadable",
    "ConfigError",
    "ExecError",
    "ExecTimeout",
    "GuestFault",
    "ImageError",
    "KernelError",
    "KvmMissing",
    "KvmPermission",
    "KvmUnavailable",
    "MicrovmError",
    "SandboxExited",
    "VmCrashed",
    "WorkdirError",
    "WorkdirNotADirectory",
    "WorkdirNotFound",
]


class MicrovmError(Exception):
    """Base of all errors of this package."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None, log_tail: str | None = None) -> None:
        # Not super(): a subclass that is also one of Python's has an initializer with other arguments.
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint
        self.log_tail = log_tail

    def __str__(self) -> str:
        return f"{self.message}; hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[MicrovmError], args: tuple[Any, ...], state: dict[str, Any]) -> MicrovmError:
    """Unpickles an error: the keyword-only fields are in its state, not in its arguments."""
    error = cls.__new__(cls)
    if isinstance(error, OSError):
        OSError.__init__(error, state.get("number", 0), state.get("message", ""), state.get("path"))
    else:
        error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(MicrovmError, ValueError):
    """A setting is outside its limits: ``field`` is ``value``, and ``allowed`` says what would do."""

    code = "config"

    def __init__(self, field: str, value: object, allowed: str, *, hint: str | None = None) -> None:
        shown = value if isinstance(value, str) else repr(value)
        super().__init__(f"{field} is {shown}: {allowed}", hint=hint)
        self.field = field
        self.value = value
        self.allowed = allowed

    @classmethod
    def refused(cls, field: str, message: str, hint: str | None) -> ConfigError:
        """A refusal by the machine itself, which has said everything in one sentence."""
        error = cls(field, "refused", message, hint=hint)
        error.message = message
        return error


class KvmUnavailable(MicrovmError):
    """KVM cannot be used here; ``microvm doctor`` says more."""

    code = "kvm_unavailable"


class _Numbered(MicrovmError, OSError):
    """An error that is an ``OSError`` too: ``errno`` and ``filename`` are set."""

    default_number = _errno.EIO

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        log_tail: str | None = None,
        number: int | None = None,
        path: str | None = None,
    ) -> None:
        MicrovmError.__init__(self, message, hint=hint, log_tail=log_tail)
        self.number = number or self.default_number
        self.path = path
        OSError.__init__(self, self.number, os.strerror(self.number), path)


class KvmMissing(KvmUnavailable, _Numbered, FileNotFoundError):
    """There is no ``/dev/kvm``."""

    code = "kvm_missing"
    default_number = _errno.ENOENT


class KvmPermission(KvmUnavailable, _Numbered, PermissionError):
    """This user may not open ``/dev/kvm``."""

    code = "kvm_permission"
    default_number = _errno.EACCES


class BootError(MicrovmError):
    """The machine did not reach the point where it takes commands."""

    code = "boot"


class ImageError(MicrovmError):
    """A root file system could not be made or used."""

    code = "image"


class KernelError(MicrovmError):
    """No guest kernel could be found or built."""

    code = "kernel"


class SandboxExited(MicrovmError):
    """The machine has ended: it was stopped, or the guest powered it off."""

    code = "exited"


class GuestFault(SandboxExited):
    """The guest did something no machine can continue from: triple fault, kernel panic, KVM internal error."""

    code = "guest_fault"


class VmCrashed(SandboxExited):
    """The machine's own process died; ``exit_code`` or ``signal`` says how."""

    code = "crashed"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        log_tail: str | None = None,
        exit_code: int | None = None,
        signal: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint, log_tail=log_tail)
        self.exit_code = exit_code
        self.signal = signal


class ExecError(_Numbered):
    """A command could not be started in the guest; ``errno`` is the guest's."""

    code = "exec"


class CommandNotFound(ExecError, FileNotFoundError):
    """The program does not exist in the guest."""

    code = "command_not_found"
    default_number = _errno.ENOENT


class CommandNotExecutable(ExecError, PermissionError):
    """The program exists in the guest and may not be executed."""

    code = "command_not_executable"
    default_number = _errno.EACCES


class CommandNotLoadable(ExecError):
    """The program may be executed and is none: no interpreter, no format that the guest's kernel knows."""

    code = "command_not_loadable"
    default_number = _errno.ENOEXEC


class WorkdirError(ExecError):
    """The working directory cannot be entered."""

    code = "workdir"


class WorkdirNotFound(WorkdirError, FileNotFoundError):
    """The working directory does not exist in the guest."""

    code = "workdir_not_found"
    default_number = _errno.ENOENT


class WorkdirNotADirectory(WorkdirError, NotADirectoryError):
    """The working directory exists in the guest and is something else."""

    code = "workdir_not_a_directory"
    default_number = _errno.ENOTDIR


def __getattr__(name: str) -> object:
    # `ExecTimeout` is also a `subprocess.TimeoutExpired`; whoever does not use it does not pay for that import.
    if name == "ExecTimeout":
        from microvm.process import ExecTimeout

        return ExecTimeout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
