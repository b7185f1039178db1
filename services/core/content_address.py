"""Content addresses: the BLAKE3 digest of a document or blob, as people and stores write it."""

from __future__ import annotations

import re
from typing import Self

from services.errors import InvalidRequestError

_FORM = re.compile(r"blake3:[0-9a-f]{64}")


class ContentAddress(str):
    """`blake3:` and 64 lower-case hex digits. A `str`, so that it prints, compares and serialises as one."""

    __slots__ = ()

    @classmethod
    def of_digest(cls, digest: bytes) -> Self:
        """The address of what has this BLAKE3 digest (32 raw bytes)."""
        return cls(f"blake3:{digest.hex()}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address that came from outside. Raises InvalidRequestError when it has another form."""
        if not _FORM.fullmatch(text):
            raise InvalidRequestError("a content address is `blake3:` followed by 64 lower-case hex digits")
        return cls(text)

    @property
    def digest(self) -> bytes:
        """The 32 raw bytes."""
        return bytes.fromhex(self.removeprefix("blake3:"))


def content_key(blake3: bytes) -> str:
    """The key under which a blob store keeps the bytes of this BLAKE3 digest (32 raw bytes)."""
    text = blake3.hex()
    return f"blobs/blake3/{text[:2]}/{text[2:4]}/{text}"
