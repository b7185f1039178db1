"""The operations of an interface that the scenario needs, and the form of its refusals."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from uuid import UUID, uuid4

from artifact_store.errors import (
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidPathError,
    PackageNotFoundError,
    UnknownRetentionClassError,
)
from services.config import Settings


@dataclass(frozen=True)
class Product:
    """Where the product is: the settings of its parts, and the gateway's URL; None where a client opens the parts."""

    settings: Settings
    url: str | None


@dataclass(frozen=True)
class About:
    """What a package is."""

    name: str = "run 7, night shift"
    producer: str = "lab-3"
    subject: str = "sample Ω"
    retention_class: str = "raw-evidence"
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceFile:
    """A file to publish."""

    relative_path: str
    media_type: str
    content: bytes


@dataclass(frozen=True)
class TailedEvent:
    """What every interface shows of an event."""

    event_type: str
    event_id: UUID
    package_id: UUID
    sequence: int


class Driver(Protocol):
    """One way to use the product. An operation that is refused raises what `expects` accepts."""

    async def publish(
        self, about: About, files: Sequence[SourceFile], *, finalize: bool = True
    ) -> tuple[UUID, str | None]:
        """Create a package, put the files into it in this order, finalize it: its id, and its manifest's address."""

    async def add_file(self, package_id: UUID, file: SourceFile) -> None:
        """Put one more file into a package that exists."""

    async def finalize(self, package_id: UUID) -> None:
        """Finalize a package."""

    async def manifest(self, package_id: UUID, form: Literal["cbor", "json"]) -> bytes:
        """The manifest's bytes."""

    async def contents(self, package_id: UUID) -> dict[str, bytes]:
        """The bytes of every file, by its path."""

    async def tail(self, package_id: UUID | None = None) -> list[TailedEvent]:
        """All events of one package, or of all, as they come."""

    async def replay(self, projection: str) -> None:
        """Fold the projection again from zero; done when it returns."""

    async def digest(self, projection: str) -> str:
        """The view's canonical digest."""

    async def verify(self) -> None:
        """Raise AssertionError when log, blobs or views break an invariant."""

    def expects(self, rejection: Rejection) -> AbstractContextManager[Any]:
        """A context in which the operation must be refused for this reason, in this interface's own words."""


@dataclass(frozen=True)
class Stage:
    """What there is when something is refused: an open package that holds `taken.txt`, and a finalized one."""

    open: UUID
    finalized: UUID


@dataclass(frozen=True)
class Rejection:
    """A request that must be refused: as which error in Python, which status and problem in HTTP, and in which words.

    On the command line it is exit code 1, and the words on standard error.
    """

    name: str
    attempt: Callable[[Driver, Stage], Awaitable[object]]
    error: type[Exception]
    status: int
    problem: str
    words: str


def a_file(relative_path: str) -> SourceFile:
    """Some file of this path."""
    return SourceFile(relative_path, "text/plain", b"some text\n")


TAKEN = "taken.txt"

BAD_PATHS = {
    "that climbs": "../outside.txt",
    "that is absolute": "/etc/hosts",
    "with an empty segment": "a//b.txt",
    "with a control character": "a\x01b.txt",
    "that is not NFC": "cafe\u0301.txt",
    "that is too long": "/".join(["x" * 200] * 5 + ["y" * 20]),
}

REJECTIONS = (
    Rejection(
        "an unknown retention class",
        lambda driver, _: driver.publish(About(retention_class="for-a-while"), [a_file("a.txt")]),
        UnknownRetentionClassError,
        422,
        "unknown-retention-class",
        "unknown retention class",
    ),
    Rejection(
        "a file for an unknown package",
        lambda driver, _: driver.add_file(uuid4(), a_file("a.txt")),
        PackageNotFoundError,
        404,
        "package-not-found",
        "no package",
    ),
    Rejection(
        "finalizing an unknown package",
        lambda driver, _: driver.finalize(uuid4()),
        PackageNotFoundError,
        404,
        "package-not-found",
        "no package",
    ),
    Rejection(
        "the manifest of an unknown package",
        lambda driver, _: driver.manifest(uuid4(), "cbor"),
        PackageNotFoundError,
        404,
        "package-not-found",
        "no package",
    ),
    Rejection(
        "a path that is there already",
        lambda driver, stage: driver.add_file(stage.open, a_file(TAKEN)),
        DuplicateRelativePathError,
        409,
        "duplicate-relative-path",
        "already",
    ),
    Rejection(
        "a file for a finalized package",
        lambda driver, stage: driver.add_file(stage.finalized, a_file("late.txt")),
        IllegalPackageStateError,
        409,
        "illegal-package-state",
        "finalized",
    ),
    Rejection(
        "finalizing a second time",
        lambda driver, stage: driver.finalize(stage.finalized),
        IllegalPackageStateError,
        409,
        "illegal-package-state",
        "finalized",
    ),
    Rejection(
        "the manifest of an open package",
        lambda driver, stage: driver.manifest(stage.open, "json"),
        IllegalPackageStateError,
        409,
        "illegal-package-state",
        "open",
    ),
    *(
        Rejection(
            f"a path {what}",
            lambda driver, stage, path=path: driver.add_file(stage.open, a_file(path)),  # type: ignore[misc]  # mypy
            # cannot type a lambda whose argument has a default (python/mypy#14187)
            InvalidPathError,
            400,
            "invalid-path",
            "relative path must",
        )
        for what, path in BAD_PATHS.items()
    ),
)
