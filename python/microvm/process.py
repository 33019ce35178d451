"""What a finished command looks like: the classes of :mod:`subprocess`, with a little more in them."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import Any, Generic, TypeVar

from microvm.exceptions import MicrovmError

__all__ = ["CompletedProcess", "ExecTimeout"]

Text = TypeVar("Text", str, bytes)


class CompletedProcess(subprocess.CompletedProcess[Text], Generic[Text]):
    """A :class:`subprocess.CompletedProcess` with ``duration``, the seconds between start and end."""

    def __init__(self, args: Any, returncode: int, stdout: Any, stderr: Any, duration: float) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self.duration = duration


class ExecTimeout(MicrovmError, subprocess.TimeoutExpired, TimeoutError):
    """A command did not end in time and was killed with everything it had started.

    ``cmd``, ``timeout``, ``output``/``stdout`` and ``stderr`` are those of :class:`subprocess.TimeoutExpired`.
    """

    code = "timeout"

    def __init__(self, cmd: Any, timeout: float, output: Any = None, stderr: Any = None) -> None:
        MicrovmError.__init__(self, f"command {cmd!r} timed out after {timeout:g} seconds")
        self.number = errno.ETIMEDOUT
        self.path = None
        OSError.__init__(self, self.number, os.strerror(self.number))
        self.cmd = cmd
        self.timeout = timeout
        self.output = output
        self.stderr = stderr
