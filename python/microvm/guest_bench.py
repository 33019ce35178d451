"""``microvm bench guest``: how fast programs are in a machine, beside QEMU's interpreter and the host.

The program that measures is ``guests/bench/guestbench.c``, compiled when it is needed; the userland is one image for
both machines. QEMU runs our ``hardware`` kernel, which is stock Linux, on its ``microvm`` machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microvm import _microvm, environment, kernel
from microvm.config import SandboxConfig
from microvm.exceptions import MicrovmError
from microvm.launch import launch, root_image
from microvm.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Report", "measure"]

_MEMORY = "512M"
#: A guest that has not finished after this many seconds will not.
_PATIENCE = 900.0
#: QEMU takes long, and its figures are steady.
_MOST_UNDER_QEMU = 3
#: Compiler and flags; the program is the same everywhere.
_COMPILER = ("cc", "-O2", "-std=gnu11", "-static")
#: Where it is in the machine, whose /tmp is nobody else's.
_IN_MACHINE = "/tmp/guestbench"  # noqa: S108
_PLACES = ("microvm", "qemu", "host")

Figures = dict[str, list[float]]


@dataclass
class Report:
    """What was measured: for each place the values of each figure, in the unit that ends its name."""

    userland: str
    figures: dict[str, Figures] = field(default_factory=dict)
    #: Why a figure, or all of a place, is missing.
    skipped: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        found = self.figures["microvm"]
        return ["boot_ms", "init_ms", *(name for name in found if name not in ("boot_ms", "init_ms", "user_loop_ms"))]

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for name in self.names():
            row: dict[str, Any] = {"name": name, **_summary(self.figures["microvm"][name])}
            for place in _PLACES[1:]:
                if values := self.figures.get(place, {}).get(name):
                    row[place] = {**_summary(values), "ratio": _ratio(self.figures["microvm"][name], values)}
            rows.append(row)
        return {"userland": self.userland, "figures": rows, "skipped": self.skipped}

    def lines(self) -> list[str]:
        """A table for a person: medians, and how many times as long as in the machine it takes elsewhere."""
        lines = [f"{'median':<20}{'microvm':>10}{'QEMU TCG':>12}{'x':>8}{'host':>12}{'x':>8}"]
        for row in self.as_dict()["figures"]:
            line = f"{row['name']:<20}{row['median']:>10.2f}"
            for place in _PLACES[1:]:
                other = row.get(place)
                line += f"{other['median']:>12.2f}{other['ratio']:>8.2f}" if other else f"{'-':>12}{'':>8}"
            lines.append(line)
        lines += [f"{name}: {reason}" for name, reason in self.skipped.items()]
        return [*lines, f"userland: {self.userland}"]


def _summary(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(theirs) / statistics.median(ours)


def measure(repetitions: int, *, with_qemu: bool = True, rootfs: str | None = None) -> Report:
    """Measures everything, ``repetitions`` times each, in a machine, under QEMU and, without the programs, here."""
    if rootfs is None:
        rootfs = _userland()
    report = Report(rootfs or "the default image")
    with tempfile.TemporaryDirectory(prefix="microvm-bench-") as directory:
        program = _compile(Path(directory))
        report.figures["host"] = _on_host(program, repetitions)
        report.figures["microvm"] = _in_machine(program, repetitions, rootfs, report.skipped)
        if with_qemu and (qemu := _qemu(report.skipped)):
            image = root_image(SandboxConfig.of(rootfs=rootfs))
            report.figures["qemu"] = _under_qemu(qemu, program, image, min(repetitions, _MOST_UNDER_QEMU))
    for place, figures in report.figures.items():
        if place != "host":
            figures["user_loop_ratio"] = [min(figures["user_loop_ms"]) / min(report.figures["host"]["user_loop_ms"])]
    return report


def _userland() -> str | None:
    """The tree that ``tests/guest/build-tree`` makes, which has a compiler and git, where it was made."""
    tree = os.path.join(environment.cache_directory(), "trees", "torture")
    return tree if os.path.isdir(tree) else None


def _compile(directory: Path) -> Path:
    package = Path(__file__).resolve().parent
    places = [package / "_bundle" / "bench-source", package.parents[1] / "guests" / "bench"]
    source = next((place / "guestbench.c" for place in places if (place / "guestbench.c").is_file()), None)
    if source is None:
        raise MicrovmError("this installation lacks guests/bench/guestbench.c", hint="run it in a source tree")
    if shutil.which(_COMPILER[0]) is None:
        raise MicrovmError("the benchmark needs a C compiler", hint="apt-get install gcc libc6-dev")
    program = directory / "guestbench"
    done = subprocess.run([*_COMPILER, "-o", program, source], capture_output=True, text=True)
    if done.returncode:
        raise MicrovmError(f"guestbench.c does not compile: {done.stderr}", hint="apt-get install gcc libc6-dev")
    return program


def _parse(lines: Iterable[str], skipped: dict[str, str] | None = None) -> Figures:
    """The program's words: one figure a line."""
    figures: Figures = {}
    for line in lines:
        if not line.startswith("{"):
            continue
        words = json.loads(line)
        if "error" in words:
            raise MicrovmError(f"guestbench: {words['error']}")
        if "skipped" in words:
            if skipped is not None:
                skipped[words["name"]] = words["skipped"]
            continue
        figures[words["name"]] = words["values"]
    if "user_loop_ms" not in figures:
        raise MicrovmError("guestbench ended before its time")
    return figures


def _on_host(program: Path, repetitions: int) -> Figures:
    command = [str(program), str(repetitions), "without-programs"]
    return _parse(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines())


def _in_machine(program: Path, repetitions: int, rootfs: str | None, skipped: dict[str, str]) -> Figures:
    config = SandboxConfig.of(memory=_MEMORY, rootfs=rootfs)
    launch(config).kill()
    timings = []
    for _ in range(repetitions):
        machine = launch(config)
        timings.append(machine.timings)
        machine.kill()
    with Sandbox(memory=_MEMORY, rootfs=rootfs) as sandbox:
        install = f"cat >{_IN_MACHINE} && chmod +x {_IN_MACHINE}"
        sandbox.run(["sh", "-c", install], input=program.read_bytes(), text=False, check=True)
        done = sandbox.run([_IN_MACHINE, str(repetitions)], timeout=_PATIENCE)
    if done.returncode:
        raise MicrovmError(f"guestbench failed in the machine: {done.stdout[-500:]}{done.stderr[-500:]}")
    return {
        # From the start of the machine's process, and from that of its vCPU, to the agent's first words.
        "boot_ms": [1e3 * ready for _, _, ready, _ in timings],
        "init_ms": [1e3 * (ready - started) for _, started, ready, _ in timings],
        **_parse(done.stdout.splitlines(), skipped),
    }


def _qemu(skipped: dict[str, str]) -> tuple[str, str] | None:
    """QEMU and the kernel for it, if both are here."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        skipped["qemu"] = "qemu-system-x86_64 is not installed"
        return None
    image = kernel.find("hardware") or _any_hardware_kernel()
    if image is None:
        skipped["qemu"] = "no hardware kernel; build one with `microvm kernel build hardware`"
        return None
    return program, os.fspath(image)


def _any_hardware_kernel() -> str | None:
    """One that other sources made: it is stock Linux all the same."""
    for place in sorted(Path(environment.cache_directory(), "kernels").glob("*/info.json")):
        if json.loads(place.read_text(encoding="utf-8")).get("flavour") == "hardware":
            return str(place.with_name("vmlinux"))
    return None


def _under_qemu(qemu: tuple[str, str], program: Path, image: str, repetitions: int) -> Figures:
    """The program as first process: ``boot_ms`` is from QEMU's start to its first words, before it mounts anything."""
    with tempfile.NamedTemporaryFile() as initrd:
        initrd.write(_microvm.initramfs(program.read_bytes(), []))
        initrd.flush()
        command = [
            *(qemu[0], "-M", "microvm,acpi=off,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", _MEMORY),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-drive", f"file={image},if=none,id=root,format=raw,read-only=on"),
            *("-device", "virtio-blk-device,drive=root", "-kernel", qemu[1], "-initrd", initrd.name, "-append"),
        ]
        # Without the frequency, the guest's only clock would be its own ticks of 4 ms.
        frequency = subprocess.run([program, "tsc"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        words = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t 8250.nr_uarts=1 "
        words += f"tsc=reliable tsc_early_khz={frequency} GUESTBENCH="
        boots = [_boot_qemu([*command, words + "1"]) for _ in range(repetitions)]
        done = subprocess.run(
            [*command, words + str(repetitions)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    if "guestbench: done" not in done.stdout:
        raise MicrovmError(f"guestbench did not finish under QEMU: {done.stdout[-500:]}{done.stderr[-500:]}")
    return {"boot_ms": boots, **_parse(line.strip() for line in done.stdout.splitlines())}


def _boot_qemu(command: list[str]) -> float:
    """Milliseconds from the start to the first process's first words."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = b""
        while b"guestbench: here" not in seen:
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                raise MicrovmError(f"QEMU ended before the guest's first words: {seen[-500:]!r}")
            seen += chunk
        took = time.perf_counter() - begin
        process.kill()
    return 1e3 * took
