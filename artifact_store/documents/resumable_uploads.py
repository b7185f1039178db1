"""Resumable uploads by tus 1.0 (https://tus.io/protocols/resumable-upload): its headers, and our additional JSON.

tus has no request for the result of an upload; here GET returns it, as an `UploadAnswer`. tus also has no parts that
are sent straight to the blob store; here the gateway signs addresses for them, in answer to a `DirectPartsRequest`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Annotated
from uuid import UUID

from pydantic import Field

from artifact_store.documents.shapes import Answer, FileIngestedAnswer, Request, Size, TimeText
from artifact_store.errors import InvalidRequestError

VERSION = "1.0.0"
EXTENSIONS = ("creation", "creation-with-upload", "termination", "checksum", "expiration")
CONTENT_TYPE = "application/offset+octet-stream"

TUS_RESUMABLE = "Tus-Resumable"
TUS_VERSION = "Tus-Version"
TUS_EXTENSION = "Tus-Extension"
TUS_MAX_SIZE = "Tus-Max-Size"
TUS_CHECKSUM_ALGORITHM = "Tus-Checksum-Algorithm"
UPLOAD_OFFSET = "Upload-Offset"
UPLOAD_LENGTH = "Upload-Length"
UPLOAD_METADATA = "Upload-Metadata"
UPLOAD_CHECKSUM = "Upload-Checksum"
UPLOAD_EXPIRES = "Upload-Expires"
UPLOAD_DIRECT = "Upload-Direct"
"""Our own header: the size of parts that may be sent straight to the blob store. Absent if that is not possible."""

METHOD_OVERRIDE = "X-HTTP-Method-Override"

RELATIVE_PATH = ("relative_path", "filename")
"""Keys of `Upload-Metadata` for the file's path. The first one present counts; foreign clients send the second."""

MEDIA_TYPE = ("media_type", "filetype")
"""The same for its media type."""

_PAIR = re.compile(r"(?P<key>[!-+\--~]+)(?: (?P<value>[A-Za-z0-9+/=]*))?")


class UploadAnswer(Answer):
    """The state of an upload. `file` is set once the file is in its package."""

    upload_id: UUID
    package_id: UUID
    relative_path: str
    media_type: str
    length: Size
    offset: Size = Field(description="Bytes that are stored")
    created_at: TimeText
    expires_at: TimeText = Field(description="When it is removed if nothing more comes; its file stays")
    file: FileIngestedAnswer | None = None


MAX_DIRECT_PARTS = 64
"""How many parts one request may name as sent, and how many as wanted."""

Crc32 = Annotated[int, Field(ge=0, le=0xFFFFFFFF, description="CRC-32 of the part's bytes (as zlib has it)")]
Number = Annotated[int, Field(ge=1, le=100_000_000)]


class WantedPart(Request):
    """A part to be sent straight to the store: its length and checksum, for which its address is signed."""

    length: Size
    crc32: Crc32


class SentPart(WantedPart):
    """A part that the store has accepted, with the `ETag` of its answer."""

    number: Number
    etag: str = Field(min_length=1, max_length=128, pattern=r"^[ -~]+$")


class DirectPartsRequest(Request):
    """Parts that were sent, from `offset` on, and those after them that are to be sent next."""

    offset: Size
    sent: list[SentPart] = Field(default_factory=list, max_length=MAX_DIRECT_PARTS)
    wanted: list[WantedPart] = Field(default_factory=list, max_length=MAX_DIRECT_PARTS)


class DirectPartAnswer(Answer):
    """Where one part goes: PUT its bytes to `url` with these headers."""

    number: Number
    url: str
    headers: dict[str, str]


class DirectPartsAnswer(Answer):
    """An address for each wanted part, in their order; none if the rest must be sent through the gateway."""

    offset: Size = Field(description="Bytes that are recorded as sent")
    parts: list[DirectPartAnswer]


def encode_metadata(values: Mapping[str, str]) -> str:
    """The value of `Upload-Metadata` for these values."""
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())


def decode_metadata(text: str) -> dict[str, str]:
    """The values in `Upload-Metadata`. Raises InvalidRequestError if it is malformed or has a key twice."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        match = _PAIR.fullmatch(pair.strip(" "))
        if match is None:
            raise InvalidRequestError(f"{UPLOAD_METADATA} must be pairs of a key and a base64 value: `key BASE64, …`")
        key = match["key"]
        if key in found:
            raise InvalidRequestError(f"{UPLOAD_METADATA} names {key[:64]!r} twice")
        try:
            found[key] = base64.b64decode(match["value"] or "", validate=True).decode()
        except ValueError:
            raise InvalidRequestError(f"{UPLOAD_METADATA}: {key[:64]!r} is not UTF-8 in base64") from None
    return found


def parse_checksum(text: str) -> tuple[str, bytes]:
    """Algorithm and raw digest in `Upload-Checksum`. Raises InvalidRequestError."""
    algorithm, _, digest = text.partition(" ")
    try:
        return algorithm, base64.b64decode(digest, validate=True)
    except ValueError:  # it is not ASCII, or not base64
        raise InvalidRequestError(f"{UPLOAD_CHECKSUM} must be an algorithm and a digest in base64") from None
