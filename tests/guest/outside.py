#!/usr/bin/env python3
"""The outside suites: Debian's stress-ng and CPython's own tests, in a machine and on the host in the same tree.

``outside.py stress-ng [NAME…]`` runs stressors with ``--verify``; ``outside.py cpython [NAME…]`` runs test modules, and
compares each test's result with the host's. Both need root for the tree (see build-tree) and write a table as Markdown
on standard output and as JSON to ``--json FILE``. The exit code is 1 if the machine did worse than the host.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import microvm
from microvm.exceptions import MicrovmError

HERE = Path(__file__).parent


def words_of(name: str) -> list[str]:
    """The words of a file beside this one, but for its comments."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(word for line in lines if not line.startswith("#") for word in line.split()))


STRESSORS = words_of("stressors.txt")
MODULES = words_of("modules.txt")
#: How unittest names a test and its result: "test_a (test.test_b.C.test_a) ... ok", with a line of explanation between.
SAID = re.compile(
    r"^\w+ \((test\.[\w.]+)\)(?:\n[^\n(]*)? \.\.\. [^\n]*?(ok|FAIL|ERROR|skipped|expected failure)\b", re.M
)
KINDS = {"ok": "passed", "FAIL": "failure", "ERROR": "error", "skipped": "skipped", "expected failure": "passed"}
#: Stressors that refuse to run as root.
NOT_AS_ROOT = {"exec", "spawn"}
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def say(*words: object) -> None:
    """Tells how far it is."""
    sys.stderr.write(" ".join(map(str, words)) + "\n")
    sys.stderr.flush()


class Guest:
    """A machine of the tree, and another one when it has ended."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.sandbox: microvm.Sandbox | None = None

    def run(self, command: list[str], timeout: float) -> tuple[int, str]:
        """The exit code, or -1000 if the machine ended or hangs; and the output."""
        if self.sandbox is None:
            self.sandbox = microvm.Sandbox(memory="1G", rootfs=str(self.tree))
        with tempfile.TemporaryFile() as output:
            try:
                done = self.sandbox.run(command, stdout=output, stderr=output, timeout=timeout, env=ENVIRONMENT)
                self.sandbox.run(["true"], timeout=30, check=True)
                output.seek(0)
                return done.returncode, output.read().decode(errors="replace")
            except (MicrovmError, TimeoutError) as error:
                tail = getattr(error, "log_tail", None) or ""
                alive = isinstance(error, TimeoutError) and self._answers()
                if not alive:
                    self.sandbox.kill()
                    self.sandbox = None
                output.seek(0)
                text = output.read().decode(errors="replace")
                return (-9 if alive else -1000), f"{text}\n{error}\n{tail}"

    def _answers(self) -> bool:
        try:
            return self.sandbox is not None and self.sandbox.run(["echo", "x"], timeout=30).stdout == "x\n"
        except (MicrovmError, TimeoutError):
            return False


class Host:
    """The same tree on the host, in a mount namespace of its own, with memory for what is written."""

    SETUP = """
    set -e; cd "$0"; mount --bind . .; cd "$0"
    for place in tmp run var/tmp root; do mount -t tmpfs none $place; done
    mount --rbind /dev dev; mount -t proc none proc; mount --rbind /sys sys
    python3 - <<'END'
    import fcntl, socket, struct
    fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x43))  # SIOCSIFFLAGS: up, running
    END
    exec chroot . "$@"
    """.replace("\n    ", "\n")

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def run(self, command: list[str], timeout: float) -> tuple[int, str]:
        # Who is started in the background may ignore SIGINT, and so would its children.
        unshare = [
            "env",
            "--default-signal=INT,QUIT,PIPE",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--net",
            "--kill-child",
        ]
        try:
            done = subprocess.run(
                [*unshare, "sh", "-c", self.SETUP, self.tree, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            return -9, (error.stdout or b"").decode(errors="replace")
        return done.returncode, done.stdout.decode(errors="replace")


def stress(guest: Guest, host: Host, names: list[str], seconds: float) -> list[dict[str, Any]]:
    """Each stressor in the machine; on the host too where it did not pass, to know whose fault that is."""
    rows = []
    verdicts = {0: "passed", 3: "skipped", 4: "skipped", -1000: "machine ended"}
    for name in names or STRESSORS:
        command = ["stress-ng", "--temp-path", "/tmp", "--verify", "--metrics-brief", "--oomable", f"--{name}", "2"]
        command += ["--timeout", f"{seconds:.0f}s"]
        if name in NOT_AS_ROOT:
            command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command]
        begin = time.monotonic()
        code, output = guest.run(command, 90 + 5 * seconds)
        operations = 0
        for line in output.splitlines():
            words = line.split()
            if "metrc:" in words and name in words[:-1] and (count := words[words.index(name) + 1]).isdecimal():
                operations = int(count)
        left_out = "unrecognized option" in output or re.search(r"stressor will be skipped|skipped: [1-9]", output)
        row = {
            "name": name,
            "guest": "skipped"
            if left_out
            else verdicts.get(code, "machine ended" if code == -1000 else f"failed ({code})"),
            "operations": operations,
            "seconds": round(time.monotonic() - begin, 1),
        }
        if row["guest"] not in ("passed", "skipped"):
            row["host"] = verdicts.get(host.run(command, 90 + 5 * seconds)[0], "failed")
            row["output"] = output[-3000:]
        rows.append(row)
        say(name, row["guest"], operations, row.get("host", ""))
    return rows


def results_of(output: str) -> dict[str, str]:
    """Each test's result: from the JUnit report behind the mark, or else as it was said."""
    words, _, report = output.partition("JUNIT-REPORT\n")
    results = {}
    try:
        for case in ET.fromstring(report[: report.rindex(">") + 1]).iter("testcase"):
            kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            results[case.get("name", "?")] = kind
    except (ET.ParseError, ValueError):
        for match in SAID.finditer(words):
            results[match[1]] = KINDS[match[2]]
    return results


def cpython(guest: Guest, host: Host, names: list[str], seconds: float) -> list[dict[str, Any]]:
    """Each module of tests in both places; every test whose result differs is named."""
    rows = []
    for name in names or MODULES:
        # With a limit of its own, it says where it hangs.
        script = (
            f"cd /tmp; rm -f report.xml; python3 -m test -v --timeout {0.8 * seconds:.0f} --junit-xml report.xml {name}"
            "; code=$?; echo JUNIT-REPORT; cat report.xml; exit $code"
        )
        row: dict[str, Any] = {"name": name}
        results = {}
        for place, runner in (("host", host), ("guest", guest)):
            begin = time.monotonic()
            code, output = runner.run(["sh", "-c", script], seconds)
            results[place] = results_of(output)
            row[place] = {
                "code": code,
                "seconds": round(time.monotonic() - begin, 1),
                **Counter(results[place].values()),
            }
            if code not in (0, 4, 5) and place == "guest":
                row["output"] = output.partition("JUNIT-REPORT")[0][-6000:]
        row["differences"] = {
            test: [results["host"].get(test, "absent"), results["guest"].get(test, "absent")]
            for test in sorted({*results["host"], *results["guest"]})
            if results["host"].get(test) != results["guest"].get(test)
        }
        rows.append(row)
        say(json.dumps({key: value for key, value in row.items() if key != "output"}))
    return rows


def stress_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| stressor | guest | operations | host, where the guest did not pass |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['guest']} | {row['operations']} | {row.get('host', '')} |" for row in rows]
    counts = Counter(row["guest"].split()[0] for row in rows)
    return [*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]


def cpython_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| module | host: passed, skipped, failed | guest: passed, skipped, failed | different |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for place in ("host", "guest"):
            facts = row[place]
            failed = facts.get("failure", 0) + facts.get("error", 0)
            ended = {-9: ", hung", 1: ", hung", -1000: ", machine ended"}.get(facts["code"], "")
            cells.append(f"{facts.get('passed', 0)}, {facts.get('skipped', 0)}, {failed}{ended}")
        different = "; ".join(f"{test}: {a} → {b}" for test, (a, b) in row["differences"].items())
        lines.append(f"| {row['name']} | {cells[0]} | {cells[1]} | {different} |")
    return lines


def worse(row: dict[str, Any]) -> bool:
    if "differences" in row:
        return (
            any(there in ("failure", "error") for _, there in row["differences"].values()) or row["guest"]["code"] < 0
        )
    return row["guest"] not in ("passed", "skipped") and row.get("host") in ("passed", "skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=["stress-ng", "cpython"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, help="of each stressor (3), or at most of each module (300)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    built = subprocess.run([HERE / "build-tree"], stdout=subprocess.PIPE, text=True, check=True)
    tree = Path(built.stdout.strip())
    guest, host = Guest(tree), Host(tree)
    if arguments.suite == "stress-ng":
        rows = stress(guest, host, arguments.names, arguments.seconds or 3)
        lines = stress_table(rows)
    else:
        rows = cpython(guest, host, arguments.names, arguments.seconds or 300)
        lines = cpython_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(map(worse, rows)))


if __name__ == "__main__":
    sys.exit(main())
