"""A command in a machine behaves as under :func:`subprocess.run`: same words, environment, input and exit code."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from microvm import Sandbox

pytestmark = pytest.mark.kvm

# One machine for all examples: what they do in it leaves no trace.
machine_examples = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

WORD = st.binary(max_size=40).filter(lambda word: b"\0" not in word)
NAME = st.from_regex(rb"[A-Za-z_][A-Za-z0-9_.\x80-\xff]{0,10}", fullmatch=True)

#: Prints its words and its input, each with its length, so that no two different ones print the same.
SHOW_WORDS = 'for word in "$@"; do printf "%d:%s;" "${#word}" "$word"; done'


def both(sandbox: Sandbox, words: list[Any], **options: Any) -> tuple[Any, Any]:
    """What the host's subprocess and the machine make of the same call."""
    expected = subprocess.run(words, capture_output=True, timeout=60, check=False, **options)
    found = sandbox.run(words, text=False, timeout=60, **options)
    return (
        (expected.returncode, expected.stdout, expected.stderr),
        (found.returncode, found.stdout, found.stderr),
    )


@machine_examples
@given(words=st.lists(WORD, max_size=6))
@example(words=[b"", b" ", b"'", b'"', b"\\", b"\n", b"-n", b"--", b"\xff\xfe", b"$HOME", b"*"])
def test_words_arrive_unchanged(sandbox: Sandbox, words: list[bytes]) -> None:
    expected, found = both(sandbox, [b"/bin/sh", b"-c", SHOW_WORDS.encode(), b"sh", *words], env={"LC_ALL": "C"})
    assert found == expected


@machine_examples
@given(env=st.dictionaries(NAME, WORD, max_size=8))
def test_environment_arrives_unchanged(sandbox: Sandbox, env: dict[bytes, bytes]) -> None:
    expected, found = both(sandbox, ["/usr/bin/env", "-0"], env=env)
    assert sorted(found[1].split(b"\0")) == sorted(expected[1].split(b"\0"))
    assert found[0] == expected[0]


@machine_examples
@given(data=st.binary(max_size=5000), repeat=st.sampled_from([1, 1, 1, 50, 400]))
def test_input_comes_back_unchanged(sandbox: Sandbox, data: bytes, repeat: int) -> None:
    expected, found = both(sandbox, ["/bin/cat"], input=data * repeat)
    assert found == expected


@machine_examples
@given(code=st.integers(0, 255), out=WORD, err=WORD)
def test_exit_code_and_outputs_are_kept_apart(sandbox: Sandbox, code: int, out: bytes, err: bytes) -> None:
    script = 'printf %s "$1"; printf %s "$2" >&2; exit "$3"'
    expected, found = both(sandbox, [b"/bin/sh", b"-c", script.encode(), b"sh", out, err, str(code).encode()])
    assert found == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGUSR1])
def test_death_by_a_signal_is_negative(sandbox: Sandbox, number: int) -> None:
    expected, found = both(sandbox, ["/bin/sh", "-c", f"kill -{int(number)} $$"])
    assert found[0] == expected[0] == -number


@machine_examples
@given(text=st.text(max_size=200))
@example(text="a\r\nb\rc\n")
def test_text_is_decoded_the_same(sandbox: Sandbox, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    expected = subprocess.run(
        ["/bin/cat"], input=data.decode("utf-8", "replace"), capture_output=True, encoding="utf-8", check=True
    )
    found = sandbox.run(["/bin/cat"], input=data.decode("utf-8", "replace"))
    assert found.stdout == expected.stdout


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["/nonexistent/program"], {}),
        (["no-such-program"], {}),
        (["/etc/passwd"], {}),
        (["/usr"], {}),
        (["/bin/true"], {"cwd": "/nonexistent"}),
        (["/bin/true"], {"cwd": "/etc/passwd"}),
    ],
)
def test_what_cannot_start_raises_the_same_error(sandbox: Sandbox, words: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(OSError) as expected:  # noqa: PT011 - which one it is, is what is compared
        subprocess.run(words, check=False, **options)
    with pytest.raises(type(expected.value)) as found:
        sandbox.run(words, **options)
    assert found.value.errno == expected.value.errno
    assert found.value.filename == expected.value.filename


def test_bad_words_raise_the_same_error(sandbox: Sandbox) -> None:
    for words, options in [(["/bin/true", "a\0b"], {}), (["/bin/true"], {"env": {"A": "b\0c"}})]:
        with pytest.raises(ValueError, match="null byte"):
            subprocess.run(words, check=False, **options)
        with pytest.raises(ValueError, match="null byte"):
            sandbox.run(words, **options)


def test_check_raises_the_same_error(sandbox: Sandbox) -> None:
    words = ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        sandbox.run(words, check=True)
    assert caught.value.returncode == 3
    assert (caught.value.stdout, caught.value.stderr) == ("out\n", "err\n")
    assert caught.value.cmd == words


def test_timeout_raises_the_same_error_with_the_output_so_far(sandbox: Sandbox) -> None:
    words = ["/bin/sh", "-c", "echo before; sleep 30; echo after"]
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        sandbox.run(words, timeout=0.5)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.stdout == "before\n"
    assert caught.value.timeout == 0.5
    assert caught.value.cmd == words


def test_streams_can_be_files(sandbox: Sandbox, tmp_path: Any) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(300_000))
    with source.open("rb") as stdin, target.open("wb") as stdout:
        result = sandbox.run(["/bin/cat"], stdin=stdin, stdout=stdout, check=True)
    assert result.stdout is None
    assert target.read_bytes() == source.read_bytes()
