"""Parameters in path, query and headers: each said once, for reading requests and for the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID

from artifact_store.documents import http as names
from artifact_store.documents.http import UUID_PATTERN, parse_content_md5, parse_digests, parse_id, unquoted
from services.blobs.port import Declared
from services.core.content_address import ContentAddress
from services.core.fields import MAX_TEXT_CHARACTERS, check_text
from services.core.paths import check_path
from services.errors import InvalidPathError, InvalidRequestError
from services.log.position import Position
from services.views.models import DEFAULT_PAGE, MAX_PAGE

Value = TypeVar("Value")
Place = Literal["path", "query", "header"]

_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_DIGITS = re.compile(r"[0-9]{1,19}")
_MAX_LONG = 2**63 - 1


@dataclass(frozen=True)
class Parameter(Generic[Value]):
    """One parameter. `parse` turns its text into the value or raises InvalidRequestError naming the parameter."""

    name: str
    place: Place
    parse: Callable[[str], Value]
    description: str
    schema: dict[str, Any]
    example: Any = field(default=None)


def _id(name: str) -> Callable[[str], UUID]:
    return lambda text: parse_id(name, text)


def _text(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        check_text(name, text)
        return text

    return parse


def _one_of(name: str, allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise InvalidRequestError(f"{name} must be one of {', '.join(allowed)}")
        return text

    return parse


def _number(name: str, low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
            raise InvalidRequestError(f"{name} must be a whole number from {low} to {high}")
        return int(text)

    return parse


def whole_number(name: str) -> Callable[[str], int]:
    """Reads a number of bytes."""
    return _number(name, 0, _MAX_LONG)


def _path(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            check_path(text)
        except InvalidPathError as error:
            raise InvalidPathError(f"{name}: {error.detail}") from None
        return text

    return parse


def _key(text: str) -> UUID:
    if not _UUID.fullmatch(text):
        raise InvalidRequestError(f"{names.IDEMPOTENCY_KEY} must be a UUID")
    return UUID(text)


def _address(name: str) -> Callable[[str], ContentAddress]:
    def parse(text: str) -> ContentAddress:
        try:
            return ContentAddress.parse(text)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{name}: {error.detail}") from None

    return parse


_SHORT_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARACTERS}
_UUID_SCHEMA = {"type": "string", "format": "uuid", "pattern": UUID_PATTERN}
_ADDRESS_SCHEMA = {"type": "string", "pattern": "^blake3:[0-9a-f]{64}$"}
_EXAMPLE_ID = "6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11"

STATUSES = ("created", "finalized", "expired", "purged")

PACKAGE_ID = Parameter("package_id", "path", _id("package_id"), "The package", _UUID_SCHEMA, _EXAMPLE_ID)
FILE_ID = Parameter("file_id", "path", _id("file_id"), "The file", _UUID_SCHEMA, _EXAMPLE_ID)
UPLOAD_ID = Parameter("upload_id", "path", _id("upload_id"), "The upload", _UUID_SCHEMA, _EXAMPLE_ID)
RELATIVE_PATH = Parameter(
    "relative_path",
    "path",
    unquoted,
    "POSIX path within the package: relative, NFC, no empty, `.` or `..` segment, no control character, at most 1,024 "
    "bytes of UTF-8. Slashes stand as they are (an encoded one is refused); everything else may be percent-encoded.",
    {"type": "string", "minLength": 1, "maxLength": 1024},
    "report.txt",
)

PRODUCER = Parameter("producer", "query", _text("producer"), "Only packages of this producer", _SHORT_TEXT)
SUBJECT = Parameter("subject", "query", _text("subject"), "Only packages about this subject", _SHORT_TEXT)
STATUS = Parameter(
    "status",
    "query",
    _one_of("status", STATUSES),
    "Only packages of this status",
    {"type": "string", "enum": list(STATUSES)},
)
RETENTION_CLASS = Parameter(
    "retention_class", "query", _text("retention_class"), "Only packages of this retention class", _SHORT_TEXT
)
MANIFEST_DIGEST = Parameter(
    "manifest_digest",
    "query",
    _address("manifest_digest"),
    "Only packages frozen under this manifest",
    _ADDRESS_SCHEMA,
)
LIMIT = Parameter(
    "limit",
    "query",
    _number("limit", 1, MAX_PAGE),
    "Most items in the answer",
    {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
)
CURSOR = Parameter("cursor", "query", str, "`next` of the page before", {"type": "string"})
WAIT_SEQUENCE = Parameter(
    "wait_sequence",
    "query",
    _number("wait_sequence", 1, _MAX_LONG),
    "Wait, bounded, until the view has the package's event of this number",
    {"type": "integer", "format": "int64", "minimum": 1, "maximum": _MAX_LONG},
)
AFTER = Parameter(
    "after",
    "query",
    _path("after"),
    "Only files behind this path, by the bytes of UTF-8",
    {"type": "string", "minLength": 1, "maxLength": 1024},
)
LARGEST = Parameter(
    "largest",
    "query",
    _number("largest", 0, _MAX_LONG),
    "Only files of at most so many bytes",
    {"type": "integer", "format": "int64", "minimum": 0, "maximum": _MAX_LONG},
)
SINCE = Parameter("since", "query", Position.parse, "Position of the last event that was seen", {"type": "string"})
OF_PACKAGE = Parameter("package_id", "query", _id("package_id"), "Only events of this package", _UUID_SCHEMA)
FOLLOW = Parameter(
    "follow",
    "query",
    lambda text: _one_of("follow", ("true", "false"))(text) == "true",
    "Go on at the log's end, for ever",
    {"type": "boolean", "default": False},
)

IDEMPOTENCY_KEY = Parameter(
    names.IDEMPOTENCY_KEY,
    "header",
    _key,
    "Names this write, so that a repeat answers as the first did, until 24 hours after the package is finalized; with "
    "another request it is refused",
    {"type": "string", "format": "uuid"},
)
ACTOR = Parameter(
    names.ACTOR,
    "header",
    _text(names.ACTOR),
    "Who acts, in UTF-8",
    {**_SHORT_TEXT, "default": "anonymous"},
)
CONTENT_ADDRESS = Parameter(
    names.CONTENT_ADDRESS,
    "header",
    _address(names.CONTENT_ADDRESS),
    "BLAKE3 that the body must have",
    _ADDRESS_SCHEMA,
)
_DIGEST_RULES = (
    "sha-256 or sha-512, as `sha-256=:BASE64:`. Other algorithms are ignored beside one of them, and refused without"
)
CONTENT_DIGEST = Parameter(
    names.CONTENT_DIGEST,
    "header",
    parse_digests(names.CONTENT_DIGEST),
    "Digest that the content must have as it is sent, with its `Content-Encoding` (RFC 9530): " + _DIGEST_RULES,
    {"type": "string"},
)
REPR_DIGEST = Parameter(
    names.REPR_DIGEST,
    "header",
    parse_digests(names.REPR_DIGEST),
    "Digest that the representation in the body must have (RFC 9530), with its `Content-Encoding`. A request brings "
    "all of it, so the bytes are those of `Content-Digest`: " + _DIGEST_RULES,
    {"type": "string"},
)
FILE_DIGEST = Parameter(
    names.REPR_DIGEST,
    "header",
    parse_digests(names.REPR_DIGEST),
    "Digest that the whole file must have (RFC 9530), however many requests bring it: sha-256, as `sha-256=:BASE64:`. "
    "Other algorithms are ignored beside it, and refused without",
    {"type": "string"},
)
CONTENT_MD5 = Parameter(
    names.CONTENT_MD5,
    "header",
    parse_content_md5,
    "MD5 that the content must have as it is sent, in base64 (RFC 1864): against damage on the way only",
    {"type": "string"},
)
DIGESTS = (CONTENT_DIGEST, REPR_DIGEST, CONTENT_MD5)
"""What every request with a body may declare of it. A digest that is declared is checked or refused, never ignored."""

LAST_EVENT_ID = Parameter(
    names.LAST_EVENT_ID,
    "header",
    Position.parse,
    "As `since`, sent by an event source that reconnects; wins over `since`, which its URL still holds",
    {"type": "string"},
)
RANGE = Parameter(
    "Range",
    "header",
    str,
    "One range of bytes (RFC 9110 §14). A malformed one, several, or another unit are ignored: the whole is answered",
    {"type": "string"},
)
IF_RANGE = Parameter(
    "If-Range", "header", str, "Take `Range` only if this is the strong `ETag`; a date never is", {"type": "string"}
)
IF_MATCH = Parameter("If-Match", "header", str, "412 unless one of these is the `ETag`", {"type": "string"})
IF_NONE_MATCH = Parameter("If-None-Match", "header", str, "304 if one of these is the `ETag`", {"type": "string"})


def declared(size: int | None, address: ContentAddress | None, sha256: bytes | None) -> Declared:
    """What a producer says of the bytes, from the headers' values."""
    return Declared(size_bytes=size, blake3=None if address is None else address.digest, sha256=sha256)
