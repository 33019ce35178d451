"""Many machines in a row leave no process, descriptor, mapping or file behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm


def possessions() -> tuple[Counter[str], int, str]:
    """What this process has: descriptors by kind, threads, children. Waits until its machines' processes are reaped."""
    deadline = time.monotonic() + 5
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while (children.read_text() or len(os.listdir("/proc/self/task")) > 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    kinds: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            kinds[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
        except OSError:
            continue
    return kinds, len(os.listdir("/proc/self/task")), children.read_text()


SCRIPT = """
import microvm, test_leaks
microvm.run(["true"], memory="128M")
before = test_leaks.possessions()
for _ in range(5):
    assert microvm.run(["echo", "x"], memory="128M").stdout == "x\\n"
after = test_leaks.possessions()
assert after == before, (before, after)
"""


def test_sandboxes_in_a_row_leave_nothing_in_this_process() -> None:
    # In a process of its own: this one may have another test's machine.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.soak
def test_two_hundred_runs_leave_nothing_on_the_machine() -> None:
    def everything() -> tuple[set[str], set[str]]:
        files = {str(path) for folder in ("/tmp", "/dev/shm") for path in Path(folder).glob("*microvm*")}
        processes = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            # A process whose parent is gone is a zombie until the first process of this machine gets round to it.
            if name.startswith("microvm") and rest.split()[0] != "Z":
                processes.add(folder.name)
        return files, processes

    before = everything()
    for number in range(200):
        result = subprocess.run(
            [sys.executable, "-m", "microvm", "run", "--", "true"], capture_output=True, timeout=60, check=False
        )
        assert (number, result.returncode, result.stdout, result.stderr) == (number, 0, b"", b"")
    deadline = time.monotonic() + 10
    while everything()[1] - before[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    files, processes = everything()
    assert (files - before[0], processes - before[1]) == (set(), set())
