"""A host whose ``/dev/kvm`` is missing, forbidden or something else: the error names the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

#: Hides /dev/kvm in a mount namespace of its own; "$@" is then run there.
MISSING = "mkdir $0/dev && cp -a /dev/null /dev/zero /dev/urandom $0/dev && mount --rbind $0/dev /dev"
FORBIDDEN = "touch $0/kvm && chmod 000 $0/kvm && chown 1 $0/kvm && mount --bind $0/kvm /dev/kvm"
SOMETHING_ELSE = "mount --bind /dev/null /dev/kvm"


def hidden(how: str, folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`microvm` with arguments where /dev/kvm is not what it should be. Root loses its way around file modes."""
    drop = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    script = f'{how} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, folder, *drop, sys.executable, "-m", "microvm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


def namespaces_reason() -> str | None:
    """Why these tests cannot run here."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return "needs root, unshare and setpriv"
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm to hide"
    trial = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if trial.returncode == 0 else "mount namespaces are not allowed here"


pytestmark = pytest.mark.skipif(namespaces_reason() is not None, reason=str(namespaces_reason()))


@pytest.mark.parametrize(
    ("how", "code", "hint"),
    [
        (MISSING, "kvm_missing", "modprobe"),
        (FORBIDDEN, "kvm_permission", "usermod -aG kvm"),
        (SOMETHING_ELSE, "kvm_unavailable", "/dev/kvm"),
    ],
)
def test_run_without_kvm_says_how_to_get_it(
    tmp_path_factory: pytest.TempPathFactory, how: str, code: str, hint: str
) -> None:
    folder = tmp_path_factory.mktemp("hidden")
    result = hidden(how, str(folder), "run", "--json", "--", "true")
    error = json.loads(result.stdout or result.stderr)
    assert result.returncode == 125
    assert code in json.dumps(error)
    assert hint in json.dumps(error)


@pytest.mark.parametrize("how", [MISSING, FORBIDDEN])
def test_doctor_without_kvm_reports_it_and_is_strict_on_request(
    tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    folder = tmp_path_factory.mktemp("hidden")
    lenient = hidden(how, str(folder), "doctor")
    assert "/dev/kvm" in lenient.stdout
    assert "hint:" in lenient.stdout
    shutil.rmtree(folder)
    folder.mkdir()
    assert hidden(how, str(folder), "doctor", "--strict").returncode != 0
