"""``microvm kernel``: the guest kernels of this installation."""

from __future__ import annotations

import click

__all__ = ["kernel"]

FLAVOURS = click.Choice(["hardware", "ring3"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def kernel() -> None:
    """Build and list guest kernels."""
