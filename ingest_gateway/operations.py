"""What a route says of itself: parameters, body, answers and problems; routing and the OpenAPI document read it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from ingest_gateway.admission import Transfer
from ingest_gateway.call import Call
from ingest_gateway.parameters import Parameter
from services.errors import ArtifactStoreError

Handler = Callable[[Call], Awaitable[web.StreamResponse]]
Schema = Mapping[str, Any]

BINARY: Schema = {}
"""Schema of bytes: the media type alone describes them (OpenAPI 3.1 §4.8.14.3)."""


@dataclass(frozen=True)
class Body:
    """A request body: per media type its shape (a pydantic type) or schema, and an example that works."""

    content: Mapping[str, Any]
    required: bool = True
    example: Any = None
    description: str = ""


@dataclass(frozen=True)
class Success:
    """An answer that is no problem: per media type its shape (a pydantic type) or schema; per header its schema."""

    status: int
    description: str
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One method of one resource. In `template` a last `{relative_path}` takes everything that remains.

    `transfer` says what kind of place a request takes before it is handled; HEAD, which moves no bytes, takes none.
    """

    method: str
    template: str
    handler: Handler
    summary: str
    successes: tuple[Success, ...]
    parameters: tuple[Parameter[Any], ...] = ()
    body: Body | None = None
    problems: tuple[type[ArtifactStoreError], ...] = ()
    description: str = ""
    tag: str = "packages"
    transfer: Transfer | None = None

    @property
    def operation_id(self) -> str:
        """Its name in the document: that of the handler."""
        return self.handler.__name__
