"""Retention: the seeded classes, and how long a package must be kept, computed only from events.

A new class is one more row in `RETENTION_CLASSES`; `artifact-store migrate` copies the rows into the views. Every
package records the days of its class when it is created, so a changed number applies to later packages only.
"""

from __future__ import annotations

from dataclasses import dataclass

from artifact_store.errors import UnknownRetentionClassError

MICROS_PER_DAY = 86_400 * 1_000_000


@dataclass(frozen=True, slots=True)
class RetentionClass:
    """A seeded class. `days` is None if its packages are kept for ever. An immutable class forbids early expiry."""

    name: str
    days: int | None
    immutable: bool
    description: str


RETENTION_CLASSES = (
    RetentionClass("raw-evidence", 3650, True, "Raw evidence, kept ten years, immutable"),
    RetentionClass("report", 1825, False, "Reports, kept five years"),
    RetentionClass("build-output", 90, False, "What a build made, kept 90 days"),
    RetentionClass("scratch", 7, False, "Short-lived work, kept a week"),
    RetentionClass("permanent", None, True, "Never expires"),
)

_BY_NAME = {c.name: c for c in RETENTION_CLASSES}


def retention_class(name: str) -> RetentionClass:
    """The seeded class with this name. Raises UnknownRetentionClassError, which lists the known ones."""
    found = _BY_NAME.get(name)
    if found is None:
        # The name is shown escaped, because it may contain anything at this point.
        raise UnknownRetentionClassError(f"unknown retention class {name[:64]!a}; known: {', '.join(_BY_NAME)}")
    return found


def retain_until(counted_from: int, days: int | None) -> int | None:
    """When a package may expire, in µs since 1970: `days` of 24 hours after `counted_from`; None means never."""
    return None if days is None else counted_from + days * MICROS_PER_DAY
