"""Rules for relative paths: POSIX, relative, NFC, no segment that climbs, bounded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from services.core.fields import holds_control
from services.errors import InvalidPathError

MAX_PATH_BYTES = 1024

_NO_SEGMENTS = frozenset({"", ".", ".."})

_SEGMENT = "[ -\\-0-~][ -.0-~]*+"
_PLAIN = f"{_SEGMENT}(?:/{_SEGMENT})*+"
_PLAIN_PATH = re.compile(_PLAIN)
"""A path that surely keeps all rules but that of length: ASCII, no segment empty or with a dot first."""
_PLAIN_LINES = re.compile(f"{_PLAIN}(?:\n{_PLAIN})*+")


def folders_above(path: str) -> Iterator[str]:
    """The folders that a file of this path lies in, the deepest first."""
    end = path.rfind("/")
    while end > 0:
        yield path[:end]
        end = path.rfind("/", 0, end)


def add_folders(folders: set[str], paths: Iterable[str]) -> None:
    """Add the folders that files of these paths lie in. A folder that is there already has those above it beside it."""
    for path in paths:
        for folder in folders_above(path):
            if folder in folders:
                break
            folders.add(folder)


def check_paths(paths: Sequence[str]) -> None:
    """Raise InvalidPathError, naming the rule, unless all of them may be files' relative paths."""
    lines = "\n".join(paths)
    plain = _PLAIN_LINES.fullmatch(lines) and lines.count("\n") == len(paths) - 1
    if not plain or max(map(len, paths)) > MAX_PATH_BYTES:
        for path in paths:
            check_path(path)


def check_path(path: str) -> None:
    """Raise InvalidPathError, naming the rule, unless `path` may be a file's relative path."""
    if _PLAIN_PATH.fullmatch(path) and len(path) <= MAX_PATH_BYTES:
        return
    if not path:
        raise InvalidPathError("a relative path must not be empty")
    if path.startswith("/"):
        raise InvalidPathError("a relative path must not begin with '/'")
    if not _NO_SEGMENTS.isdisjoint(path.split("/")):
        raise InvalidPathError("a relative path must not hold an empty, '.' or '..' segment")
    if holds_control(path):
        raise InvalidPathError("a relative path must not hold a NUL, another control character or a surrogate")
    if not unicodedata.is_normalized("NFC", path):
        raise InvalidPathError("a relative path must be in Unicode normalisation form NFC")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidPathError(f"a relative path must not be longer than {MAX_PATH_BYTES:,} bytes of UTF-8")
