"""Declarations of routes: parameters, body, answers and problems; and the OpenAPI 3.1 document built from them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError as DistributionNotFoundError
from importlib.metadata import version
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, TypeAdapter

from artifact_store.documents.http import RETRY_AFTER
from artifact_store.documents.problem_details import MEDIA_TYPE, TYPE_PREFIX, Problem
from artifact_store.errors import (
    ArtifactStoreError,
    ForbiddenError,
    PushBackError,
    UnauthenticatedError,
    UnavailableError,
)
from ingest_gateway.admission import QuotaExceededError, TooManyAtOnceError, Transfer
from ingest_gateway.protocol.http_errors import (
    ExpectationFailedError,
    ForeignOriginError,
    HeadTooLargeError,
    MalformedHttpError,
    UnknownHostError,
)
from ingest_gateway.protocol.parameters import Parameter
from ingest_gateway.protocol.request import Call
from services.core.access import Right

Handler = Callable[[Call], Awaitable[web.StreamResponse]]
Access = Right | Literal["open", "identified"]
"""Who may call a route: whoever has this right on some packages, anyone (`open`), or anyone who proves who they are."""

Schema = Mapping[str, Any]

BINARY: Schema = {"type": "string", "format": "binary"}
"""Schema of bytes. OpenAPI 3.1 needs none, but client generators take a body without a schema for JSON."""


@dataclass(frozen=True)
class Stream:
    """A body of items, each in this shape (a pydantic type). It may be endless."""

    item: Any


@dataclass(frozen=True)
class Body:
    """A request body: per media type its shape (a pydantic type) or schema, and a working example."""

    content: Mapping[str, Any]
    required: bool = True
    example: Any = None
    description: str = ""


@dataclass(frozen=True)
class Success:
    """A successful answer: its shape (a pydantic type) or schema per media type, and the schemas of its headers."""

    status: int
    description: str
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One method of one resource. `{relative_path}` at the end of `template` matches the rest of the path.

    `access` is checked before anything else; the registry checks on which packages the caller has the right.
    `transfer` is the kind of place (see `admission`) that a request takes before it is handled. HEAD moves no bytes
    and takes no place.
    """

    method: str
    template: str
    handler: Handler
    summary: str
    successes: tuple[Success, ...]
    access: Access = field(kw_only=True)
    parameters: tuple[Parameter[Any], ...] = ()
    body: Body | None = None
    problems: tuple[type[ArtifactStoreError], ...] = ()
    description: str = ""
    tag: str = "packages"
    transfer: Transfer | None = None
    cookie: str | None = None
    """The cookie that may contain the token, for pages whose browser sends no `Authorization`."""

    @property
    def operation_id(self) -> str:
        """The operation's name in the OpenAPI document: that of the handler."""
        return self.handler.__name__


_ANYWHERE = (
    MalformedHttpError,
    ForeignOriginError,
    ExpectationFailedError,
    UnknownHostError,
    HeadTooLargeError,
    TooManyAtOnceError,
    QuotaExceededError,
    PushBackError,
)
"""Problems of every route: a malformed request, an unknown expectation, and a gateway that is full."""

_SCHEME = "bearer"
_COOKIE_SCHEME = "cookie"
_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of an issuer that the gateway's policy names, or a static one. A gateway without a policy "
    "listens on loopback only, asks for no token, and gives everyone all rights.",
}

_REF = "#/components/schemas/{model}"
_DESCRIPTION = """\
A registry of packages: named sets of artifact files. Producers stream files in; finalizing a package freezes it under a
manifest whose BLAKE3 digest is its content address. Everything that happens is an event.

Errors are `application/problem+json` (RFC 9457) with a stable `type`. Times are RFC 3339 in UTC with six digits of a
second, digests lower-case hex. Identifiers in paths and queries are lower-case canonical UUIDs; a query parameter that
is not listed is refused. `HEAD` works wherever `GET` does. Answers may gain fields."""


def document(routes: Iterable[Route]) -> bytes:
    """The OpenAPI document in JSON."""
    schemas: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    schemes: dict[str, Any] = {_SCHEME: _BEARER}
    for route in routes:
        if route.cookie is not None:
            schemes[_COOKIE_SCHEME] = {"type": "apiKey", "in": "cookie", "name": route.cookie}
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, schemas)
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "artifact-store",
                "version": _version(),
                "description": _DESCRIPTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [],
            "tags": [
                {"name": "packages", "description": "Packages and their manifests"},
                {"name": "files", "description": "Files and their bytes"},
                {"name": "events", "description": "What happened"},
                {"name": "subscriptions", "description": "Events sent to URLs"},
                {"name": "usage", "description": "What came in"},
                {"name": "operation", "description": "For those who run it"},
            ],
            "paths": paths,
            "components": {"schemas": schemas, "securitySchemes": schemes},
        },
        ensure_ascii=False,
    ).encode()


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": route.operation_id,
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": [_parameter(p) for p in route.parameters],
        "responses": {
            **_successes(route.successes, schemas),
            **dict(
                _problems(dict.fromkeys((*_ANYWHERE, *_refusals(route), *route.problems, ArtifactStoreError)), schemas)
            ),
        },
    }
    if route.access != "open":
        found["security"] = [{_SCHEME: []}, *([{_COOKIE_SCHEME: []}] if route.cookie else []), {}]
    if isinstance(route.access, Right):
        found["x-right"] = str(route.access)
    if route.description:
        found["description"] = route.description
    if route.body is not None:
        found["requestBody"] = _body(route.body, schemas)
    return found


def _refusals(route: Route) -> tuple[type[ArtifactStoreError], ...]:
    if route.access == "open":
        return ()
    return (UnauthenticatedError, ForbiddenError) if isinstance(route.access, Right) else (UnauthenticatedError,)


def _parameter(parameter: Parameter[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "description": parameter.description,
        "schema": {"type": "array", "items": parameter.schema} if parameter.repeats else parameter.schema,
    }
    if parameter.example is not None:
        found["example"] = [parameter.example] if parameter.repeats else parameter.example
    return found


def _body(body: Body, schemas: dict[str, Any]) -> dict[str, Any]:
    content = {media_type: {"schema": _schema(shape, schemas)} for media_type, shape in body.content.items()}
    if body.example is not None:
        for media in content.values():
            media["example"] = body.example
    return {"required": body.required, "content": content, "description": body.description}


def _successes(successes: Iterable[Success], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for success in successes:
        answer: dict[str, Any] = {"description": success.description}
        if success.content:
            answer["content"] = {media_type: _media(shape, schemas) for media_type, shape in success.content.items()}
        if success.headers:
            answer["headers"] = {name: {"schema": schema} for name, schema in success.headers.items()}
        found[str(success.status)] = answer
    return found


def _problems(kinds: Iterable[type[ArtifactStoreError]], schemas: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    by_status: dict[int, list[type[ArtifactStoreError]]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    for status, of_status in sorted(by_status.items()):
        lines = [f"- `{TYPE_PREFIX}{kind.problem}`: {(kind.__doc__ or '').splitlines()[0]}" for kind in of_status]
        answer: dict[str, Any] = {
            "description": "\n".join(lines),
            "content": {MEDIA_TYPE: {"schema": _schema(Problem, schemas)}},
        }
        if status in (401, 403):
            answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
        if any(issubclass(kind, PushBackError | UnavailableError) for kind in of_status):
            answer["headers"] = {RETRY_AFTER: {"schema": {"type": "integer", "minimum": 1}}}
        yield str(status), answer


def _media(shape: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The media type object. Generators must not read a stream as one JSON value, so `x-itemSchema` holds the schema of
    its items (OpenAPI 3.2: `itemSchema`)."""
    if isinstance(shape, Stream):
        return {"schema": BINARY, "x-itemSchema": _schema(shape.item, schemas)}
    return {"schema": _schema(shape, schemas)}


def _schema(shape: Any, schemas: dict[str, Any]) -> Mapping[str, Any]:
    """A schema unchanged; or, for a shape, a reference to its schema, which is added to the components."""
    if isinstance(shape, Mapping):
        return shape
    inline = TypeAdapter(shape).json_schema(ref_template=_REF, mode="serialization")
    schemas.update(inline.pop("$defs", {}))
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        schemas[shape.__name__] = inline
        return {"$ref": _REF.format(model=shape.__name__)}
    return inline


def _version() -> str:
    try:
        return version("artifact-store")
    except DistributionNotFoundError:  # run from a checkout that is not installed
        return "0"
