"""The README's Python examples run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S) if README.exists() else []


def expected(example: str) -> list[str]:
    """What the comments behind `print` promise."""
    return re.findall(r"print\(.*\)  # (.+)", example)


@pytest.mark.kvm
@pytest.mark.skipif(not EXAMPLES, reason="the tests were copied without the README")
@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_example_prints_what_it_promises(example: str) -> None:
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[: len(expected(example))] == expected(example)
