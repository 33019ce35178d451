"""From a configuration to a running machine: which files it is made of, and where they come from."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from microvm import _microvm, environment
from microvm.exceptions import BootError, ConfigError, KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm.config import SandboxConfig

    #: Called with what is being done, units done and units in all (0: not known).
    Progress = Callable[[str, int, int], object]

__all__ = ["agent_path", "choose_kernel", "kernel_modules", "launch", "root_image", "vmm_path"]

#: What a distribution's kernel needs for the transport, the root disk, its file systems, the agent's link and entropy.
_MODULES = ("virtio_mmio", "virtio_blk", "erofs", "overlay", "vmw_vsock_virtio_transport", "virtio_rng")

_BUNDLE = os.path.join(os.path.dirname(__file__), "_bundle")


def vmm_path() -> str:
    """The per-machine program: ``MICROVM_VMM``, else the one in the wheel."""
    return _program("MICROVM_VMM", "microvm-vmm")


def agent_path() -> str:
    """The guest agent: ``MICROVM_AGENT``, else the one in the wheel."""
    return _program("MICROVM_AGENT", "microvm-agent")


def _program(variable: str, name: str) -> str:
    path = environment.get(variable) or os.path.join(_BUNDLE, name)
    if not os.access(path, os.X_OK):
        hint = f"reinstall microvm-kvm, or set {variable}; in a source tree: python -m build_backend.bundle"
        raise BootError(f"{path} is missing or not executable", hint=hint)
    return path


def choose_kernel(config: SandboxConfig, backend: _microvm.Backend, progress: Progress | None = None) -> str:
    """The guest kernel's path: the given one, else ``MICROVM_KERNEL``, else ours for this backend, built if need be."""
    given = config.kernel or environment.get("MICROVM_KERNEL")
    if given:
        return given
    # What `kernel.find` would say first, without the modules it needs for the rest: this is on the way of every run.
    bundled = os.path.join(_BUNDLE, "kernels", backend.flavour, "vmlinux")
    if os.path.isfile(bundled):
        return bundled
    from microvm import kernel

    found = kernel.find(backend.flavour) or kernel.build(backend.flavour, progress=progress)
    return os.fspath(found)


def root_image(config: SandboxConfig, progress: Progress | None = None) -> str:
    """Path of the root file system's image: the default one, a packed directory, or the file that was given."""
    cache = environment.cache_directory()
    rootfs = config.rootfs
    if rootfs is None:
        return _default_image(cache, progress)
    if os.path.isdir(rootfs):
        return _microvm.directory_image(cache, rootfs, _counted(progress, f"packing {rootfs}"))
    return rootfs


def _default_image(cache: str, progress: Progress | None) -> str:
    # Of a virtual environment, the interpreter that it is of.
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    # What sysconfig would say, without what importing it costs on every start.
    library = {os.path.dirname(os.__file__), *(path for path in sys.path if os.path.basename(path) == "lib-dynload")}
    tag = sys.implementation.cache_tag or ""
    counted = _counted(progress, "packing the default image")
    return _microvm.default_image(cache, executable, sorted(library), tag, counted)


def _command_line(words: str, root_path: str) -> str:
    """The user's words last, so that they win. An image's name states its format; nothing is guessed from content."""
    return f"microvm.rootfstype=ext4 {words}" if root_path.endswith(".ext4") else words


def _counted(progress: Progress | None, what: str) -> Callable[[int, int], object] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def kernel_modules(kernel: str) -> list[tuple[str, bytes]]:
    """What a distribution's kernel must load before it can mount its root; ours has everything built in."""
    directory = environment.get("MICROVM_MODULES")
    if directory is None:
        release = _microvm.kernel_release(kernel)
        if release is None:
            return []
        beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(kernel))), "lib", "modules", release)
        candidates = [beside, os.path.join("/lib/modules", release)]
        directory = next((path for path in candidates if os.path.isdir(path)), None)
        if directory is None:
            hint = "install that kernel's package, or set MICROVM_MODULES to its modules"
            raise KernelError(f"no modules for kernel {release} in {' or '.join(candidates)}", hint=hint)
    root, release = os.path.split(directory.rstrip("/"))
    return _microvm.kernel_modules(root, release, list(_MODULES))


def _open(path: str, field: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(field, repr(path), f"a file that can be read ({error.strerror})") from error


def _read(path: str, field: str) -> bytes:
    descriptor = _open(path, field)
    with open(descriptor, "rb", buffering=0) as file:
        return file.readall()


def _initrd(user_initrd: str | None, modules: list[tuple[str, bytes]]) -> int:
    """A file in memory: the user's archive, and then ours, so that our ``/init`` wins."""
    archives = [] if user_initrd is None else [_read(user_initrd, "initrd")]
    archives.append(_microvm.initramfs(_read(agent_path(), "MICROVM_AGENT"), modules))
    descriptor = os.memfd_create("microvm-initrd", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            for archive in archives:
                file.write(archive)
                file.write(b"\0" * (-len(archive) % 512))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def launch(config: SandboxConfig, progress: Progress | None = None) -> _microvm.Sandbox:
    """Starts the machine that ``config`` describes and waits until it takes commands."""
    backend = _microvm.detect_backend()
    _microvm.check_spec(config.cpus, config.memory, config.cmdline, config.profile_us, backend.max_cpus)
    vmm = vmm_path()
    descriptors: list[int] = []
    try:
        kernel_path = choose_kernel(config, backend, progress)
        kernel = _open(kernel_path, "kernel")
        descriptors.append(kernel)
        root_path = root_image(config, progress)
        root = _open(root_path, "rootfs")
        descriptors.append(root)
        initrd = _initrd(config.initrd, kernel_modules(kernel_path))
        descriptors.append(initrd)
        return _microvm.Sandbox.launch(
            vmm,
            kernel,
            initrd,
            [(root, True)],
            config.cpus,
            config.memory,
            _command_line(config.cmdline, root_path),
            config.console,
            config.profile_us,
            config.boot_timeout,
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
