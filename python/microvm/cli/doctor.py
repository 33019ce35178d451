"""``microvm doctor``."""

from __future__ import annotations

import click

__all__ = ["doctor"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--strict", is_flag=True, help="Exit with 1 unless everything is ok.")
def doctor(as_json: bool, strict: bool) -> int:
    """Check what this host offers, and say how to fix what is missing.

    Exits with 1 if machines cannot run here.
    """
    from microvm.cli.report import write_json
    from microvm.doctor import diagnose

    checks = diagnose()
    if as_json:
        fields = ("name", "status", "detail", "hint")
        write_json({"checks": [{field: getattr(check, field) for field in fields} for check in checks]})
    else:
        for check in checks:
            print(f"{check.status:4}  {check.name}: {check.detail}")
            if check.hint:
                print(f"      hint: {check.hint}")
    bad = ("fail", "warn") if strict else ("fail",)
    return int(any(check.status in bad for check in checks))
