"""Times in HTTP answers: RFC 3339 in UTC with six digits of a second; in µs since 1970 everywhere else."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_DAY = date(1970, 1, 1)


def to_text(micros: int) -> str:
    """The text (`2026-01-31T12:00:00.000001Z`) of a time in µs since 1970, UTC."""
    return (_EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds").replace("+00:00", "Z")


def of_datetime(moment: datetime) -> str:
    """The text of an aware time."""
    return to_text((moment - _EPOCH) // _MICROSECOND)


def from_text(text: str) -> int:
    """The time in such a text, exactly, in µs since 1970. Raises ValueError."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time needs its offset from UTC")
    return (time - _EPOCH) // _MICROSECOND


def day_to_text(day: int) -> str:
    """The text (`2026-01-31`) of a day that is counted from 1970-01-01."""
    return (_FIRST_DAY + timedelta(days=day)).isoformat()


def day_from_text(text: str) -> int:
    """The number of such a day. Raises ValueError."""
    return (date.fromisoformat(text) - _FIRST_DAY).days
