"""Identifiers that are derived, never drawn, so that a replay gives the same ones (UUIDv5, RFC 9562 §5.5)."""

from __future__ import annotations

from uuid import UUID, uuid5

_PACKAGES = UUID("6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11")
"""Namespace of package ids; drawn once, fixed for good."""


def package_id(sender: str, command_id: UUID) -> UUID:
    """The id of the package that this command creates, so that a retry finds it again.

    `sender` is the actor; with a principal, who acts in the actor's name, the principal.
    """
    return uuid5(uuid5(_PACKAGES, sender), str(command_id))


def partition_id(log: UUID, partition: int) -> UUID:
    """What stands in place of a package's id in the administrative records of one partition of a log."""
    return uuid5(log, f"partition:{partition}")


def event_id(package: UUID, sequence: int) -> UUID:
    """The id of the package's event number `sequence` (from 1)."""
    return uuid5(package, f"{sequence}")


def file_id(package: UUID, relative_path: str) -> UUID:
    """The id of the package's file of this path."""
    return uuid5(package, f"file:{relative_path}")


def location_id(file: UUID, backend_id: str, key: str, offset: int, length: int) -> UUID:
    """The id of one place where the file's bytes lie."""
    return uuid5(file, f"location:{backend_id}:{key}:{offset}:{length}")
