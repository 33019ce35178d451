"""``microvm run``: a command in a new virtual machine, as if it were run here."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from microvm.cli import report
from microvm.exceptions import (
    CommandNotFound,
    ConfigError,
    ExecError,
    MicrovmError,
    SandboxExited,
    WorkdirError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from microvm._microvm import Exited, Sandbox
    from microvm.config import SandboxConfig

__all__ = ["run"]

TIMED_OUT = 124
NOT_EXECUTABLE = 126
NOT_FOUND = 127
SIGNALLED = 128

#: Microseconds between two samples of ``--profile``.
PROFILE_US = 1000


class _AfterDashes(click.Command):
    """A command whose words come after ``--``, so that a word before it can be an image one day."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        rest = super().parse_args(ctx, args)
        words: Sequence[str] = ctx.params.get("command") or ()
        if words and "--" not in given[: len(given) - len(words)]:
            raise click.UsageError(f"the command comes after --, as in: microvm run -- {' '.join(words)}", ctx)
        return rest


@click.command(
    cls=_AfterDashes,
    context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]},
    options_metavar="[OPTIONS] --",
)
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment; without a value, this one's.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Lines of NAME=VALUE.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory in the guest; default /.")
@click.option("-c", "--cpus", type=int, default=1, show_default=True, help="vCPUs.")
@click.option("-m", "--memory", default="512M", show_default=True, metavar="SIZE", help="Guest memory.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Kill the command after this; exit code 124.")
@click.option("--rootfs", metavar="DIR|FILE", help="Root file system: a folder, or an EROFS (or .ext4) image.")
@click.option("--kernel", metavar="FILE", help="Guest kernel (vmlinux or bzImage) instead of our own.")
@click.option("--cmdline", default="", metavar="WORDS", help="Added to the kernel's command line.")
@click.option("--initrd", metavar="FILE", help="cpio archive unpacked before our own.")
@click.option("--console", is_flag=True, help="Show the serial console on stderr.")
@click.option("--profile", metavar="FILE", help="Write where the guest kernel spent its time.")
@click.option("--json", "as_json", is_flag=True, help="Capture everything and print one JSON object.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="CMD [ARGS]...")
def run(
    command: tuple[str, ...],
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str | None,
    cpus: int,
    memory: str,
    timeout: float | None,
    rootfs: str | None,
    kernel: str | None,
    cmdline: str,
    initrd: str | None,
    console: bool,
    profile: str | None,
    as_json: bool,
) -> int:
    """Run a command in a new virtual machine.

    Standard input, output and error, exit code and Ctrl-C are the command's own. Other exit codes: 124 time over,
    125 microvm's own error, 126 not executable, 127 not found.
    """
    from microvm.config import SandboxConfig, encode_words, parse_duration

    if not command:
        raise click.UsageError("no command: microvm run -- CMD")
    words = encode_words(command)
    limit = None if timeout is None else parse_duration(timeout)
    config = SandboxConfig.of(
        cpus=cpus,
        memory=memory,
        env=_environment(env, env_file),
        workdir=workdir,
        kernel=kernel,
        cmdline=cmdline,
        initrd=initrd,
        rootfs=rootfs,
        console=2 if console else None,
        profile_us=PROFILE_US if profile else None,
    )
    return _Run(config, words, limit, as_json, profile).to_the_end()


class _Run:
    """One run, and what signals do to it."""

    def __init__(
        self, config: SandboxConfig, words: list[bytes], limit: float | None, as_json: bool, profile: str | None
    ) -> None:
        from microvm._microvm import SignalSender

        self.config = config
        self.words = words
        self.limit = limit
        self.as_json = as_json
        self.profile = profile
        self.signals = SignalSender()
        self.machine: Sandbox | None = None
        self.interrupts: list[int] = []

    def to_the_end(self) -> int:
        from microvm.cli.progress import reporting
        from microvm.launch import launch

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.interrupt)
        with reporting() as progress:
            self.machine = launch(self.config, progress)
        try:
            return self.execute(self.machine)
        except SandboxExited:
            if len(self.interrupts) > 1:
                return SIGNALLED + self.interrupts[-1]
            raise
        finally:
            self.machine.kill()
            if self.profile:
                _write_profile(self.profile, self.config, self.machine.profile())

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C and its like: the first goes to the command, the second ends the machine."""
        self.interrupts.append(number)
        if self.machine is None:
            raise SystemExit(SIGNALLED + number)
        if len(self.interrupts) == 1:
            self.signals.send(number)
        else:
            self.machine.kill()

    def execute(self, machine: Sandbox) -> int:
        from microvm.config import encode_env, encode_path

        capture = True if self.as_json else None
        try:
            exited = machine.exec(
                self.words,
                encode_env(self.config.env),
                encode_path(self.config.workdir, "workdir"),
                self.limit,
                _open_or_none(0),
                capture or _open_or_none(1),
                capture or _open_or_none(2),
                self.signals,
            )
        except ExecError as error:
            return self.refused(error)
        code = _exit_code(exited)
        if self.as_json:
            report.write_json(_as_dict(self.words, exited, machine, code))
        elif exited.timed_out:
            print(f"microvm: timed out after {self.limit:g} s", file=sys.stderr)
        return code

    def refused(self, error: ExecError) -> int:
        """The exit codes of a command that could not be started, as docker has them."""
        report.failure(error.message, error.code, error.hint, None, self.as_json)
        if isinstance(error, WorkdirError):
            return NOT_EXECUTABLE
        if isinstance(error, CommandNotFound):
            return NOT_FOUND
        return report.OWN_ERROR if type(error) is ExecError else NOT_EXECUTABLE


def _exit_code(exited: Exited) -> int:
    if exited.timed_out:
        return TIMED_OUT
    return exited.code if exited.code is not None else SIGNALLED + (exited.signal or 0)


def _open_or_none(descriptor: int) -> int | None:
    """The descriptor, or ``None`` if this process was started without it."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    return descriptor


def _environment(words: tuple[str, ...], files: tuple[str, ...]) -> dict[str, str]:
    """``-e`` and ``--env-file`` as docker reads them; ``TERM`` comes along when there is a terminal."""
    variables: dict[str, str] = {}
    if "TERM" in os.environ and sys.stdout.isatty():
        variables["TERM"] = os.environ["TERM"]
    lines: list[str] = []
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                lines += [line.rstrip("\n") for line in file if line.strip() and not line.lstrip().startswith("#")]
        except OSError as error:
            raise ConfigError("env-file", repr(path), f"a file that can be read ({error.strerror})") from error
    for word in (*lines, *words):
        name, assigned, value = word.partition("=")
        if not name:
            raise ConfigError("env", repr(word), "NAME=VALUE or NAME")
        if assigned:
            variables[name] = value
        elif name in os.environ:
            variables[name] = os.environ[name]
    return variables


def _as_dict(words: list[bytes], exited: Exited, machine: Sandbox, code: int) -> dict[str, Any]:
    _, started, ready, _ = machine.timings
    return {
        "args": [os.fsdecode(word) for word in words],
        "exit_code": code,
        "signal": exited.signal,
        "timed_out": exited.timed_out,
        **_text_or_base64("stdout", exited.stdout),
        **_text_or_base64("stderr", exited.stderr),
        "duration": exited.duration,
        "kernel": machine.kernel,
        "started": started,
        "ready": ready,
    }


def _text_or_base64(name: str, data: bytes) -> dict[str, str]:
    """JSON has no bytes: text if it is UTF-8, else base64 under another name."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {f"{name}_base64": base64.b64encode(data).decode()}


def _write_profile(path: str, config: SandboxConfig, samples: list[tuple[int, int]]) -> None:
    from microvm import _microvm
    from microvm.launch import choose_kernel
    from microvm.profile import load_symbols, render

    symbols = load_symbols(choose_kernel(config, _microvm.detect_backend()))
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(render(samples, symbols))
    except OSError as error:
        raise MicrovmError(f"cannot write the profile to {path}: {error.strerror}") from error
