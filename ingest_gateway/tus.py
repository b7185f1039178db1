"""tus 1.0 as a dialect of HTTP: versions, headers of requests and answers, and what the server can do."""

from __future__ import annotations

from datetime import datetime
from email.utils import format_datetime
from functools import wraps

from aiohttp import web

from artifact_store.documents import resumable_uploads as names
from ingest_gateway.call import Call
from ingest_gateway.operations import Handler
from ingest_gateway.parameters import Parameter, whole_number
from ingest_gateway.problems import ProtocolError, answer_of
from services.blobs.resumable.uploads import ALGORITHMS, Checksum
from services.errors import ArtifactStoreError


class UnsupportedTusVersionError(ProtocolError):
    """`Tus-Resumable` is missing, or names a version that is not spoken here; `Tus-Version` names those that are."""

    status = 412
    problem = "unsupported-tus-version"


def _checksum(text: str) -> Checksum:
    return Checksum(*names.parse_checksum(text))


_SIZE = {"type": "integer", "format": "int64", "minimum": 0}

RESUMABLE = Parameter(
    names.TUS_RESUMABLE,
    "header",
    str,
    "The version of tus that the client speaks",
    {"type": "string", "const": names.VERSION},
    names.VERSION,
)
UPLOAD_LENGTH = Parameter(
    names.UPLOAD_LENGTH, "header", whole_number(names.UPLOAD_LENGTH), "Bytes of the whole file; must be said", _SIZE, 11
)
UPLOAD_OFFSET = Parameter(
    names.UPLOAD_OFFSET,
    "header",
    whole_number(names.UPLOAD_OFFSET),
    "Where the upload stands, as HEAD says; must be said",
    _SIZE,
    0,
)
UPLOAD_METADATA = Parameter(
    names.UPLOAD_METADATA,
    "header",
    names.decode_metadata,
    "Pairs of a key and a value in base64. `relative_path` (or `filename`) is the file's path in the package and must "
    "be there, `media_type` (or `filetype`) its media type (absent: application/octet-stream); others are kept only",
    {"type": "string"},
    names.encode_metadata({"relative_path": "report.txt", "media_type": "text/plain"}),
)
UPLOAD_CHECKSUM = Parameter(
    names.UPLOAD_CHECKSUM,
    "header",
    _checksum,
    f"Algorithm ({', '.join(ALGORITHMS)}) and digest in base64 of this request's bytes, which are then taken whole or "
    "not at all",
    {"type": "string"},
)
METHOD_OVERRIDE = Parameter(
    names.METHOD_OVERRIDE,
    "header",
    str,
    "The method that is meant",
    {"type": "string", "enum": ["PATCH", "DELETE"]},
)


def capabilities(longest: int) -> dict[str, str]:
    """The headers that answer OPTIONS; `longest` is the most bytes that an upload may have."""
    return {
        names.TUS_VERSION: names.VERSION,
        names.TUS_EXTENSION: ",".join(names.EXTENSIONS),
        names.TUS_MAX_SIZE: str(longest),
        names.TUS_CHECKSUM_ALGORITHM: ",".join(ALGORITHMS),
    }


def http_date(moment: datetime) -> str:
    """An aware time in UTC as RFC 9110 §5.6.7 writes it."""
    return format_datetime(moment, usegmt=True)


def spoken(handler: Handler) -> Handler:
    """The handler for clients that speak tus: refuses other versions, and says ours in every answer."""

    @wraps(handler)
    async def speak(call: Call) -> web.StreamResponse:
        try:
            said = call.header(RESUMABLE)
            # OPTIONS comes before a version is agreed upon, and reading is of use without tus as well.
            needless = call.request.method == "OPTIONS" or (said is None and call.request.method in ("GET", "HEAD"))
            if said != names.VERSION and not needless:
                raise UnsupportedTusVersionError(
                    f"{names.TUS_RESUMABLE} must say {names.VERSION}", {names.TUS_VERSION: names.VERSION}
                )
            response = await handler(call)
        except ArtifactStoreError as error:
            response = answer_of(error)
        response.headers[names.TUS_RESUMABLE] = names.VERSION
        return response

    return speak
