"""Identifiers that are derived, never random, so that a replay gives the same ones (UUIDv5, RFC 9562 §5.5)."""

from __future__ import annotations

from uuid import UUID, uuid5

_PACKAGES = UUID("6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11")
"""The namespace of package ids: a random UUID that never changes."""


def package_id(sender: str, command_id: UUID) -> UUID:
    """The id of the package that this command creates, so that a retry finds it again.

    `sender` is the actor, or the principal if one acts in the actor's name.
    """
    return uuid5(uuid5(_PACKAGES, sender), str(command_id))


def partition_id(log: UUID, partition: int) -> UUID:
    """The id that the administrative records of a log's partition have in place of a package's id."""
    return uuid5(log, f"partition:{partition}")


def event_id(package: UUID, sequence: int) -> UUID:
    """The id of the package's event with this sequence (from 1)."""
    return uuid5(package, f"{sequence}")


def file_id(package: UUID, relative_path: str) -> UUID:
    """The id of the package's file with this path."""
    return uuid5(package, f"file:{relative_path}")


def location_id(file: UUID, backend_id: str, key: str, offset: int, length: int) -> UUID:
    """The id of one place where the file's bytes lie."""
    return uuid5(file, f"location:{backend_id}:{key}:{offset}:{length}")
