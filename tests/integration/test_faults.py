"""When something dies in the middle of a command, the call ends within a second, with the reason and the console."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import microvm
from microvm.exceptions import SandboxExited, VmCrashed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kvm

#: Overwrites the code of the guest's first process, which then dies of its next instruction.
CORRUPT_AGENT = """
import re
for line in open("/proc/1/maps"):
    start, end, flags = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
    if "x" in flags and "[" not in line:
        with open("/proc/1/mem", "r+b", buffering=0) as memory:
            memory.seek(int(start, 16))
            memory.write(b"\\xf4" * (int(end, 16) - int(start, 16)))
"""


@pytest.fixture
def machine() -> Iterator[microvm.Sandbox]:
    """A machine that a test may destroy."""
    with microvm.Sandbox(memory="256M") as sandbox:
        yield sandbox


def vmm_processes() -> list[int]:
    """The machines' processes that are children of this one."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if name.startswith("microvm-vmm") and int(parent) == os.getpid() and state != "Z":
            found.append(int(pid))
    return found


def end_while_running(machine: microvm.Sandbox, end: Callable[[], object]) -> tuple[BaseException, float]:
    """Runs a command that never ends, calls `end`; returns the error, and how long it took to come."""
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def command() -> object:
            started.set()
            return machine.run(["sleep", "1000"])

        pending = pool.submit(command)
        assert started.wait(5)
        time.sleep(0.3)
        start = time.monotonic()
        end()
        error = pending.exception(timeout=30)
    assert error is not None
    return error, time.monotonic() - start


def test_killed_vmm_ends_the_call_and_names_the_signal(machine: microvm.Sandbox) -> None:
    before = vmm_processes()
    with microvm.Sandbox(memory="256M") as victim:
        (pid,) = set(vmm_processes()) - set(before)
        error, seconds = end_while_running(victim, lambda: os.kill(pid, signal.SIGKILL))
    assert isinstance(error, VmCrashed)
    assert error.signal == signal.SIGKILL
    assert seconds < 1
    assert machine.run(["echo", "alive"]).stdout == "alive\n"


def test_guest_that_panics_ends_the_call_with_the_console(machine: microvm.Sandbox) -> None:
    def panic() -> None:
        with pytest.raises(SandboxExited):
            machine.run(["sh", "-c", "echo 2 > /proc/sys/vm/panic_on_oom; exec tail /dev/zero"])

    error, _ = end_while_running(machine, panic)
    assert isinstance(error, SandboxExited)
    assert "Kernel panic" in (error.log_tail or "")


def test_dead_agent_ends_the_call_with_the_console(machine: microvm.Sandbox) -> None:
    def corrupt() -> None:
        with pytest.raises(SandboxExited):
            machine.run(["python3", "-c", CORRUPT_AGENT])

    error, _ = end_while_running(machine, corrupt)
    assert isinstance(error, SandboxExited)
    assert "Attempted to kill init" in (error.log_tail or "")


def test_call_after_the_end_says_so(machine: microvm.Sandbox) -> None:
    machine.kill()
    start = time.monotonic()
    with pytest.raises(SandboxExited):
        machine.run(["true"])
    assert time.monotonic() - start < 1
    assert machine.status == "ended"


def test_stop_in_order_ends_running_commands(machine: microvm.Sandbox) -> None:
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(machine.run, ["sleep", "1000"])
        time.sleep(0.3)
        start = time.monotonic()
        machine.stop(timeout=5)
        # The command dies of the agent's signal, and whether that is still reported depends on who is faster.
        error = pending.exception(timeout=5)
        assert isinstance(error, SandboxExited) or pending.result().returncode == -signal.SIGTERM
        assert time.monotonic() - start < 5
    assert machine.status == "ended"


def test_fork_cannot_use_the_parents_machine(machine: microvm.Sandbox) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # A child of a test run must never return into it.
        try:
            machine.run(["true"])
            os.write(write, b"ran")
        except microvm.MicrovmError as error:
            os.write(write, error.code.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() not in (b"", b"ran")
    assert machine.run(["echo", "alive"]).stdout == "alive\n"


def test_many_commands_at_once_keep_their_outputs_apart(machine: microvm.Sandbox) -> None:
    def command(number: int) -> str:
        return machine.run(["sh", "-c", f"for i in 1 2 3; do echo {number}; done"]).stdout

    with ThreadPoolExecutor(16) as pool:
        outputs = list(pool.map(command, range(48)))
    assert outputs == [f"{number}\n" * 3 for number in range(48)]
