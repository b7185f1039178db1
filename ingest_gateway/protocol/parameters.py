"""The parameters of requests: in path, query and headers, each declared once.

A declaration parses the parameter's text, and describes the parameter in the OpenAPI document. A parameter that only
one module of routes uses is declared there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID

from artifact_store.documents import http as names
from artifact_store.documents.http import UUID_PATTERN, parse_content_md5, parse_digests, parse_id, unquoted
from artifact_store.errors import InvalidPathError, InvalidRequestError
from artifact_store.manifest import ContentAddress
from artifact_store.models import DEFAULT_PAGE, MAX_PAGE
from artifact_store.position import Position
from artifact_store.registry import start_of
from artifact_store.rules import MAX_NUMBER, MAX_TEXT_CHARACTERS, check_path, check_text, parse_number

Value = TypeVar("Value")

Place = Literal["path", "query", "header"]

_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_EVENT_TYPE = re.compile(r"v[1-9][0-9]{0,3}\.[a-z_]{1,32}\.[a-z_]{1,32}")


@dataclass(frozen=True)
class Parameter(Generic[Value]):
    """One parameter. `parse` turns its text into the value or raises InvalidRequestError naming the parameter."""

    name: str
    place: Place
    parse: Callable[[str], Value]
    description: str
    schema: dict[str, Any]
    example: Any = field(default=None)
    repeats: bool = False
    """Whether a query may contain it several times. `schema` describes one value."""


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


def _flag(name: str, description: str, *, default: bool) -> Parameter[bool]:
    """A query parameter that is `true` or `false`."""
    parse = _one_of(name, ("true", "false"))
    schema = {"type": "boolean", "default": default}
    return Parameter(name, "query", lambda text: parse(text) == "true", description, schema)


def _event_type(text: str) -> str:
    if not _EVENT_TYPE.fullmatch(text):
        raise InvalidRequestError("type must be an event's, such as v1.package.finalized")
    return text


def _number(name: str, low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = parse_number(text)
        if number is None or not low <= number <= high:
            raise InvalidRequestError(f"{name} must be a whole number from {low} to {high}")
        return number

    return parse


def whole_number(name: str) -> Callable[[str], int]:
    """A parser for a number of bytes."""
    return _number(name, 0, MAX_NUMBER)


def _path(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            check_path(text)
        except InvalidPathError as error:
            raise InvalidPathError(f"{name}: {error.detail}") from None
        return text

    return parse


def _fingerprint(text: str) -> str:
    if not _FINGERPRINT.fullmatch(text):
        raise InvalidRequestError("fingerprint must be 16 lower-case hex digits")
    return text


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

PACKAGE_ID = Parameter("package_id", "path", partial(parse_id, "package_id"), "The package", _UUID_SCHEMA, _EXAMPLE_ID)
FILE_ID = Parameter("file_id", "path", partial(parse_id, "file_id"), "The file", _UUID_SCHEMA, _EXAMPLE_ID)
UPLOAD_ID = Parameter("upload_id", "path", partial(parse_id, "upload_id"), "The upload", _UUID_SCHEMA, _EXAMPLE_ID)
RELATIVE_PATH = Parameter(
    "relative_path",
    "path",
    unquoted,
    "POSIX path within the package: relative, NFC, no empty, `.` or `..` segment, no control character, at most 1,024 "
    "bytes of UTF-8. Slashes are not encoded (an encoded slash is refused); everything else may be percent-encoded.",
    {"type": "string", "minLength": 1, "maxLength": 1024},
    "report.txt",
)

FINGERPRINT = Parameter(
    "fingerprint",
    "path",
    _fingerprint,
    "CRC-64-AVRO of the schema, as record values hold it: 16 hex digits",
    {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "adaac9728b7e0cb9",
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
    "The most items that the answer may have",
    {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
)
CURSOR = Parameter("cursor", "query", str, "`next` of the previous page", {"type": "string"})
WAIT_SEQUENCE = Parameter(
    "wait_sequence",
    "query",
    _number("wait_sequence", 1, MAX_NUMBER),
    "Wait, for a limited time, until the view has the package's event with this number",
    {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAX_NUMBER},
)
AFTER = Parameter(
    "after",
    "query",
    _path("after"),
    "Only files after this path, in the order of their UTF-8 bytes",
    {"type": "string", "minLength": 1, "maxLength": 1024},
)
LARGEST = Parameter(
    "largest",
    "query",
    _number("largest", 0, MAX_NUMBER),
    "Only files of at most this many bytes",
    {"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_NUMBER},
)
SINCE = Parameter(
    "since",
    "query",
    start_of,
    "Where to begin: after the event of this position; at this time (RFC 3339, to the millisecond); or `now`, at the "
    "log's end. Absent: at the log's start",
    {"type": "string"},
)
OF_PRODUCER = Parameter(
    "producer", "query", _text("producer"), "Only events of packages of these producers", _SHORT_TEXT, repeats=True
)
OF_SUBJECT = Parameter(
    "subject", "query", _text("subject"), "Only events of packages about these subjects", _SHORT_TEXT, repeats=True
)
OF_RETENTION_CLASS = Parameter(
    "retention_class",
    "query",
    _text("retention_class"),
    "Only events of packages that were created with these retention classes",
    _SHORT_TEXT,
    repeats=True,
)
OF_TYPE = Parameter(
    "type",
    "query",
    _event_type,
    "Only events of these types; a type that this release does not know matches nothing",
    {"type": "string", "pattern": f"^{_EVENT_TYPE.pattern}$"},
    "v1.package.finalized",
    repeats=True,
)
ORDER = Parameter(
    "order",
    "query",
    _one_of("order", ("log", "time")),
    "`time`: all events by `created_at`, which takes the gateway longer, and only without `follow`. `log`: in order "
    "per package, and otherwise as they are found",
    {"type": "string", "enum": ["log", "time"], "default": "log"},
)
MANIFESTS = _flag(
    "manifests",
    "Whether `v1.package.finalized` holds the manifest. Its address is `payload_digest` either way",
    default=True,
)
POSITIONS = _flag(
    "positions",
    'Add lines `{"type":"position","position":…}` while no event matches. Server-sent events always have positions, as '
    "an event with only an `id`",
    default=False,
)
OF_PACKAGE = Parameter(
    "package_id", "query", partial(parse_id, "package_id"), "Only events of this package", _UUID_SCHEMA
)
FOLLOW = _flag("follow", "Wait for new events at the log's end instead of closing", default=False)

IDEMPOTENCY_KEY = Parameter(
    names.IDEMPOTENCY_KEY,
    "header",
    _key,
    "Identifies this write. A repeat gets the first answer, until 24 hours after the package is finalized; the same "
    "key with a different request is refused",
    {"type": "string", "format": "uuid"},
)
ACTOR = Parameter(
    names.ACTOR,
    "header",
    _text(names.ACTOR),
    "The name in which the sender acts, in UTF-8. Absent: their own. Another name needs the right to delegate, and the "
    "event then has both",
    _SHORT_TEXT,
)
CONTENT_ADDRESS = Parameter(
    names.CONTENT_ADDRESS,
    "header",
    _address(names.CONTENT_ADDRESS),
    "BLAKE3 that the body must have",
    _ADDRESS_SCHEMA,
)
_DIGEST_RULES = (
    "sha-256 or sha-512, as `sha-256=:BASE64:`. Other algorithms are ignored beside one of these, and refused alone"
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
    "Digest that the representation in the body must have (RFC 9530), with its `Content-Encoding`. A request "
    "contains all of it, so the bytes are those of `Content-Digest`: " + _DIGEST_RULES,
    {"type": "string"},
)
FILE_DIGEST = Parameter(
    names.REPR_DIGEST,
    "header",
    parse_digests(names.REPR_DIGEST),
    "Digest that the whole file must have (RFC 9530), over all of its requests: sha-256, as `sha-256=:BASE64:`. "
    "Other algorithms are ignored beside it, and refused alone",
    {"type": "string"},
)
CONTENT_MD5 = Parameter(
    names.CONTENT_MD5,
    "header",
    parse_content_md5,
    "MD5 that the content must have as it is sent, in base64 (RFC 1864). It only guards against damage in transit",
    {"type": "string"},
)
DIGESTS = (CONTENT_DIGEST, REPR_DIGEST, CONTENT_MD5)
"""Digests that every request with a body may declare. A declared digest is checked or refused, never ignored."""

LAST_EVENT_ID = Parameter(
    names.LAST_EVENT_ID,
    "header",
    lambda text: Position.parse(text) if text else None,
    "Same as `since`, sent by an event source that reconnects; it overrides `since`, which is still in the URL. An "
    "empty value counts as absent",
    {"type": "string"},
)
RANGE = Parameter(
    "Range",
    "header",
    str,
    "One range of bytes (RFC 9110 §14). Malformed or multiple ranges and other units are ignored: all is sent",
    {"type": "string"},
)
IF_RANGE = Parameter(
    "If-Range",
    "header",
    str,
    "Obey `Range` only if this is the strong `ETag`; a date never matches",
    {"type": "string"},
)
IF_MATCH = Parameter("If-Match", "header", str, "412 unless one of these is the `ETag`", {"type": "string"})
IF_NONE_MATCH = Parameter("If-None-Match", "header", str, "304 if one of these is the `ETag`", {"type": "string"})
