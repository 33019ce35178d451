"""``microvm run`` with a machine: streams, exit codes, signals, limits, and what happens when things die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm

RUN = [sys.executable, "-m", "microvm", "run", "-m", "256M"]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """``microvm run`` with options and ``-- CMD``, in a process of its own."""
    defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
    return subprocess.run([*RUN, *arguments], capture_output=True, timeout=60, check=False, **defaults, **options)


def begin(*arguments: str) -> subprocess.Popen[bytes]:
    """The same, still running when it returns: the command has printed its first line."""
    process = subprocess.Popen(
        [*RUN, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_guest_kernel_is_not_the_hosts() -> None:
    result = run("--", "uname", "-r")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert result.stdout.strip().decode() != os.uname().release


def test_python_of_the_host_runs_in_the_guest() -> None:
    result = run("--", "python3", "-c", "import sys, json, ssl, sqlite3; print(sys.version_info[:3])")
    assert result.stderr == b""
    assert result.stdout.decode().strip() == str(sys.version_info[:3])


def test_streams_are_separate_and_binary_safe() -> None:
    data = bytes(range(256)) * 1000
    result = run("--", "sh", "-c", "cat; echo error >&2", input=data)
    assert result.returncode == 0
    assert result.stdout == data
    assert result.stderr == b"error\n"


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_exit_code_is_the_commands(code: int) -> None:
    assert run("--", "sh", "-c", f"exit {code}").returncode == code


def test_death_by_a_signal_is_128_and_its_number() -> None:
    assert run("--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--", "no-such-program"], 127, b"no-such-program"),
        (["--", "/nonexistent/program"], 127, b"/nonexistent/program"),
        (["--", "/etc/passwd"], 126, b"/etc/passwd"),
        (["-w", "/nonexistent", "--", "true"], 126, b"/nonexistent"),
    ],
)
def test_command_that_cannot_start_says_why(arguments: list[str], code: int, words: bytes) -> None:
    result = run(*arguments)
    assert result.returncode == code
    assert result.stderr.startswith(b"microvm: ")
    assert words in result.stderr
    assert result.stdout == b""


def test_environment_and_directory_are_those_asked_for() -> None:
    result = run(
        "-e",
        "A=b c",
        "-e",
        "FROM_HERE",
        "-w",
        "/usr",
        "--",
        "sh",
        "-c",
        'echo "$A,$FROM_HERE,$PWD,$HOME"',
        env={
            **os.environ,
            "FROM_HERE": "yes",
            "NOT_MENTIONED": "no",
        },
    )
    assert result.stdout == b"b c,yes,/usr,/root\n"


def test_hosts_environment_stays_outside() -> None:
    result = run("--", "env", env={**os.environ, "SECRET": "x"})
    assert b"SECRET" not in result.stdout


def test_timeout_ends_the_whole_process_tree_with_124() -> None:
    start = time.monotonic()
    result = run("--timeout", "0.5", "--", "sh", "-c", "echo before; sleep 60 & sleep 60; echo after")
    assert result.returncode == 124
    assert result.stdout == b"before\n"
    assert b"timed out after 0.5 s" in result.stderr
    assert time.monotonic() - start < 10


def test_interrupt_reaches_the_command() -> None:
    process = begin("--", "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert output == b"caught\n"
    assert process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_dies_of_the_signal_says_so(number: signal.Signals) -> None:
    process = begin("--", "sh", "-c", "echo ready; exec sleep 60")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == 128 + number


def test_second_interrupt_ends_the_machine() -> None:
    process = begin("--", "sh", "-c", "trap '' INT; echo ready; while :; do sleep 1; done")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_closed_output_ends_the_command() -> None:
    with subprocess.Popen([*RUN, "--", "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        assert process.wait(timeout=10) == 128 + signal.SIGPIPE


def test_json_has_everything() -> None:
    result = run("--json", "--", "sh", "-c", r"printf 'out\377'; echo err >&2; exit 4")
    found = json.loads(result.stdout)
    assert result.returncode == found["exit_code"] == 4
    assert found["stdout_base64"] == "b3V0/w=="
    assert found["stderr"] == "err\n"
    assert 0 < found["started"] < found["ready"]


def test_console_is_shown_on_stderr() -> None:
    result = run("--console", "--cmdline", "loglevel=7", "--", "echo", "out")
    assert result.stdout == b"out\n"
    assert b"Kernel command line:" in result.stderr


def test_command_line_words_reach_the_kernel() -> None:
    assert b"some.word=1" in run("--cmdline", "some.word=1", "--", "cat", "/proc/cmdline").stdout


def copy_with_libraries(program: str, root: Path) -> None:
    """A program and what it is linked with, at the same places below `root`."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in (program, *re.findall(r"(/\S+) \(0x", listed)):
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.lstrip("/"))


def test_directory_becomes_the_root(tmp_path: Path) -> None:
    copy_with_libraries("/bin/cat", tmp_path)
    (tmp_path / "file").write_text("content")
    assert run("--rootfs", tmp_path, "--", "/bin/cat", "/file").stdout == b"content"


def test_what_the_guest_writes_stays_in_it() -> None:
    assert run("--", "sh", "-c", "echo x > /etc/new && cat /etc/new").stdout == b"x\n"
    assert run("--", "cat", "/etc/new").returncode == 1


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x7fELF"])
def test_kernel_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    result = run("--kernel", kernel, "--", "true")
    assert result.returncode == 125
    assert result.stderr.startswith(b"microvm: ")
    assert b"kernel" in result.stderr


def test_initrd_larger_than_memory_is_refused(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(300 << 20)
    result = run("--initrd", initrd, "--", "true")
    assert result.returncode == 125
    assert b"initrd" in result.stderr


def test_kernel_panic_ends_the_run_with_the_console() -> None:
    result = run("--", "sh", "-c", "echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero")
    assert result.returncode == 125
    assert re.search(rb"^console: .*Kernel panic", result.stderr, re.M)
    assert b"microvm: " in result.stderr


def test_kernel_that_finds_no_init_says_so_on_the_console() -> None:
    result = run("--cmdline", "rdinit=/none init=/none", "--", "true")
    assert result.returncode == 125
    assert re.search(rb"^console: .*Kernel panic", result.stderr, re.M)


def test_profile_names_functions(tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    assert run("--profile", profile, "--", "sh", "-c", "for i in 1 2 3 4 5; do true | cat; done").returncode == 0
    assert profile.read_text().startswith("# ")


def children() -> set[str]:
    """Processes of this machine that run VMMs."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as file:
                if file.read().startswith("microvm-vmm"):
                    found.add(pid)
        except OSError:
            continue
    return found


def test_killed_client_leaves_no_machine_behind() -> None:
    before = children()
    process = begin("--", "sh", "-c", "echo ready; sleep 60")
    assert children() - before
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children() - before
