"""What ``microvm bench`` measures: wall-clock seconds; the median is compared, the minimum shown beside it."""

from __future__ import annotations

import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microvm import _microvm, environment
from microvm.config import SandboxConfig
from microvm.exceptions import MicrovmError
from microvm.launch import agent_path, kernel_modules, launch
from microvm.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Figure", "machine", "measure_boot", "measure_exec", "measure_import", "measure_run"]

#: A guest that has said nothing after this long will not.
_PATIENCE = 120.0
_MEMORY = "512M"


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was timed."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n": len(self.seconds),
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
        }

    def line(self, reference: Figure) -> str:
        """One line for a person: how many times as long as this ``reference`` takes."""
        ratio = "" if self is reference else f" (x {reference.median / self.median:.2f})"
        return f"{1e3 * self.median:9.2f} ms median, {1e3 * min(self.seconds):9.2f} ms least: {self.name}{ratio}"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    try:
        backend = _microvm.detect_backend().kind + " KVM"
    except MicrovmError:
        backend = "no KVM"
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "cpus": f"{os.cpu_count()} CPUs",
        "backend": backend,
        "system": f"Linux {platform.release()}",
        "python": f"Python {platform.python_version()}",
    }


def _timed(action: Callable[[], object], repetitions: int) -> list[float]:
    """Each repetition's seconds, after one that is not counted."""
    seconds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def measure_boot(repetitions: int) -> list[Figure]:
    """VMM start to vCPU start and to the agent's words; beside it QEMU with the hardware kernel."""
    config = SandboxConfig.of(memory=_MEMORY)
    launch(config).kill()
    timings = []
    for _ in range(repetitions):
        sandbox = launch(config)
        timings.append(sandbox.timings)
        sandbox.kill()
    figures = [
        Figure("microvm: VMM start to agent ready", [ready for _, _, ready, _ in timings]),
        Figure("microvm: VMM start to vCPU running", [started for _, started, _, _ in timings]),
        Figure("microvm: launch to agent ready", [launched for _, _, _, launched in timings]),
    ]
    qemu = _measure_qemu(max(1, min(repetitions, 5)))
    return figures if qemu is None else [*figures, qemu]


def _measure_qemu(repetitions: int) -> Figure | None:
    """QEMU's microvm machine, with KVM where that is the processor's: its start to the agent's words on the console.

    There is no root disk and no vsock device for the agent there, so its first words are a complaint about that:
    less work than ours does until it is ready. ``None`` where QEMU or the hardware kernel is missing.
    """
    hardware = _microvm.detect_backend().kind == "hardware"
    qemu = shutil.which("qemu-system-x86_64")
    # On hardware KVM it boots what ours boots. The ring3 kernel runs on software KVM alone.
    image = environment.get("MICROVM_KERNEL") if hardware else None
    image = image or _hardware_kernel()
    if qemu is None or image is None:
        return None
    accelerator, cpu = ("kvm", "host") if hardware else ("tcg", "max")
    modules = kernel_modules(image)
    # A distribution's kernel finds its devices by ACPI; ours has none.
    acpi = "on" if modules else "off"
    with tempfile.NamedTemporaryFile() as initrd, open(agent_path(), "rb") as agent:
        initrd.write(_microvm.initramfs(agent.read(), modules))
        initrd.flush()
        command = [
            *(qemu, "-M", f"microvm,acpi={acpi},rtc=on", "-accel", accelerator, "-cpu", cpu, "-m", _MEMORY),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", image, "-initrd", initrd.name),
            *("-append", "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t 8250.nr_uarts=1"),
        ]
        name = f"QEMU ({accelerator}): start to agent's words"
        return Figure(name, [_first_words(command) for _ in range(repetitions)])


def _hardware_kernel() -> str | None:
    from microvm import kernel

    # One built from older sources boots as fast.
    found = kernel.find("hardware") or next((each for each in kernel.ls() if each.flavour == "hardware"), None)
    return None if found is None else os.fspath(found)


def _first_words(command: list[str]) -> float:
    """Seconds until a program's output names the agent."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            seen = b""
            while b"microvm-agent" not in seen:
                left = _PATIENCE - (time.perf_counter() - begin)
                readable, _, _ = select.select([process.stdout], [], [], max(0.0, left))
                chunk = os.read(process.stdout.fileno(), 4096) if readable else b""
                if not chunk:
                    raise MicrovmError(f"QEMU ended without the agent's words: {seen[-500:]!r}")
                seen += chunk
            return time.perf_counter() - begin
        finally:
            process.kill()


def measure_run(repetitions: int) -> list[Figure]:
    """Process start to the first byte of a command's output, in a new machine and without one."""
    run = [sys.executable, "-m", "microvm", "run", "-m", _MEMORY, "--", "echo", "x"]
    python = [sys.executable, "-c", "print('x')"]
    return [
        Figure("microvm run -- echo x: start to first byte", _first_bytes(run, repetitions)),
        Figure("python3 -c 'print(\"x\")' without a machine", _first_bytes(python, repetitions)),
        Figure("echo x without a machine", _first_bytes(["echo", "x"], repetitions)),
    ]


def _first_bytes(command: list[str], repetitions: int) -> list[float]:
    seconds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            first = os.read(process.stdout.fileno(), 1)
            seconds.append(time.perf_counter() - begin)
            # To the end: a command whose output is closed dies of it.
            process.stdout.read()
        if first != b"x" or process.returncode:
            raise MicrovmError(f"{command} did not print x, or failed ({process.returncode})")
    return seconds[1:]


def measure_exec(repetitions: int) -> list[Figure]:
    """One more command in a machine that runs already, and with subprocess."""
    true = ["true"]
    with Sandbox(memory=_MEMORY) as sandbox:
        in_machine = _timed(lambda: sandbox.run(true, check=True), repetitions)
    on_host = _timed(lambda: subprocess.run(true, check=True, capture_output=True), repetitions)
    return [Figure("sandbox.run(['true'])", in_machine), Figure("subprocess.run(['true'])", on_host)]


def measure_import(repetitions: int) -> list[Figure]:
    """A new interpreter that imports the package, and one that does not."""

    def interpreter(statement: str) -> list[float]:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", statement]
        return _timed(lambda: subprocess.run(command, check=True, env=variables), repetitions)

    return [
        Figure("python -c 'import microvm'", interpreter("import microvm")),
        Figure("python -c 'import microvm; microvm.run'", interpreter("import microvm; microvm.run")),
        Figure("python -c 'import subprocess'", interpreter("import subprocess")),
        Figure("python -c pass", interpreter("pass")),
    ]
