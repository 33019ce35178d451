"""Samples of the guest's instruction pointer, as functions of its kernel."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Symbols", "load_symbols", "render"]


class Symbols:
    """A System.map: which function an address is in."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        table = []
        for line in lines:
            address, _, rest = line.partition(" ")
            kind, _, name = rest.strip().partition(" ")
            if kind in ("t", "T", "w", "W"):
                table.append((int(address, 16), name))
        table.sort()
        self.addresses = [address for address, _ in table]
        self.names = [name for _, name in table]

    def name(self, address: int) -> str:
        """The function's name, ``"user"`` for the lower half of the address space, else the address."""
        if address < 1 << 47:
            return "user"
        index = bisect_right(self.addresses, address) - 1
        return self.names[index] if index >= 0 else f"{address:#x}"


def load_symbols(kernel: str) -> Symbols:
    """The System.map beside a kernel, also as distributions name it; without one, no names."""
    folder, name = os.path.split(kernel)
    release = name.partition("-")[2]
    for candidate in ("System.map", f"System.map-{release}"):
        try:
            with open(os.path.join(folder, candidate), encoding="ascii") as file:
                return Symbols(file)
        except (OSError, ValueError):
            continue
    return Symbols()


def render(samples: Iterable[tuple[int, int]], symbols: Symbols) -> Iterator[str]:
    """Lines of share, count and function, the most frequent first."""
    counts: Counter[str] = Counter()
    for address, count in samples:
        counts[symbols.name(address)] += count
    total = counts.total()
    yield f"# {total} samples\n"
    for name, count in counts.most_common():
        yield f"{100 * count / total:5.1f}% {count:7} {name}\n"
