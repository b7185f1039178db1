"""Identifiers that are derived, never drawn, so that a replay gives the same ones (UUIDv5, RFC 9562 §5.5)."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Iterable
from hashlib import sha1
from struct import Struct
from typing import Self
from uuid import UUID, SafeUUID, uuid5

_PACKAGES = UUID("6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11")
"""Namespace of package ids; drawn once, fixed for good."""

_set = object.__setattr__
_VERSION = bytes(byte & 0x0F | 0x50 for byte in range(256))
_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))
_GROUPS = Struct("8s4s4s4s12s8x")
"""The hex digits of a UUID in a SHA-1, of which the last are of no use."""

DERIVED_BYTES = 20
"""From one of `derived_all` to the next."""

_VARIANTS = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}


class Identifier(UUID):
    """A UUID that is kept as text, all that a writer needs of most; its number is made when it is asked for."""

    __slots__ = ("_text",)

    _text: str

    def __init__(self, text: str) -> None:
        """`text` is in the canonical form."""
        # As UUID does it: instances are immutable to everyone else.
        _set(self, "_text", text)

    @classmethod
    def of(cls, identifier: UUID) -> Self:
        """The same identifier, keeping its text from now on."""
        return identifier if isinstance(identifier, cls) else cls(str(identifier))

    @property  # type: ignore[misc] # final in UUID, whose own code asks for it all the same
    def int(self) -> int:
        """The 128 bits as a number."""
        return int(self._text.replace("-", ""), 16)

    @property  # type: ignore[misc] # as above
    def is_safe(self) -> SafeUUID:
        """Of interest only for identifiers that were made from the time."""
        return SafeUUID.unknown

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[type[Identifier], tuple[str]]:
        return Identifier, (self._text,)


def package_id(actor: str, command_id: UUID) -> UUID:
    """The id of the package that this command of this actor creates, so that a retry finds it again."""
    return uuid5(uuid5(_PACKAGES, actor), str(command_id))


def partition_id(log: UUID, partition: int) -> UUID:
    """What stands in place of a package's id in the administrative records of one partition of a log."""
    return uuid5(log, f"partition:{partition}")


def event_id(package: UUID, sequence: int) -> Identifier:
    """The id of the package's event number `sequence` (from 1)."""
    return _derived(package, f"{sequence}")


def file_id(package: UUID, relative_path: str) -> Identifier:
    """The id of the package's file of this path."""
    return _derived(package, f"file:{relative_path}")


def location_id(file: UUID, backend_id: str, key: str, offset: int, length: int) -> Identifier:
    """The id of one place where the file's bytes lie."""
    return _derived(file, f"location:{backend_id}:{key}:{offset}:{length}")


def _derived(namespace: UUID, name: str) -> Identifier:
    """What `uuid.uuid5` gives, in a quarter of the time."""
    found = sha1(namespace.bytes + name.encode(), usedforsecurity=False).hexdigest()
    return Identifier(f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{_VARIANTS[found[16]]}{found[17:20]}-{found[20:32]}")


def derived_all(names: Iterable[bytes]) -> tuple[bytes, list[bytes]]:
    """What `uuid.uuid5` gives for each name, a namespace's 16 bytes before it: the numbers' bytes, and the texts.

    The bytes of one begin DERIVED_BYTES behind those of the one before. All at once takes half the time.
    """
    found = bytearray(b"".join([sha1(name, usedforsecurity=False).digest() for name in names]))
    found[6::DERIVED_BYTES] = found[6::DERIVED_BYTES].translate(_VERSION)
    found[8::DERIVED_BYTES] = found[8::DERIVED_BYTES].translate(_VARIANT)
    return bytes(found), list(map(b"-".join, _GROUPS.iter_unpack(hexlify(found))))
