"""How the command line speaks to a person, and to a program with ``--json``."""

from __future__ import annotations

import sys

__all__ = ["OWN_ERROR", "failure", "write_json"]

#: Exit code for an error of microvm's own, as docker has it.
OWN_ERROR = 125

_SHOWN_LINES = 20


def failure(message: str, code: str, hint: str | None, log_tail: str | None, as_json: bool) -> int:
    """Reports an error and returns the exit code for it."""
    if as_json:
        write_json({"error": {"code": code, "message": message, "hint": hint, "log_tail": log_tail}})
        return OWN_ERROR
    if log_tail:
        lines = [printable(line) for line in log_tail.splitlines() if line.strip()]
        for line in lines[-_SHOWN_LINES:]:
            print(f"console: {line}", file=sys.stderr)
    print(f"microvm: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return OWN_ERROR


def printable(line: str) -> str:
    """A line of a guest's words, without what would steer the terminal."""
    return "".join(character for character in line.expandtabs() if character.isprintable())


def write_json(value: object) -> None:
    """One line of JSON on standard output."""
    import json

    print(json.dumps(value, ensure_ascii=False))
