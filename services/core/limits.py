"""The limits that `decide` enforces: sizes and counts, and how long packages and answers are kept."""

from __future__ import annotations

from dataclasses import dataclass

INLINE_MANIFEST_BYTES = 512 * 1024
"""A larger manifest is stored as a blob, and its event holds only the blob's key: a claim check."""

EVENT_OVERHEAD_BYTES = 16 * 1024
"""Room for everything in an event but metadata or manifest: six texts of 256 characters, a path, digests, headers."""

ANSWERS_KEPT_MICROS = 24 * 3600 * 1_000_000
"""How long after a package's finalization retries of its commands are answered. The partition's newest event tells the
time."""

MAX_IDLE_MICROS = 365 * 24 * 3600 * 1_000_000
"""How long an open package takes commands after its last event. After that, the writer need not keep its files."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one deployment allows. Sizes in bytes; `max_event_bytes` is what the log takes in one record."""

    max_file_bytes: int = 5 << 40
    max_files_per_package: int = 100_000
    max_metadata_bytes: int = 64 << 10
    max_event_bytes: int = 1_000_000
    inline_manifest_bytes: int = INLINE_MANIFEST_BYTES
    max_idle_micros: int = MAX_IDLE_MICROS
