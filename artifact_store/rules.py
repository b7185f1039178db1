"""Rules for what a caller names: short texts, metadata, relative paths, numbers and hosts.

The client checks them before it sends anything, the gateway before it accepts anything.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from artifact_store.canonical import jcs
from artifact_store.errors import InvalidPathError, InvalidRequestError, TooLargeError

MAX_TEXT_CHARACTERS = 256

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Unicode's categories Cc and Cs, which are closed for good (Unicode Character Encoding Stability Policies)."""

MAX_PATH_BYTES = 1024

MAX_NUMBER = 2**63 - 1
"""The largest number that is taken from outside: Avro, SQL and HTTP clients hold it in 64 bits."""

_NUMBER = re.compile("[0-9]{1,19}")

MAX_PAIRS = 10
"""At most this many clashing paths are named; all are counted."""

_NO_SEGMENTS = frozenset({"", ".", ".."})

_SEGMENT = "[ -\\-0-~][ -.0-~]*+"

_PLAIN = f"{_SEGMENT}(?:/{_SEGMENT})*+"

_PLAIN_PATH = re.compile(_PLAIN)
"""A path that certainly keeps all rules but the one on length: ASCII, no segment empty or beginning with a dot."""

_PLAIN_LINES = re.compile(f"{_PLAIN}(?:\n{_PLAIN})*+")


@lru_cache(1_024)
def _holds_control_again(text: str) -> bool:
    """As `holds_control`, cached: short texts recur."""
    return _CONTROL.search(text) is not None


def holds_control(text: str) -> bool:
    """Whether the text holds a control character or a surrogate."""
    return _CONTROL.search(text) is not None


def check_text(field: str, value: str) -> None:
    """Raise InvalidRequestError, naming `field` and the rule, unless the value is 1 to 256 plain characters."""
    if not 1 <= len(value) <= MAX_TEXT_CHARACTERS:
        raise InvalidRequestError(f"{field} must have 1 to {MAX_TEXT_CHARACTERS} characters, not {len(value):,}")
    if _holds_control_again(value):
        raise InvalidRequestError(f"{field} must not hold control characters or surrogates")


def check_header_text(field: str, value: str) -> None:
    """As `check_text`, for a text that travels in a header, where a space at either end would be lost."""
    check_text(field, value)
    if value != value.strip(" \t"):
        raise InvalidRequestError(f"{field} must not begin or end with a space: it travels in a header")


def metadata_text(metadata: Any, max_bytes: int) -> str:
    """Bring metadata, a JSON object, to JCS form.

    Raises:
        InvalidRequestError: it is no object, or holds what I-JSON and JCS do not take.
        TooLargeError: the JCS form is longer than `max_bytes` bytes of UTF-8.
    """
    if not isinstance(metadata, dict):
        raise InvalidRequestError("metadata must be a JSON object")
    try:
        text = jcs(metadata)
    except ValueError as error:
        raise InvalidRequestError(f"metadata: {error}") from None
    check_metadata_size(text, max_bytes)
    return text


def check_metadata_size(text: str, max_bytes: int) -> None:
    """Raise TooLargeError when the JCS form is longer than `max_bytes` bytes of UTF-8."""
    size = len(text.encode())
    if size > max_bytes:
        raise TooLargeError(f"metadata is {size:,} bytes in JCS form; the limit is {max_bytes:,}")


def parse_number(text: str) -> int | None:
    """The number in decimal digits; None for any other text, and above MAX_NUMBER.

    Use this for headers and parameters. `int` also takes signs, blanks, underscores and the digits of other scripts,
    and raises ValueError for more than 4,300 digits.
    """
    number = int(text) if _NUMBER.fullmatch(text) else None
    return number if number is not None and number <= MAX_NUMBER else None


def check_host(host: str) -> None:
    """Raise ValueError for a host name that no resolver accepts; resolvers raise UnicodeError for it."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError("the host name is invalid") from None


def is_loopback(host: str) -> bool:
    """Whether this host, a name or an address without brackets, can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def folders_above(path: str) -> Iterator[str]:
    """The folders of a file with this path, deepest first."""
    end = path.rfind("/")
    while end > 0:
        yield path[:end]
        end = path.rfind("/", 0, end)


def add_folders(folders: set[str], paths: Iterable[str]) -> None:
    """Add the folders of these paths. If a folder is in the set, its parents are too."""
    for path in paths:
        for folder in folders_above(path):
            if folder in folders:
                break
            folders.add(folder)


class PathPair(NamedTuple):
    """Two paths that are the same name on some file systems: a file's, and another file's or a folder's."""

    path: str
    other: str


class Unportable(NamedTuple):
    """How many paths of a package clash with an earlier one, and the first of them."""

    number: int = 0
    pairs: tuple[PathPair, ...] = ()


NONE_UNPORTABLE = Unportable()


def unportable(files: Iterable[str], folders: Iterable[str]) -> Unportable:
    """Find paths that differ only by case or Unicode form, among files in their order and their folders.

    Paths are compared by NFKC and case folding, which is at least as coarse as what file systems do. Folders that clash
    only with each other are not counted: one folder then holds the files of both. Takes 20 ms for 100,000 ASCII paths,
    90 ms for others of 30 characters.
    """
    files, folders = list(files), list(folders)
    keys, above = [_portable(path) for path in files], [_portable(path) for path in folders]
    first = dict(zip(reversed(keys), reversed(files), strict=True))
    if len(first) == len(keys) and first.keys().isdisjoint(above):
        return NONE_UNPORTABLE
    pairs = [PathPair(first[key], path) for key, path in zip(keys, files, strict=True) if first[key] != path]
    pairs += sorted(PathPair(first[key], folder) for key, folder in zip(above, folders, strict=True) if key in first)
    return Unportable(len(pairs), tuple(pairs[:MAX_PAIRS]))


def _portable(path: str) -> str:
    """A key that two paths share if some file system treats them as one name."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


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
