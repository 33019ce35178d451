"""Virtual machines without devices, in this process: memory, vCPUs, and what the guest does as Python values.

    from microvm.vm import Halt, IoOut, Vm

    vm = Vm(memory="1M")
    vm.load(0x1000, bytes.fromhex("b0 2a e6 10 f4"))   # mov al, 42; out 0x10, al; hlt
    vcpu = vm.vcpu(0)
    vcpu.enter_real_mode(0x1000)
    assert vcpu.run(timeout=1) == IoOut(0x10, b"*", 1)
    assert vcpu.run(timeout=1) == Halt()

A guest that must be kept away from this process belongs into a :class:`microvm.Sandbox`. Here the process is the
hypervisor: a machine does not survive it, and belongs to it alone (in a child of ``fork``, every use raises). The
interpreter is free for other threads while guest code runs, and Ctrl-C ends :meth:`Vcpu.run`. To get a vCPU out of
guest code, a real-time signal is used (``SIGRTMIN + 3``, or ``kick_signal``), whose handler does nothing.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from microvm import _microvm
from microvm._microvm import (
    Debug,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
    Timeout,
    Unexpected,
)
from microvm.config import parse_duration, parse_size
from microvm.exceptions import ConfigError

if TYPE_CHECKING:
    from microvm.config import Duration, Size

__all__ = [
    "Debug",
    "Exit",
    "FailEntry",
    "Halt",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "Memory",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Regs",
    "Segment",
    "Shutdown",
    "Sregs",
    "SystemEvent",
    "Table",
    "Timeout",
    "Unexpected",
    "Vcpu",
    "Vm",
]

#: What :meth:`Vcpu.run` returns.
Exit: TypeAlias = (
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

_PAGE = 4096
_PRESENT_WRITABLE = 0b11
_LARGE_PAGE = 1 << 7
_TWO_MIB = 2 << 20

_CR0_PE = 1 << 0
_CR0_NE = 1 << 5
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10


@dataclass(frozen=True, slots=True)
class Regs:
    """General registers. A snapshot: change registers with :meth:`Vcpu.set_regs`."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register, with what the processor keeps of its descriptor."""

    base: int = 0
    limit: int = 0xFFFF_FFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the architecture's name for "64-bit code"
    g: int = 1
    avl: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A descriptor table register."""

    base: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Sregs:
    """Segments, tables and control registers. A snapshot: change them with :meth:`Vcpu.set_sregs`."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Table
    idt: Table
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


class Memory:
    """Guest memory, from address 0; above 3 GiB it goes on at 4 GiB."""

    __slots__ = ("_vm",)

    def __init__(self, vm: _microvm.Vm) -> None:
        self._vm = vm

    def __len__(self) -> int:
        return self._vm.size

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes; ConfigError if they are not all memory."""
        return self._vm.read(_unsigned(address, "address"), _unsigned(length, "length"))

    def write(self, address: int, data: bytes) -> None:
        """Writes all of ``data``, or raises ConfigError and writes nothing."""
        self._vm.write(_unsigned(address, "address"), bytes(data))


class Vm:
    """A machine with ``memory`` (bytes or ``"16M"``) and ``cpus`` vCPUs, without interrupt controllers or devices."""

    def __init__(self, memory: Size, *, cpus: int = 1, kick_signal: int | None = None) -> None:
        if not 1 <= cpus <= 255:
            raise ConfigError("cpus", cpus, "1 to 255")
        self._vm = _microvm.Vm(parse_size(memory, "memory"), cpus, kick_signal)
        self._vcpus: dict[int, Vcpu] = {}
        self.memory = Memory(self._vm)

    def load(self, address: int, data: bytes) -> None:
        """Puts a program (or anything) into memory: another word for ``memory.write``."""
        self.memory.write(address, data)

    def vcpu(self, index: int) -> Vcpu:
        """vCPU ``index``, made when it is first asked for, in the state of a PC after power-on."""
        if index not in self._vcpus:
            if not 0 <= index <= 255:
                raise ConfigError("index", index, "0 to 255")
            self._vcpus[index] = Vcpu(self._vm.vcpu(index), self.memory, index)
        return self._vcpus[index]


class Vcpu:
    """One virtual CPU. One thread at a time uses it; any other may :meth:`kick` it."""

    def __init__(self, vcpu: _microvm.Vcpu, memory: Memory, index: int) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self.index = index

    def run(self, timeout: Duration | None = None) -> Exit:
        """Runs guest code until something happens that the host must see, and returns that.

        After :class:`IoIn` and :class:`MmioRead`, say with :meth:`answer` what the guest reads; otherwise it
        reads ones. :class:`Timeout` when the time is over; the guest goes on with the next call.
        """
        return self._vcpu.run(None if timeout is None else parse_duration(timeout))

    def answer(self, data: bytes) -> None:
        """What the guest's read returns: exactly as many bytes as it asked for, before the next :meth:`run`."""
        self._vcpu.answer(bytes(data))

    def kick(self) -> None:
        """From any thread: makes :meth:`run` return :class:`Interrupted`, now or when it is next called."""
        self._vcpu.kick()

    @property
    def regs(self) -> Regs:
        """The general registers as they are now."""
        return Regs(*self._vcpu.regs())

    @regs.setter
    def regs(self, regs: Regs) -> None:
        self._vcpu.set_regs([_unsigned(value, name) for name, value in zip(Regs.__slots__, astuple(regs), strict=True)])

    def set_regs(self, **registers: int) -> None:
        """Changes the named registers: ``vcpu.set_regs(rip=0x1000, rflags=2)``."""
        self.regs = replace(self.regs, **registers)

    @property
    def sregs(self) -> Sregs:
        """Segments, tables and control registers as they are now."""
        segments, tables, control = self._vcpu.sregs()
        values: list[Any] = [*(Segment(*each) for each in segments), *(Table(*each) for each in tables), *control]
        return Sregs(*values)

    @sregs.setter
    def sregs(self, sregs: Sregs) -> None:
        values = [getattr(sregs, name) for name in Sregs.__slots__]
        segments: list[Any] = [astuple(each) for each in values[:8]]
        self._vcpu.set_sregs(segments, [(table.base, table.limit) for table in values[8:10]], values[10:])

    def set_sregs(self, **registers: Any) -> None:
        """Changes the named registers: ``vcpu.set_sregs(cr3=0x1000)``."""
        self.sregs = replace(self.sregs, **registers)

    def translate(self, address: int) -> int | None:
        """Guest physical address of a virtual one, by the vCPU's page tables; ``None`` if it is not mapped."""
        return self._vcpu.translate(_unsigned(address, "address"))

    def enter_real_mode(self, rip: int, *, rsp: int = 0) -> None:
        """Sets the vCPU to 16-bit code at ``rip`` (below 64 KiB), all segments from 0."""
        flat = {name: replace(getattr(self.sregs, name), base=0, selector=0) for name in ("cs", "ds", "es", "ss")}
        self.set_sregs(**flat)
        self.regs = Regs(rip=rip, rsp=rsp)

    def enter_long_mode(self, rip: int, *, rsp: int = 0, page_tables: int = 0x1000) -> None:
        """Sets the vCPU to 64-bit code at ``rip``, CPL 0, interrupts off.

        Three pages at ``page_tables`` are overwritten: they map the first GiB onto itself.
        """
        if page_tables % _PAGE:
            raise ConfigError("page_tables", hex(page_tables), "a multiple of 4096")
        directory_pointers, directory = page_tables + _PAGE, page_tables + 2 * _PAGE
        entries = [index * _TWO_MIB | _PRESENT_WRITABLE | _LARGE_PAGE for index in range(512)]
        self._memory.write(page_tables, _table_page([directory_pointers | _PRESENT_WRITABLE]))
        self._memory.write(directory_pointers, _table_page([directory | _PRESENT_WRITABLE]))
        self._memory.write(directory, _table_page(entries))
        data = Segment(selector=0x10, type=3, db=1)
        self.set_sregs(
            cs=Segment(selector=0x08, type=11, l=1),
            ds=data,
            es=data,
            fs=data,
            gs=data,
            ss=data,
            cr0=_CR0_PE | _CR0_NE | _CR0_PG,
            cr3=page_tables,
            cr4=_CR4_PAE,
            efer=_EFER_LME | _EFER_LMA,
        )
        self.regs = Regs(rip=rip, rsp=rsp)


def _table_page(entries: list[int]) -> bytes:
    return b"".join(entry.to_bytes(8, "little") for entry in entries).ljust(_PAGE, b"\0")


def _unsigned(value: int, name: str) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ConfigError(name, repr(value), "0 to 2**64 - 1")
    return value
