"""Settings: what is accepted, and what is refused by name."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from microvm import ConfigError
from microvm.config import (
    DEFAULT_ENV,
    SandboxConfig,
    encode_env,
    encode_words,
    format_size,
    parse_duration,
    parse_size,
)

SIZES = st.integers(min_value=0, max_value=(1 << 63) - 1)


@given(SIZES)
def test_size_printed_and_parsed_is_the_same(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(SIZES)
def test_size_as_a_number_or_its_digits_is_itself(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == size


@given(st.text(max_size=20))
def test_size_of_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ConfigError:
        event("refused")
    else:
        assert 0 <= size < 1 << 63


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("1.5G", 3 << 29),
        ("64 KiB", 64 << 10),
        ("64kb", 64 << 10),
        ("7B", 7),
        ("2T", 2 << 40),
        (" 1K ", 1 << 10),
    ],
)
def test_size_with_a_unit_is_a_power_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "12Q", "M", "-1", "-1M", "1.5", "0.3K", "1e3", "½M", "\u0661M", "1MM", "1 2M", "9" * 40]
)
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size is"):
        parse_size(text)


@pytest.mark.parametrize("size", [-1, 1 << 63, True, None, 1.5])
def test_size_of_another_kind_is_refused(size: object) -> None:
    with pytest.raises(ConfigError):
        parse_size(size)  # type: ignore[arg-type]


def test_duration_is_seconds_or_a_timedelta() -> None:
    assert parse_duration(2) == 2.0
    assert parse_duration(timedelta(milliseconds=1500)) == 1.5


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf"), 1e10, "3", None, True, timedelta(0)])
def test_duration_out_of_range_is_refused(duration: object) -> None:
    with pytest.raises(ConfigError, match="timeout is"):
        parse_duration(duration)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"memory": 0}, "memory"),
        ({"memory": 1}, "memory"),
        ({"memory": "1T"}, "memory"),
        ({"memory": "12Q"}, "memory"),
        ({"memory": (64 << 20) + 1}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"cpus": 33}, "cpus"),
        ({"cpus": -1}, "cpus"),
        ({"cpus": 1 << 70}, "cpus"),
        ({"cpus": 1.0}, "cpus"),
        ({"cmdline": "a\nb"}, "cmdline"),
        ({"cmdline": "x" * 2048}, "cmdline"),
        ({"cmdline": None}, "cmdline"),
        ({"env": {"A": "b\0c"}}, "env"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"env": {"": "c"}}, "env"),
        ({"workdir": "relative"}, "workdir"),
        ({"workdir": "/a\0b"}, "workdir"),
        ({"kernel": "/nonexistent/vmlinux"}, "kernel"),
        ({"initrd": "/nonexistent/initrd"}, "initrd"),
        ({"rootfs": "/nonexistent/root"}, "rootfs"),
        ({"rootfs": ""}, "rootfs"),
        ({"boot_timeout": 0}, "boot_timeout"),
        ({"profile_us": 1}, "profile"),
    ],
)
def test_setting_out_of_range_is_named(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SandboxConfig.of(**settings)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert field in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_settings_are_kept_as_they_were_meant(tmp_path: Path) -> None:
    config = SandboxConfig.of(memory="64M", env={"PATH": "/bin", "A": "b"}, workdir="/tmp", rootfs=tmp_path)
    assert config.memory == 64 << 20
    assert config.env == {**DEFAULT_ENV, "PATH": "/bin", "A": "b"}
    assert config.workdir == "/tmp"
    assert config.rootfs == str(tmp_path)


def test_words_are_encoded_as_subprocess_does() -> None:
    assert encode_words(["a", b"\xff", Path("c"), "\udcff"]) == [b"a", b"\xff", b"c", b"\xff"]
    assert encode_words("echo $HOME") == [b"/bin/sh", b"-c", b"echo $HOME"]


@pytest.mark.parametrize("words", [[], b"ls", ["a\0b"], [b"\0"]])
def test_words_that_no_program_could_get_are_refused(words: object) -> None:
    with pytest.raises(ConfigError, match="command is"):
        encode_words(words)  # type: ignore[arg-type]


@given(st.dictionaries(st.binary(min_size=1, max_size=8), st.binary(max_size=8), max_size=5))
def test_environment_is_kept_or_refused_for_a_reason(env: dict[bytes, bytes]) -> None:
    bad = any(b"\0" in name + value or b"=" in name for name, value in env.items())
    try:
        encoded = encode_env(env)
    except ConfigError:
        assert bad
    else:
        assert not bad
        assert dict(encoded) == env
