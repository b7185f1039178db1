"""How long producers waited: in total, without any fault, and during each kind of fault."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """When a fault was there, until what it took away was whole again; seconds of the monotonic clock."""

    kind: str
    began: float
    ended: float


class Delays:
    """When each acknowledged command was begun and when it was acknowledged."""

    def __init__(self) -> None:
        self._began = array("d")
        self._ended = array("d")

    def add(self, began: float, ended: float) -> None:
        """One acknowledged command."""
        self._began.append(began)
        self._ended.append(ended)

    def table(self, windows: Sequence[Window]) -> str:
        """Markdown: per kind, the commands that waited while one of its faults was there.

        Faults overlap; the last columns are of the commands that met this kind of fault and no other.
        """
        order = sorted(range(len(self._began)), key=self._began.__getitem__)
        began = [self._began[i] for i in order]
        ended = [self._ended[i] for i in order]
        waits = [end - begin for begin, end in zip(began, ended, strict=True)]
        longest = max(waits, default=0.0)
        met: list[frozenset[str]] = [frozenset()] * len(waits)
        for window in windows:
            kind = frozenset([window.kind])
            for i in range(bisect_left(began, window.began - longest), bisect_right(began, window.ended)):
                if ended[i] >= window.began:
                    met[i] |= kind
        counts = Counter(window.kind for window in windows)
        lines = [_row("any or none", len(windows), waits, []), _row("no fault", 0, _of(waits, met, frozenset()), [])]
        for name in sorted(counts):
            touched = [wait for wait, kinds in zip(waits, met, strict=True) if name in kinds]
            lines.append(_row(name, counts[name], touched, _of(waits, met, frozenset([name]))))
        return "\n".join([_HEAD, *lines])


_FIGURES = "commands | p50 s | p99 s | longest s"
_HEAD = f"| while there was | faults | {_FIGURES} | it alone: {_FIGURES} |\n|{' --- |' * 10}"


def _of(waits: Sequence[float], met: Sequence[frozenset[str]], exactly: frozenset[str]) -> list[float]:
    return [wait for wait, kinds in zip(waits, met, strict=True) if kinds == exactly]


def _row(name: str, faults: int, all_waits: list[float], alone: list[float]) -> str:
    cells = [name, str(faults)]
    for waits in (all_waits, alone):
        order = sorted(waits)
        quantiles = [order[min(len(order) - 1, int(share * len(order)))] if order else None for share in (0.5, 0.99, 1)]
        cells += [f"{len(waits):,}", *("" if q is None else f"{q:.2f}" for q in quantiles)]
    return f"| {' | '.join(cells)} |"
