"""Media types guessed from file names, with Python's own table only, so that every machine gives the same."""

from __future__ import annotations

from functools import lru_cache
from mimetypes import MimeTypes

DEFAULT_MEDIA_TYPE = "application/octet-stream"

_COMPRESSED = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "xz": "application/x-xz",
    "compress": "application/x-compress",
}
_TYPES = MimeTypes()


def guess_media_type(name: str) -> str:
    """The media type for this file name; `application/octet-stream` if it is unknown."""
    last = name.rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    if dot and stem.strip(".") and "." not in stem and ":" not in last:
        return _of_ending(ending)  # the usual case: only the ending matters
    return _guess(last)


@lru_cache(1024)
def _of_ending(ending: str) -> str:
    return _guess(f"x.{ending}")


def _guess(last: str) -> str:
    found, compressed = _TYPES.guess_type(last)
    if compressed is not None:
        return _COMPRESSED.get(compressed, DEFAULT_MEDIA_TYPE)
    return found or DEFAULT_MEDIA_TYPE
