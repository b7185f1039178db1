"""The blocks of a tar archive: headers and pax records, taken apart and put together."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from services.errors import InvalidArchiveError

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

OCTAL_LIMIT = 8 << 30
"""From here on a size does not fit into the header's twelve octal digits."""

_FIELDS = struct.Struct("100s 24x 12s 12x 8s c 100x 8s 80x 155s 12x")
_USTAR = b"ustar\x00"
_GNU = b"ustar  \x00"
_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Header:
    """What of a header counts: the name with its prefix, the size in bytes, the kind of entry."""

    name: bytes
    size: int
    kind: bytes


def parse_header(block: bytes, number: int) -> Header:
    """Take a header apart; `number` is the entry's, for messages. Raises InvalidArchiveError."""
    name, size, checksum, kind, magic, prefix = _FIELDS.unpack(block)
    name = name.partition(b"\0")[0]
    # The checksum counts its own field as blanks (POSIX.1-2017 pax, "ustar Interchange Format").
    if number_of(checksum) != sum(block) - sum(checksum) + 8 * 0x20:
        raise InvalidArchiveError(
            f"entry {number} has a header whose checksum is wrong: no tar archive, or a damaged one"
        )
    if magic.startswith(_USTAR):
        if prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
    elif magic != _GNU and magic.strip(b"\0"):
        raise InvalidArchiveError(f"entry {number} has a header of an unknown form {magic!r}")
    found = number_of(size)
    if found is None:
        raise InvalidArchiveError(f"entry {number}, {shown(name.decode('utf-8', 'backslashreplace'))}, has no size")
    return Header(name, found, kind)


def number_of(field: bytes) -> int | None:
    """The number in a field: octal digits, or binary with the highest bit set (GNU); None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():  # which also has no sign and no underscore in it
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def parse_pax(body: bytes, number: int) -> list[tuple[str, bytes]]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header. Raises InvalidArchiveError."""
    found: list[tuple[str, bytes]] = []
    at = 0
    while at < len(body):
        blank = body.find(b" ", at, at + 8)
        digits = body[at:blank] if blank > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if end <= blank or end > len(body) or body[end - 1 : end] != b"\n" or not equals or not key:
            raise InvalidArchiveError(f"entry {number} has a pax header that is malformed")
        found.append((key.decode("utf-8", "backslashreplace"), value))
        at = end
    return found


def file_header(name: bytes, size: int, modified: int) -> bytes:
    """The header of a regular file whose name has at most 100 bytes and whose size is below 8 GiB."""
    return _header(name, size, modified, b"0")


def pax_header(records: dict[str, str]) -> bytes:
    """A pax header for the entry that follows, padded to whole blocks."""
    body = b"".join(_pax_record(key, value) for key, value in records.items())
    return _header(b"PaxHeaders/entry", len(body), 0, b"x") + body + bytes(-len(body) % BLOCK)


def _header(name: bytes, size: int, modified: int, kind: bytes) -> bytes:
    head = b"%s0000644\x000000000\x000000000\x00%011o\x00%011o\x00" % (name.ljust(100, b"\0"), size, modified)
    tail = kind + bytes(100) + _USTAR + b"00"
    checksum = sum(head) + sum(tail) + 8 * 0x20
    return (b"%s%06o\x00 %s" % (head, checksum, tail)).ljust(BLOCK, b"\0")


def _pax_record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text)
    while (total := len(text) + len(str(length))) != length:
        length = total
    return str(length).encode() + text


def shown(name: str) -> str:
    """The name of an entry for a message: escaped and bounded."""
    text = ascii(name) if not name.isprintable() else f"'{name}'"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
