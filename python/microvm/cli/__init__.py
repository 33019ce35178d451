"""The ``microvm`` command. Each subcommand is in a module of its own, loaded when it is used."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from microvm.cli import report
from microvm.exceptions import MicrovmError

__all__ = ["cli", "main"]

#: Name, module and one line of help: the modules are not loaded to list them.
COMMANDS = {
    "run": ("microvm.cli.run", "Run a command in a new virtual machine."),
    "doctor": ("microvm.cli.doctor", "Check what this host offers, and say how to fix what is missing."),
    "kernel": ("microvm.cli.kernel", "Build and list guest kernels."),
    "bench": ("microvm.cli.bench", "Measure this installation against what you know."),
    "environment": ("microvm.cli.version", "List the environment variables that are read."),
    "version": ("microvm.cli.version", "Print the version."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Real Linux virtual machines in milliseconds.

    microvm run -- python3 -c 'print(1 + 1)'
    """


def invoke(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code; whatever goes wrong is one line on stderr and a hint."""
    as_json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
    try:
        code: Any = cli.main(arguments, prog_name="microvm", standalone_mode=False)
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else None
        return report.failure(error.format_message(), "usage", hint, None, as_json)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except MicrovmError as error:
        return report.failure(error.message, error.code, error.hint, error.log_tail, as_json)
    except BrokenPipeError:
        return 141
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Entry point of the ``microvm`` script."""
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = code or 141
    # Everything is closed, written or the kernel's to clean up: taking the interpreter apart would only take time.
    os._exit(code)
