"""The extension module (rust/python): conversion, signal checks and errors, nothing else. Private to the package."""

from collections.abc import Callable
from typing import Literal, final

__version__: str

def check_spec(cpus: int, memory: int, cmdline: str, profile_us: int | None, max_cpus: int | None, /) -> None:
    """Raises ConfigError for the first field outside the machine's limits; ``max_cpus`` is the backend's."""

@final
class Backend:
    """What KVM on this host can do."""

    @property
    def kind(self) -> Literal["hardware", "software"]: ...
    @property
    def flavour(self) -> Literal["hardware", "ring3"]: ...
    @property
    def max_cpus(self) -> int: ...
    @property
    def command_line(self) -> str: ...

def detect_backend() -> Backend:
    """Opens ``/dev/kvm``; raises KvmUnavailable, or the one of its kinds that fits."""

def kernel_release(kernel: int, /) -> str | None:
    """The release (``uname -r``) that a bzImage states; ``None`` for an ELF file."""

def kernel_modules(directory: str, /) -> list[tuple[str, bytes]]:
    """The modules a distribution's kernel needs for its root file system and the agent's link, in loading order."""

def initramfs(agent: bytes, modules: list[tuple[str, bytes]], /) -> bytes:
    """An archive with the agent as ``/init`` and the modules it loads first."""

def default_image(
    cache: str, executable: str, stdlib: list[str], progress: Callable[[int, int], object] | None = None, /
) -> str:
    """Path of the image of the host's userland, made if it is not in the cache."""

def directory_image(cache: str, directory: str, progress: Callable[[int, int], object] | None = None, /) -> str:
    """Path of the image of a directory, made if it is not in the cache."""

@final
class SignalSender:
    """Signals for a command: give it to :meth:`Sandbox.exec`, and call :meth:`send` from anywhere."""

    def __new__(cls) -> SignalSender: ...
    def send(self, signal: int, /) -> None: ...

@final
class Exited:
    """How a command ended. One of ``code``, ``signal`` and ``timed_out`` is set."""

    @property
    def code(self) -> int | None: ...
    @property
    def signal(self) -> int | None: ...
    @property
    def timed_out(self) -> bool: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...
    @property
    def duration(self) -> float: ...

@final
class Sandbox:
    """One machine in a process of its own."""

    @staticmethod
    def launch(
        vmm: str,
        kernel: int,
        initrd: int | None,
        drives: list[tuple[int, bool]],
        cpus: int,
        memory: int,
        cmdline: str,
        console: int | None,
        profile_us: int | None,
        boot_timeout: float,
    ) -> Sandbox:
        """Starts a machine and waits for its agent. ``drives`` are (descriptor, read_only); descriptors are duplicated."""

    def exec(
        self,
        argv: list[bytes],
        env: list[tuple[bytes, bytes]],
        cwd: bytes | None,
        timeout: float | None,
        stdin: bytes | int | None,
        stdout: int | None | Literal[True],
        stderr: int | None | Literal[True],
        signals: SignalSender | None,
    ) -> Exited:
        """Runs a command to its end. ``None`` is /dev/null, an int a descriptor, ``True`` captures."""

    def stop(self, timeout: float) -> None: ...
    def kill(self) -> None: ...
    @property
    def status(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def timings(self) -> tuple[int, int]:
        """Microseconds from the start of the VMM to the running vCPU, and to the agent's first words."""

    def console_tail(self) -> bytes: ...
    def profile(self) -> list[tuple[int, int]]: ...
