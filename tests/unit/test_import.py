"""Importing the package costs little and loads nothing it does not need."""

from __future__ import annotations

import subprocess
import sys

LIMIT_SECONDS = 0.060


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def seconds(statement: str) -> float:
    """The fastest of a few runs: what the statement costs when nothing else happens."""
    code = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(5)]
    return min(map(float, runs))


def test_import_loads_nothing_but_the_package() -> None:
    assert loaded_by("import microvm") <= {"microvm", "__future__"}


def test_import_of_everything_stays_within_the_limit() -> None:
    assert seconds("import microvm; microvm.Sandbox; microvm.run") < LIMIT_SECONDS


def test_run_command_does_not_load_what_only_others_need() -> None:
    loaded = loaded_by("import microvm.cli.run, microvm.launch, microvm.config")
    assert not loaded & {"rich", "subprocess", "json", "msgspec", "asyncio", "microvm.sandbox"}


def test_every_public_name_is_there() -> None:
    import microvm

    for name in microvm.__all__:
        assert getattr(microvm, name) is not None
    assert dir(microvm) == sorted(microvm.__all__)
