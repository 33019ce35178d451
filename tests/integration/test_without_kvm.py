"""Hosts whose ``/dev/kvm`` is missing, closed or something else: each error says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

#: A `/dev` of our own at "$1"; what follows decides about kvm in it.
OWN_DEV = """
set -e
mount -t tmpfs dev "$1"
cp -a /dev/null /dev/zero /dev/urandom /dev/random "$1"
{}
mount --move "$1" /dev
shift
exec {} "$@"
"""
MISSING = OWN_DEV.format("", "")
CLOSED = OWN_DEV.format(
    'mknod -m 600 "$1/kvm" c 10 232; chown 65534 "$1/kvm"', "setpriv --bounding-set=-dac_override,-dac_read_search"
)
SOMETHING_ELSE = OWN_DEV.format('cp -a /dev/null "$1/kvm"', "")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("a /dev of our own needs root, unshare and setpriv")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")


def microvm(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(folder), sys.executable, "-m", "microvm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("script", "words", "hint"),
    [
        (MISSING, "/dev/kvm is missing", "modprobe"),
        (CLOSED, "no permission to use /dev/kvm", "usermod -aG kvm"),
        (SOMETHING_ELSE, "/dev/kvm has API version", None),
    ],
    ids=["missing", "closed", "something else"],
)
def test_run_says_what_is_wrong_with_kvm_and_how_to_fix_it(
    tmp_path: Path, script: str, words: str, hint: str | None
) -> None:
    result = microvm(script, tmp_path, "run", "--", "true")
    assert result.returncode == 125
    assert words in result.stderr
    assert (hint or "") in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_works_without_kvm(tmp_path: Path) -> None:
    result = microvm(MISSING, tmp_path, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1
    assert checks["kvm"]["status"] == "fail"
    assert "modprobe" in checks["kvm"]["hint"]
    assert checks["memory"]["status"] in ("ok", "warn")


def test_errors_are_those_python_has_for_it(tmp_path: Path) -> None:
    code = (
        "import microvm\ntry: microvm.Sandbox()\nexcept FileNotFoundError as error: print(error.code, error.filename)"
    )
    command = ["unshare", "--mount", "sh", "-c", MISSING, "sh", str(tmp_path), sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "kvm_missing /dev/kvm\n"
