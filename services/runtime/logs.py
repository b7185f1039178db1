"""Log lines: JSON with times in UTC, and a limit for lines that repeat."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import lru_cache

REPEAT_SECONDS = 60.0
"""The least time between two lines of one kind."""

_MOST_KINDS = 200


class Repeats:
    """Lets one line of each kind pass per REPEAT_SECONDS, and says how many were held back in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def passes(self, line: str, kind: str) -> str | None:
        """The line to write, or None."""
        now = self._clock()
        since, more = self._seen.get(kind, (now - REPEAT_SECONDS, 0))
        if now - since < REPEAT_SECONDS:
            self._seen[kind] = since, more + 1
            return None
        if len(self._seen) >= _MOST_KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        return line if not more else f"{line} (and once more)" if more == 1 else f"{line} (and {more} times more)"

    def warn(self, logger: logging.Logger, line: str, kind: str | None = None) -> None:
        """Log a warning that may recur, once in a while; its kind is its text if none is given."""
        if (passed := self.passes(line, line if kind is None else kind)) is not None:
            logger.warning("%s", passed)


class JsonLines(logging.Formatter):
    """One JSON object per line: `time` (UTC), `level`, `logger`, `process`, `message`, and the `fields` of the record.

    `exception` has the traceback, if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        found = {
            "time": utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def utc(seconds: float) -> str:
    """A time in seconds since 1970 in the form of RFC 3339, with milliseconds."""
    whole = int(seconds)
    return f"{_utc_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


@lru_cache(maxsize=2)
def _utc_second(whole: int) -> str:
    """Cached, because most log lines are in the same second as the one before."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
