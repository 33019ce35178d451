"""The extension module (rust/python): conversion, signal checks and errors, nothing else. Private to the package."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, final

__all__ = [
    "Backend",
    "Debug",
    "Exited",
    "FailEntry",
    "Halt",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Sandbox",
    "Shutdown",
    "SignalSender",
    "SystemEvent",
    "Timeout",
    "Unexpected",
    "Vcpu",
    "Vm",
    "__version__",
    "check_spec",
    "default_image",
    "detect_backend",
    "directory_image",
    "initramfs",
    "kernel_modules",
    "kernel_release",
]

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

def kernel_release(path: str, /) -> str | None:
    """The release (``uname -r``) that a bzImage states; ``None`` for an ELF file."""

def kernel_modules(root: str, release: str, wanted: list[str], /) -> list[tuple[str, bytes]]:
    """The wanted modules that are not built in, and what they depend on, in loading order."""

def initramfs(agent: bytes, modules: list[tuple[str, bytes]], /) -> bytes:
    """An archive with the agent as ``/init`` and the modules it loads first."""

def default_image(
    cache: str,
    executable: str,
    standard_library: list[str],
    cache_tag: str,
    progress: Callable[[int, int], object] | None = None,
    /,
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
        """Starts a machine, waits for its agent. ``drives``: (descriptor, read_only); descriptors are duplicated."""

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
    def status(self) -> Literal["running", "ended", "crashed"]: ...
    @property
    def kernel(self) -> str: ...
    @property
    def timings(self) -> tuple[float, float, float, float]:
        """Seconds: launch to spawned, VMM's start to vCPUs running and to agent ready, launch to its end."""

    def console_tail(self) -> bytes: ...
    def profile(self) -> list[tuple[int, int]]: ...

_Segment: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int]

@final
class Vm:
    """A machine without devices, in this process."""

    def __new__(cls, memory: int, cpus: int, kick_signal: int | None) -> Vm: ...
    @property
    def size(self) -> int: ...
    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def vcpu(self, index: int) -> Vcpu: ...

@final
class Vcpu:
    """One virtual CPU; one thread at a time."""

    def run(self, timeout: float | None) -> _Exit: ...
    def answer(self, data: bytes) -> None: ...
    def kick(self) -> None: ...
    def regs(self) -> list[int]: ...
    def set_regs(self, regs: Sequence[int]) -> None: ...
    def sregs(self) -> tuple[list[_Segment], list[tuple[int, int]], list[int]]: ...
    def set_sregs(
        self, segments: Sequence[_Segment], tables: Sequence[tuple[int, int]], control: Sequence[int]
    ) -> None: ...
    def translate(self, address: int) -> int | None: ...

@final
class IoIn:
    """The guest reads a port; answer with ``size * count`` bytes."""

    __match_args__ = ("port", "size")
    def __new__(cls, port: int, size: int, count: int) -> IoIn: ...
    @property
    def port(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class IoOut:
    """The guest writes a port; several values of ``size`` bytes for ``rep outs``."""

    __match_args__ = ("port", "data")
    def __new__(cls, port: int, data: bytes, size: int) -> IoOut: ...
    @property
    def port(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    @property
    def size(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class MmioRead:
    """The guest reads where there is no memory; answer with ``size`` bytes."""

    __match_args__ = ("address", "size")
    def __new__(cls, address: int, size: int) -> MmioRead: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class MmioWrite:
    """The guest writes where there is no memory."""

    __match_args__ = ("address", "data")
    def __new__(cls, address: int, data: bytes) -> MmioWrite: ...
    @property
    def address(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Halt:
    """HLT."""

    __match_args__ = ()
    def __new__(cls) -> Halt: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Shutdown:
    """Triple fault."""

    __match_args__ = ()
    def __new__(cls) -> Shutdown: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class SystemEvent:
    """The guest asked KVM for an end or a reset."""

    __match_args__ = ("kind",)
    def __new__(cls, kind: int) -> SystemEvent: ...
    @property
    def kind(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Debug:
    """A breakpoint or single step of the host."""

    __match_args__ = ("address", "exception")
    def __new__(cls, address: int, exception: int) -> Debug: ...
    @property
    def address(self) -> int: ...
    @property
    def exception(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class InternalError:
    """KVM cannot go on with this guest."""

    __match_args__ = ("suberror", "message")
    def __new__(cls, suberror: int, data: list[int], instruction: bytes | None, message: str) -> InternalError: ...
    @property
    def suberror(self) -> int: ...
    @property
    def data(self) -> list[int]: ...
    @property
    def instruction(self) -> bytes | None: ...
    @property
    def message(self) -> str: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class FailEntry:
    """The processor refused the guest's state."""

    __match_args__ = ("reason",)
    def __new__(cls, reason: int, cpu: int) -> FailEntry: ...
    @property
    def reason(self) -> int: ...
    @property
    def cpu(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class MemoryFault:
    """Guest memory could not be given."""

    __match_args__ = ("address", "size")
    def __new__(cls, flags: int, address: int, size: int) -> MemoryFault: ...
    @property
    def flags(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Interrupted:
    """``kick`` was called, or a signal came whose handler did not raise."""

    __match_args__ = ()
    def __new__(cls) -> Interrupted: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Timeout:
    """The time given to ``run`` is over."""

    __match_args__ = ()
    def __new__(cls) -> Timeout: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Unexpected:
    """An exit that this library never asks for."""

    __match_args__ = ("what",)
    def __new__(cls, what: str) -> Unexpected: ...
    @property
    def what(self) -> str: ...
    def __eq__(self, other: object, /) -> bool: ...

_Exit: TypeAlias = (
    IoIn
    | IoOut
    | MmioRead
    | MmioWrite
    | Halt
    | Shutdown
    | SystemEvent
    | Debug
    | InternalError
    | FailEntry
    | MemoryFault
    | Interrupted
    | Timeout
    | Unexpected
)
