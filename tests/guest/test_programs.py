"""What a kernel must survive: programs that press one thing hard, and check it against what they know to be right.

Every program runs on the host first, whose kernel is the oracle for the program itself, and then in a machine, which
must still take commands afterwards. `MICROVM_TORTURE_SECONDS` is how long each runs in the machine (0.6).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import microvm
from microvm.config import SandboxConfig
from microvm.exceptions import MicrovmError
from microvm.launch import launch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microvm.process import CompletedProcess

SOURCES = Path(__file__).parent / "programs"
SECONDS = float(os.environ.get("MICROVM_TORTURE_SECONDS", "0.6"))
HOST_SECONDS = 0.2
#: A file for what was counted.
REPORT = os.environ.get("MICROVM_TORTURE_REPORT")
#: So often is the vCPU of a disturbed machine kicked, in microseconds.
KICK_US = 300
#: They would end other programs of the host, or fill its memory.
ONLY_IN_A_MACHINE = {"killall", "reclaim"}
#: Those that fill the machine's memory have less of it, or they would take long.
MEMORY = {"reclaim": "128M"}
NAMES = sorted(path.stem for path in SOURCES.glob("*.c"))

pytestmark = [
    pytest.mark.timeout(120 + 20 * SECONDS),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the programs, compiled statically."""
    directory = tmp_path_factory.mktemp("programs")

    def compile_one(name: str) -> None:
        options = ["-O1", "-std=gnu11", "-Wall", "-Wextra", "-static", "-pthread"]
        subprocess.run(["cc", *options, "-o", directory / name, SOURCES / f"{name}.c"], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, NAMES))
    return directory


class DisturbedSandbox(microvm.Sandbox):
    """A machine whose vCPU is kicked out of guest mode all the time, at whatever instruction it is."""

    def __init__(self, memory: str) -> None:
        self._timeout = None
        self.config = SandboxConfig.of(memory=memory, profile_us=KICK_US)
        self._machine = launch(self.config)


class Machines:
    """One machine for all programs that need the same, replaced when one of them has ended it."""

    def __init__(self, kind: type[microvm.Sandbox]) -> None:
        self.kind = kind
        self.current: microvm.Sandbox | None = None
        self.memory = ""

    def __call__(self, memory: str) -> microvm.Sandbox:
        if self.memory != memory:
            self.discard()
        if self.current is None or self.current.status != "running":
            self.current = self.kind(memory=memory)
            self.memory = memory
        return self.current

    def discard(self) -> None:
        if self.current is not None:
            self.current.kill()
            self.current = None


@pytest.fixture(scope="module", params=[microvm.Sandbox, DisturbedSandbox], ids=["undisturbed", "disturbed"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    machines = Machines(request.param)
    yield machines
    machines.discard()


def nothing_counted(output: str) -> list[str]:
    """Parts of a program that did nothing. Names that end in a question mark are of parts that may be refused."""
    counts: dict[str, int] = json.loads(output)
    return [name for name, count in counts.items() if count <= 0 and not name.endswith("?")]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_IN_A_MACHINE])
def test_program_on_the_host_finds_nothing_wrong(programs: Path, name: str) -> None:
    done = subprocess.run([programs / name, str(HOST_SECONDS)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert nothing_counted(done.stdout) == []


def run_in(machine: microvm.Sandbox, program: Path, seconds: float) -> CompletedProcess[str]:
    place = f"/tmp/{program.name}"
    install = f"cat >{place} && chmod +x {place}"
    machine.run(["sh", "-c", install], input=program.read_bytes(), text=False, check=True)
    environment = {**machine.config.env, "TORTURE_GUEST": "1"}
    return machine.run([place, str(seconds)], env=environment, timeout=20 + 3 * seconds)


@pytest.mark.kvm
@pytest.mark.parametrize("name", NAMES)
def test_program_in_a_machine_finds_nothing_wrong(programs: Path, machines: Machines, name: str) -> None:
    machine = machines(MEMORY.get(name, "512M"))

    try:
        done = run_in(machine, programs / name, SECONDS)
        alive = machine.run(["sh", "-c", "echo alive; rm /tmp/*"], timeout=20)
    except MicrovmError:
        machines.discard()
        raise

    if REPORT:
        with open(REPORT, "a", encoding="utf-8") as file:
            file.write(f"{machines.kind.__name__} {name} {SECONDS} s: {done.stdout}")
    assert done.returncode == 0, done.stderr
    assert nothing_counted(done.stdout) == []
    assert alive.stdout == "alive\n"


@pytest.mark.kvm
def test_all_programs_at_once_find_nothing_wrong(programs: Path) -> None:
    """All but those that want the machine, or its time, for themselves."""
    names = [name for name in NAMES if name not in ONLY_IN_A_MACHINE and name != "timers"]

    with microvm.Sandbox(memory="1G") as machine, ThreadPoolExecutor(len(names)) as pool:
        done = list(pool.map(lambda name: run_in(machine, programs / name, 3 * SECONDS), names))
        alive = machine.run(["echo", "alive"], timeout=20)

    assert [process.stderr for process in done if process.returncode] == []
    assert alive.stdout == "alive\n"
