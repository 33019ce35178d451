"""Settings of a sandbox: parsed and checked here, once, before anything is started.

Sizes are ints of bytes or strings such as ``"512M"``; durations are seconds or :class:`datetime.timedelta`.
The limits themselves belong to the machine (``rust/protocol``), which this module asks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microvm import _microvm
from microvm.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    Size = int | str
    Duration = float | timedelta
    Command = str | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str] | os.PathLike[bytes]]
    Environment = Mapping[str, str] | Mapping[bytes, bytes] | Mapping[str, str | bytes]
    StrPath = str | os.PathLike[str]

__all__ = ["DEFAULT_ENV", "SandboxConfig", "format_size", "parse_duration", "parse_size"]

#: Environment of a command that asks for none: not the host's, which is none of the guest's business.
DEFAULT_ENV: dict[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

_UNITS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_LARGEST_SIZE = 1 << 63
_LONGEST_DURATION = 365.0 * 86400
_SIZE_FORM = "a number of bytes, or a number with K, M, G or T after it, such as 512M (powers of 1024)"


def parse_size(size: Size, field: str = "size") -> int:
    """Bytes in ``size``: an int, or ``"512M"``, ``"1.5G"``, ``"64KiB"``; units are powers of 1024."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(field, repr(size), _SIZE_FORM)
    if isinstance(size, int):
        if not 0 <= size < _LARGEST_SIZE:
            raise ConfigError(field, size, _SIZE_FORM)
        return size
    text = size.strip().upper()
    digits = text.rstrip("BIKMGTP ")
    unit = text[len(digits) :].strip()
    if len(unit) > 1:
        unit = unit.removesuffix("IB") if unit.endswith("IB") else unit.removesuffix("B")
    whole, point, fraction = digits.partition(".")
    numeric = whole.isascii() and whole.isdigit() and (not point or (fraction.isascii() and fraction.isdigit()))
    if unit not in _UNITS or not numeric or len(digits) > 40:
        raise ConfigError(field, repr(size), _SIZE_FORM)
    scale: int = 10 ** len(fraction)
    value, remainder = divmod(int(whole + fraction) << _UNITS[unit], scale)
    if remainder or value >= _LARGEST_SIZE:
        raise ConfigError(field, repr(size), _SIZE_FORM + "; a whole number of bytes below 8E")
    return value


def format_size(size: int) -> str:
    """The shortest exact form: ``parse_size(format_size(n)) == n``."""
    for unit in "TGMK":
        shift = _UNITS[unit]
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def parse_duration(duration: Duration, field: str = "timeout") -> float:
    """Seconds in ``duration``, which must be above 0 and at most a year."""
    allowed = "a number of seconds above 0 and at most a year, or a timedelta"
    total_seconds = getattr(duration, "total_seconds", None)
    seconds = total_seconds() if callable(total_seconds) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigError(field, repr(duration), allowed)
    if not (math.isfinite(seconds) and 0 < seconds <= _LONGEST_DURATION):
        raise ConfigError(field, repr(duration), allowed)
    return float(seconds)


def encode_words(words: Command, field: str = "command") -> list[bytes]:
    """The bytes of a command line as :mod:`subprocess` would pass them; a plain string goes to ``sh -c``."""
    if isinstance(words, str):
        words = ["/bin/sh", "-c", words]
    elif isinstance(words, os.PathLike):
        words = [words]
    elif isinstance(words, bytes | bytearray):
        raise ConfigError(field, repr(words), "a list of words, or a string for sh -c")
    encoded = [os.fsencode(word) for word in words]
    if not encoded or not encoded[0]:
        raise ConfigError(field, repr(list(words)), "a program and its arguments, not nothing")
    for word in encoded:
        if b"\0" in word:
            raise ConfigError(field, repr(word), "words without NUL (embedded null byte)")
    return encoded


def encode_env(env: Environment, field: str = "env") -> list[tuple[bytes, bytes]]:
    """The bytes of an environment as :mod:`subprocess` would pass them."""
    encoded = []
    for name, value in env.items():
        name_bytes, value_bytes = os.fsencode(name), os.fsencode(value)
        if not name_bytes or b"=" in name_bytes:
            raise ConfigError(
                field, repr(name), "names that are not empty and have no '=' (illegal environment variable name)"
            )
        if b"\0" in name_bytes or b"\0" in value_bytes:
            raise ConfigError(field, f"{name!r}={value!r}", "names and values without NUL (embedded null byte)")
        encoded.append((name_bytes, value_bytes))
    return encoded


def encode_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None, field: str) -> bytes | None:
    """The bytes of a path inside the guest; ``None`` stays ``None``."""
    if path is None:
        return None
    encoded = os.fsencode(path)
    if not encoded or b"\0" in encoded:
        raise ConfigError(field, repr(path), "a path without NUL, not empty")
    return encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """Everything a sandbox is made of, checked. Make one with :meth:`of`."""

    cpus: int
    memory: int
    env: Mapping[str, str]
    workdir: str | None
    kernel: str | None
    cmdline: str
    initrd: str | None
    rootfs: str | None
    console: int | None
    boot_timeout: float
    profile_us: int | None

    @classmethod
    def of(
        cls,
        *,
        cpus: int = 1,
        memory: Size = "512M",
        env: Environment | None = None,
        workdir: StrPath | None = None,
        kernel: StrPath | None = None,
        cmdline: str = "",
        initrd: StrPath | None = None,
        rootfs: StrPath | None = None,
        console: int | None = None,
        boot_timeout: Duration = 60.0,
        profile_us: int | None = None,
    ) -> SandboxConfig:
        """Checks settings as a person gives them.

        Raises :class:`ConfigError` for the first one that is out of range. Whether this host can give
        as many vCPUs is checked when the backend is known.
        """
        if isinstance(cpus, bool) or not isinstance(cpus, int):
            raise ConfigError("cpus", repr(cpus), "a whole number")
        if not isinstance(cmdline, str):
            raise ConfigError("cmdline", repr(cmdline), "a string of kernel parameters")
        bytes_of_memory = parse_size(memory, "memory")
        variables = {} if env is None else dict(env)
        encode_env(variables)
        where = encode_path(workdir, "workdir")
        if where is not None and not where.startswith(b"/"):
            raise ConfigError("workdir", repr(workdir), "an absolute path in the guest")
        _microvm.check_spec(cpus, bytes_of_memory, cmdline, profile_us, None)
        return cls(
            cpus=cpus,
            memory=bytes_of_memory,
            env={**DEFAULT_ENV, **{os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()}},
            workdir=None if where is None else os.fsdecode(where),
            kernel=_host_path(kernel, "kernel"),
            cmdline=cmdline,
            initrd=_host_path(initrd, "initrd"),
            rootfs=_host_path(rootfs, "rootfs"),
            console=console,
            boot_timeout=parse_duration(boot_timeout, "boot_timeout"),
            profile_us=profile_us,
        )


def _host_path(path: StrPath | None, field: str) -> str | None:
    """A path on the host that exists now; ``None`` stays ``None``."""
    if path is None:
        return None
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(field, repr(path), "a path")
    try:
        os.stat(text)
    except OSError as error:
        raise ConfigError(field, repr(text), f"a file that can be read ({error.strerror})") from error
    return os.path.abspath(text)
