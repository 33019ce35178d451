"""The sandbox as Python sees it: several commands at once, an orderly end, forks, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import microvm
from microvm import ConfigError, SandboxExited, _microvm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm


def test_run_is_one_command_in_one_machine() -> None:
    result = microvm.run(["sh", "-c", "cat; echo err >&2; exit 3"], input="text", memory="256M")
    assert (result.returncode, result.stdout, result.stderr) == (3, "text", "err\n")
    assert result.args == ["sh", "-c", "cat; echo err >&2; exit 3"]
    assert result.duration > 0
    with pytest.raises(subprocess.CalledProcessError):
        result.check_returncode()


def test_several_commands_run_at_once(sandbox: microvm.Sandbox) -> None:
    # Each waits until all the others run: one after the other would never end.
    meet = (
        'mkdir -p /tmp/meet && touch "/tmp/meet/$0" && '
        'while [ "$(ls /tmp/meet | wc -l)" -lt 8 ]; do sleep 0.02; done; echo "$0"'
    )
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda name: sandbox.run(["sh", "-c", meet, name], timeout=60), map(str, range(8))))
    assert [result.stdout for result in results] == [f"{name}\n" for name in range(8)]


def test_commands_share_the_machines_files(sandbox: microvm.Sandbox) -> None:
    sandbox.run("echo hello > /tmp/shared", check=True)
    assert sandbox.run("cat /tmp/shared").stdout == "hello\n"


def test_large_output_arrives_whole(sandbox: microvm.Sandbox) -> None:
    result = sandbox.run(["head", "-c", "50000000", "/dev/zero"], text=False)
    assert result.stdout == bytes(50_000_000)


def test_settings_of_the_sandbox_hold_for_its_commands() -> None:
    with microvm.Sandbox(memory="256M", env={"A": "b"}, workdir="/usr", timeout=1) as sandbox:
        assert sandbox.run('echo "$A $PWD"').stdout == "b /usr\n"
        assert sandbox.run("echo $A", env={}).stdout == "\n"
        with pytest.raises(microvm.ExecTimeout):
            sandbox.run(["sleep", "60"])
        assert sandbox.kernel_release == sandbox.run(["uname", "-r"]).stdout.strip()
        assert 0 < sandbox.timings["started"] < sandbox.timings["ready"]
        assert sandbox.status == "running"
    assert sandbox.status == "ended"


def test_use_after_the_end_is_refused() -> None:
    sandbox = microvm.Sandbox(memory="256M")
    sandbox.stop()
    assert sandbox.status == "ended"
    sandbox.kill()
    with pytest.raises(SandboxExited):
        sandbox.run(["true"])


def test_kill_ends_what_runs() -> None:
    with microvm.Sandbox(memory="256M") as sandbox, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(sandbox.run, ["sleep", "60"])
        time.sleep(0.3)
        begin = time.monotonic()
        sandbox.kill()
        with pytest.raises(SandboxExited):
            pending.result(timeout=10)
        assert time.monotonic() - begin < 2


def test_ctrl_c_ends_the_command_and_not_the_machine(sandbox: microvm.Sandbox) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run(["sh", "-c", "touch /tmp/interrupted; exec sleep 61"])
    timer.join()
    deadline = time.monotonic() + 5
    while sandbox.run(["pgrep", "-f", "sleep 61"]).returncode == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandbox.run(["pgrep", "-f", "sleep 61"]).returncode == 1
    assert sandbox.run(["cat", "/tmp/interrupted"]).returncode == 0


FORK = """
import os, sys
import microvm
from microvm.exceptions import MicrovmError
with microvm.Sandbox(memory="256M") as sandbox:
    pid = os.fork()
    if not pid:
        try:
            sandbox.run(["true"])
        except MicrovmError as error:
            os._exit(7 if "belongs to process" in str(error) else 1)
        os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # The child's end did not end the machine.
    sandbox.run(["true"], check=True)
    sys.exit(code)
"""


def test_use_in_a_forked_child_is_refused() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False).returncode == 7


def test_machine_ends_with_the_object(sandbox: microvm.Sandbox) -> None:
    other = microvm.Sandbox(memory="256M")
    before = len(os.listdir("/proc/self/fd"))
    del other
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) < before
    assert sandbox.run(["true"]).returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stdin": subprocess.PIPE}, "stdin is"),
        ({"stderr": subprocess.STDOUT}, "stderr is STDOUT"),
        ({"timeout": 0}, "timeout is 0"),
        ({"cwd": ""}, "cwd is"),
        ({"stdout": 10_000}, "stdout is 10000"),
    ],
)
def test_options_that_cannot_be_are_refused(sandbox: microvm.Sandbox, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sandbox.run(["true"], **options)  # type: ignore[call-overload]


def test_more_vcpus_than_the_backend_has_are_refused_with_the_reason() -> None:
    if _microvm.detect_backend().max_cpus > 1:
        pytest.skip("hardware KVM has them")
    with pytest.raises(ConfigError, match="cpus is 2: software KVM has one vCPU"):
        microvm.Sandbox(cpus=2)


def test_image_that_is_none_fails_with_the_console(tmp_path: Path) -> None:
    image = tmp_path / "root"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(microvm.exceptions.BootError) as caught:
        microvm.Sandbox(memory="256M", rootfs=image)
    assert caught.value.log_tail is not None
    assert "mount /dev/vda as erofs" in caught.value.log_tail


@pytest.mark.skipif(shutil.which("cc") is None, reason="builds its program with cc")
def test_ext4_image_is_mounted_by_its_name(tmp_path: Path) -> None:
    tree, image = tmp_path / "tree", tmp_path / "root.ext4"
    (tree / "bin").mkdir(parents=True)
    source = tmp_path / "hello.c"
    source.write_text('#include <stdio.h>\nint main(void){puts("from ext4");}\n')
    subprocess.run(["cc", "-static", "-o", tree / "bin" / "hello", source], check=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "32M"], check=True)
    with microvm.Sandbox(memory="256M", rootfs=image) as sandbox:
        assert sandbox.run(["/bin/hello"]).stdout == "from ext4\n"


def test_users_initrd_is_unpacked_under_ours(tmp_path: Path) -> None:
    (tmp_path / "init").write_text("#!/bin/false\n")
    (tmp_path / "greeting").write_text("from the initrd\n")
    archive = tmp_path / "archive.cpio"
    names = b"init\ngreeting\n"
    with archive.open("wb") as output:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tmp_path, input=names, stdout=output, check=True)
    with microvm.Sandbox(memory="256M", initrd=archive, cmdline="microvm.root=initramfs") as sandbox:
        # There is no cat in that root: the agent's own binary is all there is, so look at what exec says about it.
        with pytest.raises(microvm.exceptions.CommandNotExecutable):
            sandbox.run(["/greeting"])
        assert sandbox.status == "running"
