"""What the threads of this process spend: processor time by who the thread is, to tell where an event's time goes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping

import psutil

_MICROS = 1_000_000


def spent() -> Mapping[str, float]:
    """Processor seconds so far: of the event loop (the main thread), the writers, and all others.

    The others are mostly the Kafka client's own threads, which run beside Python's.
    """
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: defaultdict[str, float] = defaultdict(float)
    for thread in psutil.Process().threads():
        found[_part(names.get(thread.id, ""))] += thread.user_time + thread.system_time
    return found


def measuring(events: int) -> Callable[[], Mapping[str, float]]:
    """Begin to measure; calling the result gives µs an event since then, by thread. Threads must not end meanwhile."""
    before = spent()

    def measured() -> Mapping[str, float]:
        return {part: round((seconds - before.get(part, 0)) / events * _MICROS, 1) for part, seconds in spent().items()}

    return measured


def _part(name: str) -> str:
    if name == threading.main_thread().name:
        return "event loop"
    return "writers" if name.startswith("log-write-") else "Kafka client and others"
