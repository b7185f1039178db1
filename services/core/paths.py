"""Rules for relative paths: POSIX, relative, NFC, no segment that climbs, bounded."""

from __future__ import annotations

import unicodedata

from services.errors import InvalidPathError

MAX_PATH_BYTES = 1024


def check_path(path: str) -> None:
    """Raise InvalidPathError, naming the rule, unless `path` may be a file's relative path."""
    if not path:
        raise InvalidPathError("a relative path must not be empty")
    if path.startswith("/"):
        raise InvalidPathError("a relative path must not begin with '/'")
    if any(segment in ("", ".", "..") for segment in path.split("/")):
        raise InvalidPathError("a relative path must not hold an empty, '.' or '..' segment")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
        raise InvalidPathError("a relative path must not hold a NUL, another control character or a surrogate")
    if not unicodedata.is_normalized("NFC", path):
        raise InvalidPathError("a relative path must be in Unicode normalisation form NFC")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidPathError(f"a relative path must not be longer than {MAX_PATH_BYTES:,} bytes of UTF-8")
