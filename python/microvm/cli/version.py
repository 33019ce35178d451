"""``microvm version`` and ``microvm environment``."""

from __future__ import annotations

import click

__all__ = ["environment", "version"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def version(as_json: bool) -> None:
    """Print the version."""
    from microvm import __version__
    from microvm.cli.report import write_json

    if as_json:
        write_json({"version": __version__})
    else:
        click.echo(f"microvm {__version__}")


@click.command()
def environment() -> None:
    """List the environment variables that are read."""
    from microvm.environment import VARIABLES, get

    for name, meaning in VARIABLES.items():
        click.echo(f"{name}={get(name) or ''}\n    {meaning}")
