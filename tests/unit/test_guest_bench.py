"""What `microvm bench guest` makes of the words of the program that measures."""

from __future__ import annotations

import pytest

from microvm.exceptions import MicrovmError
from microvm.guest_bench import Report, _parse

WORDS = [
    "Booting...",
    '{"name": "user_loop_ms", "values": [50, 60, 70]}',
    '{"name": "getppid_us", "values": [1.5, 1.0, 1.25]}',
    '{"name": "gcc_ms", "skipped": "the image has no working gcc"}',
]


def test_parse_of_figures_and_skips_keeps_both() -> None:
    skipped: dict[str, str] = {}

    figures = _parse(WORDS, skipped)

    assert figures == {"user_loop_ms": [50, 60, 70], "getppid_us": [1.5, 1.0, 1.25]}
    assert skipped == {"gcc_ms": "the image has no working gcc"}


def test_parse_of_words_that_end_early_is_an_error() -> None:
    with pytest.raises(MicrovmError, match="before its time"):
        _parse(WORDS[2:])


def test_parse_of_an_error_names_it() -> None:
    with pytest.raises(MicrovmError, match="mmap: Cannot allocate memory"):
        _parse([*WORDS, '{"error": "mmap: Cannot allocate memory"}'])


def test_report_compares_medians_with_those_elsewhere() -> None:
    report = Report("an image")
    report.figures["microvm"] = {"boot_ms": [40], "init_ms": [30], "getppid_us": [1.0, 2.0, 9.0]}
    report.figures["qemu"] = {"boot_ms": [1000], "getppid_us": [0.5]}
    report.skipped["gcc_ms"] = "the image has no working gcc"

    rows = {row["name"]: row for row in report.as_dict()["figures"]}

    assert rows["getppid_us"] == {
        "name": "getppid_us",
        "n": 3,
        "median": 2.0,
        "min": 1.0,
        "max": 9.0,
        "qemu": {"n": 1, "median": 0.5, "min": 0.5, "max": 0.5, "ratio": 0.25},
    }
    assert rows["boot_ms"]["qemu"]["ratio"] == 25
    assert "qemu" not in rows["init_ms"]
    assert any("gcc_ms: the image" in line for line in report.lines())
