"""Bare-metal guests of a few instructions, driven exit by exit from this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvm.exceptions import ConfigError, MicrovmError
from microvm.vm import Halt, Interrupted, IoIn, IoOut, MmioRead, MmioWrite, Regs, Shutdown, Timeout, Vcpu, Vm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm

CODE = 0x8000
MIB = 1 << 20
FOREVER = bytes.fromhex("ebfe")  # jmp .


def guest(code: str | bytes, memory: int = 4 * MIB) -> tuple[Vm, Vcpu]:
    """A machine at the first instruction of ``code``, in 64-bit mode."""
    vm = Vm(memory=memory)
    vm.load(CODE, bytes.fromhex(code) if isinstance(code, str) else code)
    vcpu = vm.vcpu(0)
    vcpu.enter_long_mode(CODE, rsp=0x7000)
    return vm, vcpu


def test_real_mode_guest_writes_a_port_and_halts() -> None:
    vm = Vm(memory="1M")
    vm.load(0x1000, bytes.fromhex("b02a e610 f4"))  # mov al, 42; out 0x10, al; hlt
    vcpu = vm.vcpu(0)
    vcpu.enter_real_mode(0x1000)

    assert vcpu.run(timeout=5) == IoOut(0x10, b"*", 1)
    assert vcpu.run(timeout=5) == Halt()
    assert vcpu.regs.rax & 0xFF == 42


def test_exits_match_patterns() -> None:
    _, vcpu = guest("b02a e610 f4")
    match vcpu.run(timeout=5):
        case IoOut(port, data):
            assert (port, data) == (0x10, b"*")
        case other:
            pytest.fail(f"{other!r}")


def test_port_read_gets_the_answer() -> None:
    _, vcpu = guest("e442 e643 f4")  # in al, 0x42; out 0x43, al; hlt
    assert vcpu.run(timeout=5) == IoIn(0x42, 1, 1)
    vcpu.answer(b"\x07")
    assert vcpu.run(timeout=5) == IoOut(0x43, b"\x07", 1)


def test_port_read_without_an_answer_gets_ones() -> None:
    _, vcpu = guest("e442 e643 f4")
    vcpu.run(timeout=5)
    assert vcpu.run(timeout=5) == IoOut(0x43, b"\xff", 1)


def test_answer_of_the_wrong_length_or_twice_is_refused() -> None:
    _, vcpu = guest("e442 f4")
    with pytest.raises(MicrovmError, match="to a read of 0 bytes"):
        vcpu.answer(b"\0")
    vcpu.run(timeout=5)
    with pytest.raises(MicrovmError, match="answer of 2 bytes to a read of 1 bytes"):
        vcpu.answer(b"\0\0")
    vcpu.answer(b"\0")
    with pytest.raises(MicrovmError, match="answer of 1 bytes"):
        vcpu.answer(b"\0")


def test_mmio_read_and_write_carry_address_and_bytes() -> None:
    # mov rbx, [0x10000000]; mov [0x10000008], ebx; hlt
    _, vcpu = guest("488b1c2500000010 891c2508000010 f4")
    assert vcpu.run(timeout=5) == MmioRead(0x1000_0000, 8)
    vcpu.answer(bytes(range(8)))
    assert vcpu.run(timeout=5) == MmioWrite(0x1000_0008, bytes(range(4)))
    assert vcpu.run(timeout=5) == Halt()
    assert vcpu.regs.rbx == int.from_bytes(bytes(range(8)), "little")


def test_guest_writes_are_seen_in_memory() -> None:
    # mov rax, 0x123456789abcdef0; mov [0x12000], rax; hlt
    vm, vcpu = guest("48b8f0debc9a78563412 4889042500200100 f4")
    assert vcpu.run(timeout=5) == Halt()
    assert vm.memory.read(0x12000, 8) == bytes.fromhex("f0debc9a78563412")


def test_triple_fault_is_a_shutdown() -> None:
    _, vcpu = guest("0f0b")  # ud2, without an interrupt table
    vcpu.set_sregs(idt=type(vcpu.sregs.idt)(0, 0))
    assert isinstance(vcpu.run(timeout=5), Shutdown)


@settings(max_examples=50, deadline=None)
@given(left=st.integers(0, 2**64 - 1), right=st.integers(0, 2**64 - 1))
def test_guest_adds_as_python_does(left: int, right: int) -> None:
    _, vcpu = guest("4801d8 f4")  # add rax, rbx; hlt
    vcpu.set_regs(rax=left, rbx=right)
    assert vcpu.run(timeout=5) == Halt()
    assert vcpu.regs.rax == (left + right) % 2**64


@settings(max_examples=50, deadline=None)
@given(regs=st.builds(Regs, **{name: st.integers(0, 2**64 - 1) for name in ("rax", "rsp", "r8", "r15", "rip")}))
def test_registers_are_what_was_set(regs: Regs) -> None:
    vcpu = Vm(memory=MIB).vcpu(0)
    vcpu.regs = regs
    assert vcpu.regs == regs


@settings(max_examples=100, deadline=None)
@given(address=st.integers(0, MIB + 100), data=st.binary(min_size=1, max_size=200))
def test_memory_is_what_was_written_or_the_write_is_refused(address: int, data: bytes) -> None:
    memory = Vm(memory=MIB).memory
    if address + len(data) <= MIB:
        memory.write(address, data)
        assert memory.read(address, len(data)) == data
    else:
        before = memory.read(0, MIB)
        with pytest.raises(ConfigError, match="address is"):
            memory.write(address, data)
        assert memory.read(0, MIB) == before


def test_memory_refuses_what_is_outside() -> None:
    memory = Vm(memory=MIB).memory
    assert len(memory) == MIB
    for address, length in [(MIB, 1), (0, MIB + 1), (2**64 - 1, 2), (0, 2**63)]:
        with pytest.raises(ConfigError, match="address is"):
            memory.read(address, length)
    for address in (-1, 2**64):
        with pytest.raises(ConfigError, match="address is"):
            memory.read(address, 1)


@pytest.mark.parametrize("memory", [0, 1, 4097, "12Q", -4096])
def test_memory_size_out_of_range_is_refused(memory: int | str) -> None:
    with pytest.raises(ConfigError, match="memory is"):
        Vm(memory=memory)


def test_vcpu_of_another_machine_size_is_refused() -> None:
    with pytest.raises(MicrovmError, match="vCPU 1 of a machine with 1"):
        Vm(memory=MIB).vcpu(1)


def test_translate_follows_the_page_tables() -> None:
    _, vcpu = guest(FOREVER)
    assert vcpu.translate(CODE) == CODE
    assert vcpu.translate(1 << 40) is None


def test_run_ends_when_its_time_is_over() -> None:
    _, vcpu = guest(FOREVER)
    begin = time.monotonic()
    assert vcpu.run(timeout=0.25) == Timeout()
    assert 0.25 <= time.monotonic() - begin < 2


def test_kick_from_another_thread_ends_run() -> None:
    _, vcpu = guest(FOREVER)
    timer = threading.Timer(0.2, vcpu.kick)
    timer.start()
    assert vcpu.run(timeout=10) == Interrupted()
    timer.join()


def test_other_threads_run_while_the_guest_does() -> None:
    _, vcpu = guest(FOREVER)
    thread = threading.Thread(target=vcpu.run, args=(0.5,))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
        time.sleep(0.01)
    assert turns > 10


def test_second_thread_in_one_vcpu_is_refused() -> None:
    _, vcpu = guest(FOREVER)
    thread = threading.Thread(target=vcpu.run, args=(5,))
    thread.start()
    time.sleep(0.2)
    with pytest.raises(MicrovmError, match="another thread"):
        vcpu.run(timeout=1)
    with pytest.raises(MicrovmError, match="another thread"):
        vcpu.regs  # noqa: B018 - reading is what is refused
    vcpu.kick()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_ctrl_c_ends_run() -> None:
    _, vcpu = guest(FOREVER)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vcpu.run(timeout=10)
    timer.join()


FORK = """
import os, sys
from microvm.vm import Vm
from microvm.exceptions import MicrovmError
vm = Vm(memory="1M")
vcpu = vm.vcpu(0)
pid = os.fork()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
refused = 0
for use in (lambda: vm.memory.read(0, 1), lambda: vm.memory.write(0, b"x"), lambda: vcpu.run(1), lambda: vcpu.regs,
            lambda: vcpu.kick(), lambda: vcpu.translate(0)):
    try:
        use()
    except MicrovmError as error:
        refused += "belongs to process" in str(error)
os._exit(refused)
"""


def test_use_in_a_forked_child_is_refused() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False)
    assert result.returncode == 6


@pytest.mark.parametrize("make", [lambda: Vm(memory=MIB), lambda: guest(FOREVER)], ids=["machine", "vcpu"])
def test_machines_leave_no_descriptor_behind(make: Callable[[], object]) -> None:
    make()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        make()
    assert len(os.listdir("/proc/self/fd")) == before
