"""Errors: what they are besides ours, what they carry, and that they survive a pickle."""

from __future__ import annotations

import errno
import pickle
import subprocess

import pytest

from microvm import exceptions
from microvm.exceptions import (
    CommandNotExecutable,
    CommandNotFound,
    ConfigError,
    ExecTimeout,
    KvmMissing,
    KvmPermission,
    KvmUnavailable,
    MicrovmError,
    SandboxExited,
    VmCrashed,
)

EXAMPLES = [
    MicrovmError("words", hint="advice", log_tail="console"),
    ConfigError("memory", "12Q", "a size"),
    ConfigError.refused("kernel", "kernel: not an ELF file", None),
    KvmMissing("no /dev/kvm", hint="modprobe"),
    VmCrashed("gone", signal=9),
    CommandNotFound("no such program", number=errno.ENOENT, path="prog"),
    ExecTimeout(["sleep", "9"], 1.5, "out", "err"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_a_pickle(error: MicrovmError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.code, again.hint, again.log_tail) == (error.code, error.hint, error.log_tail)
    assert vars(again) == vars(error)


def test_message_ends_with_the_hint() -> None:
    assert str(MicrovmError("it failed", hint="try this")) == "it failed; hint: try this"
    assert str(MicrovmError("it failed")) == "it failed"


def test_errors_are_those_python_has_already() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(KvmMissing, KvmUnavailable)
    assert issubclass(KvmMissing, FileNotFoundError)
    assert issubclass(KvmPermission, PermissionError)
    assert issubclass(CommandNotFound, FileNotFoundError)
    assert issubclass(CommandNotExecutable, PermissionError)
    assert issubclass(VmCrashed, SandboxExited)
    assert issubclass(ExecTimeout, TimeoutError)
    assert issubclass(ExecTimeout, subprocess.TimeoutExpired)


def test_timeout_has_the_fields_of_subprocess() -> None:
    error = ExecTimeout(["sleep", "9"], 1.5, "out", "err")
    assert (error.cmd, error.timeout, error.output, error.stdout, error.stderr) == (
        ["sleep", "9"],
        1.5,
        "out",
        "out",
        "err",
    )
    assert "1.5 seconds" in str(error)


def test_os_errors_have_number_and_file_name() -> None:
    error = CommandNotFound("no such program", path="prog")
    assert error.errno == errno.ENOENT
    assert error.filename == "prog"


def test_every_error_has_a_code_and_words_of_its_own() -> None:
    classes = [getattr(exceptions, name) for name in exceptions.__all__]
    assert len({cls.code for cls in classes}) == len(classes)
    assert all(cls.__doc__ for cls in classes)
