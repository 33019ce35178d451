"""``microvm kernel``: the guest kernels of this installation."""

from __future__ import annotations

import click

__all__ = ["kernel"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def kernel() -> None:
    """Build and list guest kernels."""


@kernel.command()
@click.argument("flavour", type=click.Choice(["hardware", "ring3"]), required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def build(flavour: str | None, as_json: bool) -> None:
    """Build the guest kernel, unless it is in the cache already.

    Without FLAVOUR, the one that this host needs.
    """
    from microvm import _microvm
    from microvm import kernel as kernels
    from microvm.cli.progress import reporting
    from microvm.cli.report import write_json

    wanted = flavour or _microvm.detect_backend().flavour
    with reporting() as progress:
        path = kernels.find(wanted) or kernels.build(wanted, progress=progress)
    if as_json:
        write_json({"flavour": wanted, "path": str(path)})
    else:
        print(path)


@kernel.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def ls(as_json: bool) -> None:
    """List the guest kernels there are."""
    from microvm import kernel as kernels
    from microvm.cli.report import write_json

    found = kernels.ls()
    if as_json:
        fields = ("flavour", "version", "source", "key", "path", "system_map")
        write_json({"kernels": [{field: _plain(getattr(each, field)) for field in fields} for each in found]})
        return
    for each in found:
        print(f"{each.flavour:8}  {each.version}  {each.source:7}  {each.path}")


def _plain(value: object) -> str | None:
    return None if value is None else str(value)
