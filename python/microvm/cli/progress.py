"""Progress of long work, on stderr and only on a terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as Bars

    from microvm.launch import Progress

__all__ = ["reporting"]


class _Reporter:
    """Makes the bars when there is something to report: most runs have nothing and load nothing."""

    def __init__(self) -> None:
        self.bars: Bars | None = None
        self.tasks: dict[str, object] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bars.start()
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total or None)
        self.bars.update(self.tasks[what], completed=done, total=total or None)  # type: ignore[arg-type]

    def close(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None


class _Plain:
    """Without a terminal: one line when something long begins."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.seen:
            self.seen.add(what)
            print(f"microvm: {what}", file=sys.stderr, flush=True)


@contextmanager
def reporting() -> Iterator[Progress]:
    """A progress callback for the duration of the block."""
    if not sys.stderr.isatty():
        yield _Plain()
        return
    reporter = _Reporter()
    try:
        yield reporter
    finally:
        reporter.close()
