"""Answers in JSON, and the headers that every answer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from pydantic import BaseModel

JSON = "application/json"
SERVER = "artifact-store"
"""What `Server` says: no versions."""
IMMUTABLE = "private, max-age=31536000, immutable"
"""`Cache-Control` of what never changes under its address; private, because reading will need a right."""

LOCATION: Mapping[str, Any] = {"type": "string", "format": "uri-reference"}
ETAG: Mapping[str, Any] = {"type": "string", "pattern": '^"[^"]+"$'}
TEXT: Mapping[str, Any] = {"type": "string"}


def json_answer(
    answer: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = JSON
) -> web.Response:
    """The answer as JSON; not to be cached, because the next event may change it."""
    body = answer.model_dump_json().encode()
    return bytes_answer(body, media_type, status=status, headers={"Cache-Control": "no-store", **(headers or {})})


def bytes_answer(
    body: bytes, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """These bytes under this media type."""
    return web.Response(status=status, body=body, headers={"Content-Type": media_type, **(headers or {})})
