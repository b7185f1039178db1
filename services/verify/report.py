"""What a verification found: counts, and every broken invariant by name and place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant: a stable `kind`, the place (package and sequence, key, or view) and a sentence."""

    kind: str
    place: str
    detail: str


@dataclass(slots=True)
class Report:
    """Counts of what was read, and what is wrong; `violations` beyond `kept` are counted but not kept."""

    events: int = 0
    packages: int = 0
    files: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    unfinished_commands: int = 0
    violations: list[Violation] = field(default_factory=list)
    violation_count: int = 0
    kept: int = 1000
    views: dict[str, str] = field(default_factory=dict)
    """Digest of each view that was compared with a fresh fold."""

    def add(self, kind: str, place: str, detail: str) -> None:
        """Note a violation."""
        self.violation_count += 1
        if len(self.violations) < self.kept:
            self.violations.append(Violation(kind, place, detail))

    @property
    def clean(self) -> bool:
        """Whether no invariant is broken."""
        return self.violation_count == 0
