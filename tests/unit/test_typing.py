"""The package type-checks, and the extension's stub says what the extension has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import microvm

ROOT = Path(__file__).parents[2]


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy", reason="mypy is in the extra 'dev'")
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_package_is_clean_under_strict_mypy() -> None:
    result = tool("mypy")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
def test_stub_matches_the_extension() -> None:
    result = tool("mypy.stubtest", "microvm._microvm", "--mypy-config-file", str(ROOT / "pyproject.toml"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_package_says_that_it_is_typed() -> None:
    assert (Path(microvm.__path__[0]) / "py.typed").is_file()
