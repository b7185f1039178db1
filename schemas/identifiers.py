"""Identifiers that are derived, never drawn, so that a replay gives the same ones (UUIDv5, RFC 9562 §5.5)."""

from __future__ import annotations

from hashlib import sha1
from typing import Self
from uuid import UUID, SafeUUID, uuid5

_PACKAGES = UUID("6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11")
"""Namespace of package ids; drawn once, fixed for good."""

_UNKNOWN = SafeUUID.unknown
_set = object.__setattr__
_VERSION_5 = 5 << 76 | 0x8000 << 48
_NOT_VERSION = ~(0xF000 << 64 | 0xC000 << 48)


class Identifier(UUID):
    """A UUID that keeps its text, which a writer needs in payload, headers, digests and manifest of one event."""

    __slots__ = ("_text",)

    _text: str

    def __init__(self, number: int) -> None:
        # As UUID does it: instances are immutable to everyone else.
        _set(self, "int", number)
        _set(self, "is_safe", _UNKNOWN)
        text = f"{number:032x}"
        _set(self, "_text", f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}")

    @classmethod
    def of(cls, identifier: UUID) -> Self:
        """The same identifier, keeping its text from now on."""
        return identifier if isinstance(identifier, cls) else cls(identifier.int)

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[type[Identifier], tuple[int]]:
        return Identifier, (self.int,)


def package_id(actor: str, command_id: UUID) -> UUID:
    """The id of the package that this command of this actor creates, so that a retry finds it again."""
    return uuid5(uuid5(_PACKAGES, actor), str(command_id))


def event_id(package: UUID, sequence: int) -> Identifier:
    """The id of the package's event number `sequence` (from 1)."""
    return _derived(package, str(sequence))


def file_id(package: UUID, relative_path: str) -> Identifier:
    """The id of the package's file of this path."""
    return _derived(package, f"file:{relative_path}")


def location_id(file: UUID, backend_id: str, key: str, offset: int, length: int) -> Identifier:
    """The id of one place where the file's bytes lie."""
    return _derived(file, f"location:{backend_id}:{key}:{offset}:{length}")


def _derived(namespace: UUID, name: str) -> Identifier:
    """What `uuid.uuid5` gives, at half its cost."""
    digest = sha1(namespace.bytes + name.encode(), usedforsecurity=False).digest()
    return Identifier(int.from_bytes(digest[:16], "big") & _NOT_VERSION | _VERSION_5)
