"""The command line without a machine: what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OWN_ERROR = 125


def microvm(*arguments: str | bytes, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "microvm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "0"], "memory is 0 bytes"),
        (["-m", "1"], "memory is 1 bytes"),
        (["-m", "1T"], "memory is"),
        (["-m", "12Q"], "memory is '12Q'"),
        (["-c", "0"], "cpus is 0"),
        (["-c", "two"], "'two' is not a valid integer"),
        (["--timeout", "0"], "timeout is 0"),
        (["--timeout", "-3"], "timeout is -3"),
        (["-w", "relative"], "workdir is"),
        (["-e", "=value"], "env is '=value'"),
        (["--env-file", "/nonexistent"], "env-file is '/nonexistent'"),
        (["--kernel", "/nonexistent/vmlinux"], "kernel is '/nonexistent/vmlinux'"),
        (["--initrd", "/nonexistent/initrd"], "initrd is '/nonexistent/initrd'"),
        (["--rootfs", "/nonexistent/root"], "rootfs is '/nonexistent/root'"),
        (["--cmdline", "a\nb"], "cmdline is"),
    ],
)
def test_run_with_bad_input_says_what_and_exits_with_125(arguments: list[str], words: str) -> None:
    result = microvm("run", *arguments, "--", "true")
    assert result.returncode == OWN_ERROR
    assert words in result.stderr
    assert result.stderr.startswith("microvm: ")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_run_without_a_command_says_how() -> None:
    result = microvm("run")
    assert result.returncode == OWN_ERROR
    assert "microvm run -- CMD" in result.stderr


def test_run_without_dashes_says_how() -> None:
    result = microvm("run", "echo", "a")
    assert result.returncode == OWN_ERROR
    assert "microvm run -- echo a" in result.stderr


def test_run_leaves_options_after_the_dashes_to_the_command() -> None:
    result = microvm("run", "-m", "0", "--", "true", "-m", "1G", "--json")
    assert result.stderr.startswith("microvm: memory is 0 bytes")


def test_run_with_json_reports_errors_as_json() -> None:
    result = microvm("run", "--json", "-m", "0", "--", "true")
    error = json.loads(result.stdout)["error"]
    assert result.returncode == OWN_ERROR
    assert error["code"] == "config"
    assert "memory" in error["message"]


def test_unknown_command_is_an_error() -> None:
    result = microvm("flurb")
    assert result.returncode == OWN_ERROR
    assert "flurb" in result.stderr


def test_version_is_the_package_version() -> None:
    result = microvm("version", "--json")
    assert json.loads(result.stdout)["version"].count(".") == 2


@pytest.mark.parametrize("command", [[], ["run"], ["doctor"], ["kernel"], ["kernel", "build"], ["bench"], ["version"]])
def test_help_fits_a_screen(command: list[str]) -> None:
    result = microvm(*command, "--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 40
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_doctor_names_each_item_and_a_fix_for_what_fails(tmp_path: Path) -> None:
    result = microvm("doctor", "--json", MICROVM_VMM=str(tmp_path / "none"))
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert {"platform", "kvm", "programs", "kernel", "cache", "memory", "seccomp", "landlock"} <= set(checks)
    assert checks["programs"]["status"] == "fail"
    assert "MICROVM_VMM" in checks["programs"]["hint"]
    assert result.returncode == 1
