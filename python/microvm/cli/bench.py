"""``microvm bench``: figures of this installation, each beside something a reader knows, measured in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from microvm.benchmarks import Figure

__all__ = ["bench"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure this installation against what you know."""


def _command(name: str, default: int, text: str) -> None:
    """Adds one benchmark; its code is loaded when it runs."""

    @bench.command(name, help=text, short_help=text.partition(".")[0] + ".")
    @click.option("-n", "repetitions", type=click.IntRange(1, 10000), default=default, show_default=True)
    @click.option("--json", "as_json", is_flag=True, help="As JSON.")
    def command(repetitions: int, as_json: bool) -> None:
        from microvm import benchmarks
        from microvm.cli.report import write_json

        measure: Callable[[int], list[Figure]] = getattr(benchmarks, f"measure_{name}")
        figures = measure(repetitions)
        if as_json:
            write_json({"machine": benchmarks.machine(), "figures": [figure.as_dict() for figure in figures]})
            return
        for figure in figures:
            print(figure.line(figures[0]))
        print(
            "x: the first line's median over this one's; on "
            + ", ".join(f"{value}" for value in benchmarks.machine().values())
        )


_command(
    "boot", 20, "From the start of the machine's process to the agent's first words. Beside it: QEMU, where installed."
)
_command("run", 20, "From the start of `microvm run -- echo` to its first byte. Beside it: echo without a machine.")
_command("exec", 100, "A further command in a running machine. Beside it: the same with subprocess.")
_command("import", 10, "import microvm in a new interpreter. Beside it: an interpreter that imports nothing.")


@bench.command(short_help="Programs in a machine, under QEMU and on the host.")
@click.option("-n", "repetitions", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--without-qemu", is_flag=True, help="Leave out QEMU, which takes minutes.")
@click.option("--rootfs", type=click.Path(exists=True), help="The userland of both machines.")
def guest(repetitions: int, as_json: bool, without_qemu: bool, rootfs: str | None) -> None:
    """System calls, faults, forks, signals, timers and programs in a machine. Beside it: QEMU's interpreter with the
    same userland, where installed, and the host. Figures end in their units; needs a C compiler."""
    from microvm import benchmarks, guest_bench
    from microvm.cli.report import write_json

    report = guest_bench.measure(repetitions, with_qemu=not without_qemu, rootfs=rootfs)
    if as_json:
        write_json({"machine": benchmarks.machine(), **report.as_dict()})
        return
    for line in report.lines():
        print(line)
    print("x: how many times as long as in the machine; on " + ", ".join(map(str, benchmarks.machine().values())))
