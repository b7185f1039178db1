"""How long producers waited: over all, without any fault, and while each kind of fault was there."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
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

    def table(self, windows: Iterable[Window]) -> str:
        """Markdown: per kind, the commands that waited during one of its faults. Faults of other kinds overlap."""
        order = sorted(range(len(self._began)), key=self._began.__getitem__)
        began = [self._began[i] for i in order]
        ended = [self._ended[i] for i in order]
        longest = max((end - begin for begin, end in zip(began, ended, strict=True)), default=0.0)
        touched: dict[str, set[int]] = defaultdict(set)
        counts: dict[str, int] = defaultdict(int)
        for window in windows:
            counts[window.kind] += 1
            candidates = range(bisect_left(began, window.began - longest), bisect_right(began, window.ended))
            touched[window.kind].update(i for i in candidates if ended[i] >= window.began)
        disturbed = set().union(*touched.values()) if touched else set()
        calm = [ended[i] - began[i] for i in range(len(began)) if i not in disturbed]
        lines = [
            "| while there was | faults | commands | p50 s | p99 s | longest s |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines.append(_row("anything", sum(counts.values()), [e - b for b, e in zip(began, ended, strict=True)]))
        lines.append(_row("no fault", 0, calm))
        lines += [_row(kind, counts[kind], [ended[i] - began[i] for i in touched[kind]]) for kind in sorted(counts)]
        return "\n".join(lines)


def _row(name: str, faults: int, delays: list[float]) -> str:
    delays.sort()

    def quantile(share: float) -> str:
        return f"{delays[min(len(delays) - 1, int(share * len(delays)))]:.3f}" if delays else "-"

    return f"| {name} | {faults} | {len(delays)} | {quantile(0.5)} | {quantile(0.99)} | {quantile(1.0)} |"
