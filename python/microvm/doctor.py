"""What this host offers, item by item, and the exact fix for what is missing. Works where there is no KVM, too."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from microvm import _microvm, environment
from microvm.exceptions import MicrovmError

if TYPE_CHECKING:
    from collections.abc import Callable

    Status = Literal["ok", "warn", "fail"]

__all__ = ["Check", "diagnose"]

_MIB = 1 << 20
#: What the default machine takes, with something left for its process.
_COMFORTABLE_MEMORY = 640 * _MIB
_COMFORTABLE_DISK = 2048 * _MIB
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_VERSION_FLAG = 1


@dataclass(frozen=True, slots=True)
class Check:
    """One item: ``fail`` stops machines from running, ``warn`` takes something away from them."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def diagnose() -> list[Check]:
    """All checks, in the order in which a run needs them. Never raises."""
    checks: list[Callable[[], Check]] = [
        _platform,
        _kvm,
        _programs,
        _kernel,
        _cache,
        _memory,
        _user_namespaces,
        _seccomp,
        _landlock,
    ]
    return [check() for check in checks]


def _backend() -> _microvm.Backend | MicrovmError:
    try:
        return _microvm.detect_backend()
    except MicrovmError as error:
        return error


def _platform() -> Check:
    system, release, machine = platform.system(), platform.release(), platform.machine()
    detail = f"{system} {release} on {machine}, Python {platform.python_version()}"
    if system != "Linux" or machine != "x86_64":
        return Check("platform", "fail", detail, "microvm needs Linux on x86_64")
    return Check("platform", "ok", detail)


def _kvm() -> Check:
    backend = _backend()
    if isinstance(backend, MicrovmError):
        return Check("kvm", "fail", backend.message, backend.hint)
    detail = f"{backend.kind} KVM, up to {backend.max_cpus} vCPU{'s' if backend.max_cpus > 1 else ''} in a machine"
    if backend.kind == "software":
        detail += "; guests run the ring3 kernel"
    return Check("kvm", "ok", detail)


def _programs() -> Check:
    from microvm.launch import agent_path, vmm_path

    try:
        vmm, agent = vmm_path(), agent_path()
    except MicrovmError as error:
        return Check("programs", "fail", error.message, error.hint)
    return Check("programs", "ok", f"{vmm}, {agent}")


def _kernel() -> Check:
    given = environment.get("MICROVM_KERNEL")
    if given:
        if os.access(given, os.R_OK):
            return Check("kernel", "ok", f"{given} (MICROVM_KERNEL)")
        return Check("kernel", "fail", f"MICROVM_KERNEL is {given}, which cannot be read", "unset it or correct it")
    backend = _backend()
    flavour = "hardware" if isinstance(backend, MicrovmError) else backend.flavour
    from microvm import kernel

    found = kernel.find(flavour)
    if found is None:
        return Check("kernel", "warn", f"no {flavour} kernel yet; the first run builds it", "microvm kernel build")
    return Check("kernel", "ok", f"{found} ({flavour})")


def _cache() -> Check:
    path = environment.cache_directory()
    existing = path
    while not os.path.isdir(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("cache", "fail", f"{path} cannot be written", f"chown it to you, or set MICROVM_CACHE: {existing}")
    room = os.statvfs(existing)
    free = room.f_bavail * room.f_frsize
    if free < _COMFORTABLE_DISK:
        return Check("cache", "warn", f"{path}, {free // _MIB} MiB free", "building a kernel takes about 2 GiB")
    return Check("cache", "ok", f"{path}, {free // _MIB} MiB free")


def _memory() -> Check:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError) as error:
        return Check("memory", "warn", f"/proc/meminfo is not as expected ({error})")
    detail = f"{available // _MIB} MiB available"
    if available < _COMFORTABLE_MEMORY:
        return Check("memory", "warn", detail, "use less for a machine, as in -m 256M")
    return Check("memory", "ok", detail)


def _user_namespaces() -> Check:
    """The jail of a machine's process uses them; without, it has fewer walls."""
    if os.geteuid() == 0:
        return Check("user namespaces", "ok", "not needed: running as root")
    for path, wanted, fix in (
        ("/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=10000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ):
        if _read(path) == wanted:
            return Check("user namespaces", "warn", f"{path} is {wanted}", fix)
    return Check("user namespaces", "ok", "allowed")


def _seccomp() -> Check:
    actions = _read("/proc/sys/kernel/seccomp/actions_avail")
    if actions is None:
        return Check("seccomp", "warn", "the kernel has no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER")
    return Check("seccomp", "ok", actions)


def _landlock() -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION_FLAG)
    if version < 0:
        reason = errno.errorcode.get(ctypes.get_errno(), "?")
        hint = "boot with lsm=landlock,… and a kernel with CONFIG_SECURITY_LANDLOCK"
        return Check("landlock", "warn", f"not available ({reason})", hint)
    return Check("landlock", "ok", f"ABI {version}")


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None
