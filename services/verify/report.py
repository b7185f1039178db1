"""The report of a verification: counts, and each broken invariant with its kind and place; and all kinds of damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Complain = Callable[[str, str, str], None]
"""Reports a violation: its kind, its place, and a sentence that says what is wrong."""

KINDS = {
    "gone": "records are gone: the log begins too late, ends too early or has a gap; reading stops there",
    "log-file": "the embedded log's file is damaged: SQLite finds a damaged page, row or index",
    "undecodable": "a record is not a readable event, and no operator has confirmed that (`log skip`)",
    "administrative": "the administrative records of a partition are not numbered 1, 2, 3 … or not chained",
    "partition": "an event does not lie in the partition of its package",
    "key": "a record's key is not its package's id: readers of the package miss the event, and views park it",
    "listed": "the embedded log lists an event under a number that is not its own: readers of the package stop there",
    "created-at": "created_at decreases within a partition",
    "sequence": "a package's events are not numbered 1, 2, 3 …",
    "repeated-event": "an event has the number that an earlier one of its package has, and is another record",
    "chain": "previous_digest is not the digest of the event before it",
    "event-id": "event_id is not derived from package and sequence",
    "creation": "the first event, and only it, creates the package",
    "after-finalized": "an event follows the package's finalization",
    "torn-command": "another command begins before all events of one are there",
    "repeated-command": "a command was applied a second time",
    "command-order": "an event is not the next one of its command",
    "unfinished-command": "a command at the end of a package's history waits for its retry",
    "package-id": "package_id is not derived from sender and command",
    "payload-digest": "payload_digest is not that of the payload",
    "metadata": "metadata is not a JSON object in JCS form",
    "retention": "the recorded period of the retention class is not a period",
    "path": "a relative path breaks a rule",
    "duplicate-path": "a path was ingested before",
    "file-id": "file_id is not derived from package and path",
    "location-id": "location_id is not derived from file and place",
    "receipt": "the receipt is not for size_bytes bytes",
    "manifest-address": "the finalization's digest is not that of the manifest of the package's events",
    "manifest": "the manifest in the event is not that of the package's events",
    "manifest-form": "the manifest is neither inline nor a claim check, or both",
    "manifest-key": "the claim check does not name the manifest's content-addressed key",
    "manifest-totals": "file_count or total_bytes is not that of the package's events",
    "decide": "the core would not have made this event from its command and the package's state",
    "backend": "an event names another storage backend than the one in use",
    "blob-key": "an event names a key that no blob can have",
    "blob-missing": "a blob that an event names is not there",
    "blob-damaged": "a blob is too short, or its bytes do not have the digests that were acknowledged",
    "blob-claim": "a blob is whole, but an event claims other digests for it",
    "view": "a view differs from a fresh fold of the log",
    "parked": "a view stopped following a package at an event that it cannot read or apply",
    "view-position": "a view cannot be compared: it stands on another log, or the log cannot be folded",
}
"""Every kind of violation that the oracle can find. One test damages a log, a blob or a view in each of these ways and
checks that it is found; another checks that docs/verify.md names all kinds."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant: its `kind` (of KINDS), the place (package and sequence, or view) and a sentence."""

    kind: str
    place: str
    detail: str


@dataclass(slots=True)
class Report:
    """Counts of what was read, and the violations; those beyond `kept` are counted but not kept."""

    events: int = 0
    packages: int = 0
    files: int = 0
    manifests: int = 0
    blobs: int = 0
    """Objects of the store that were checked."""
    bytes: int | None = None
    """Bytes that were read and hashed; None if the check does not read them."""
    healed: int = 0
    """Files whose bytes are not where their event says, but under their content-addressed key."""
    orphans: int = 0
    """Large bodies that were stored a day ago or earlier and that no event names; not violations."""
    removed: int | None = None
    """How many of the orphans were removed; None if they were not to be removed."""
    skipped: int = 0
    """Records that are not events and are passed over, as an operator has confirmed; not violations."""
    repeated: int = 0
    """Byte-for-byte repeats of records, which tools that mirror topics cause. Passed over; not violations."""
    administrative: int = 0
    """Records that belong to a partition of the log and not to a package."""
    unfinished_commands: int = 0
    views: dict[str, str] = field(default_factory=dict)
    """Digest of each view that was compared with a fresh fold."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Keys of damaged blobs, and where each was moved to."""
    violation_count: int = 0
    violations: list[Violation] = field(default_factory=list)
    kept: int = 1000
    expected_blobs: int = 0
    expected_bytes: int = 0
    """How much there is to check, for progress displays."""

    def add(self, kind: str, place: str, detail: str) -> None:
        """Add a violation. Raises KeyError for a kind that is not in KINDS."""
        KINDS[kind]
        self.violation_count += 1
        if len(self.violations) < self.kept:
            self.violations.append(Violation(kind, place, detail))

    @property
    def clean(self) -> bool:
        """Whether no invariant is broken."""
        return self.violation_count == 0

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object, without the counts that are None."""
        found: dict[str, Any] = {
            "events": self.events,
            "packages": self.packages,
            "files": self.files,
            "manifests": self.manifests,
            "blobs": self.blobs,
            "bytes": self.bytes,
            "healed": self.healed,
            "orphans": self.orphans,
            "removed": self.removed,
            "skipped": self.skipped,
            "repeated": self.repeated,
            "administrative": self.administrative,
            "unfinished_commands": self.unfinished_commands,
            "views": self.views,
            "set_aside": self.set_aside,
            "violation_count": self.violation_count,
            "violations": [{"kind": v.kind, "place": v.place, "detail": v.detail} for v in self.violations],
        }
        return {name: value for name, value in found.items() if value is not None}
