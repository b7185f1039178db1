"""The access table: every route, kind of event, read of a view and call of the client, by every sender.

Tokens are real: an issuer signs them, and the gateway checks them by a policy and a file of static tokens. A route, a
kind of event or a call without a row in its table here fails the test.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from blake3 import blake3

import artifact_store
import schemas
from artifact_store.archives.bundle import HeldFiles, NamedFile, SmallFile
from artifact_store.byte_streams import from_any, joined
from artifact_store.errors import ForbiddenError, NotFoundError, UnauthenticatedError
from artifact_store.events import (
    DELEGATED_FILE_INGESTED,
    DELEGATED_PACKAGE_CREATED,
    DELEGATED_PACKAGE_FINALIZED,
    FILE_INGESTED,
    LOG_SKIPPED,
    LOSS_ACCEPTED,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    AdministrativePayload,
    Event,
    LogSkipped,
    LossAccepted,
    RecordedEvent,
)
from artifact_store.models import Declared, EventFilter, Page
from artifact_store.position import Position
from ingest_gateway.app import ROUTES
from ingest_gateway.routes.event_feed import COOKIE
from schemas.codec import schema_fingerprint
from services.blobs.resumable.uploads import NewUpload
from services.config import Settings
from services.core.access import EVERYWHERE, Packages, Right, Scope, all_rights
from services.identity.authenticator import Authenticator
from services.identity.static_tokens import create_token, revoke_tokens
from services.log.records import administrative_event
from services.registry.origins import Origins, ScopedFilter
from services.webhooks.subscriptions import Subscriptions
from tests.integration.http.test_strangers import Request, tar
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS
from tests.integration.tokens import bearer
from tests.oidc_provider import AUDIENCE, Provider, provider
from tests.unit.identity.test_tokens import BAD

SCHEMAS = Path(schemas.__file__).parent

POLICY = """
[[issuer]]
alias = "ci"
url = "{url}"
audience = ["{audience}"]
""" + "".join(
    f'[[rule]]\nissuer = "ci"\nclaims = {{{{ sub = "{sub}" }}}}\ncan = {can}\nproducers = ["{producer}"]\n'
    for sub, can, producer in (
        ("owner", '["read", "write", "subscribe"]', "team-a"),
        ("reader", '["read"]', "team-a"),
        ("another", '["read", "write", "subscribe"]', "team-b"),
    )
)

REFUSED = {
    "expired": BAD["expired"][0],
    "forged": BAD["forged by another key"][0],
    "changed": BAD["changed after it was signed"][0],
    "wrong audience": BAD["wrong audience"][0],
    "algorithm none": BAD["alg none"][0],
    "HMAC with the public key": BAD["HMAC with the public key"][0],
}
"""Tokens that nobody may be taken for; beside them there is none at all, and one that was revoked."""


@dataclass(frozen=True)
class Scene:
    """A gateway with what producer `team-a` has: an open and a finalized package with a file each, and uploads."""

    gateway: RunningGateway
    tokens: dict[str, str | None]
    """By sender; None is no token."""
    names: dict[str, str]
    """What the placeholders of `Request` stand for."""

    @property
    def nobody(self) -> list[str]:
        return [name for name in self.tokens if name in REFUSED or name in ("no token", "revoked")]


@asynccontextmanager
async def scene(settings: Settings, folder: Path) -> AsyncIterator[Scene]:
    async with provider() as issuer:
        policy, static = folder / "policy.toml", folder / "tokens.json"
        policy.write_text(POLICY.format(url=issuer.url, audience=AUDIENCE))
        made, revoked = create_token(static, "gone", list(Right), now=time.time())
        revoke_tokens(static, made.id)
        async with (
            Authenticator(policy=policy, tokens=static) as authenticator,
            running_gateway(settings, authenticate=authenticator.authenticate) as gateway,
        ):
            yield Scene(gateway, _tokens(issuer, revoked), await _filled(gateway))


def _tokens(issuer: Provider, revoked: str) -> dict[str, str | None]:
    known = {sub: issuer.token(sub=sub) for sub in ("owner", "reader", "another", "powerless")}
    return {"no token": None, **{kind: make(issuer) for kind, make in REFUSED.items()}, "revoked": revoked, **known}


async def _filled(gateway: RunningGateway) -> dict[str, str]:
    registry = gateway.parts.registry
    package, done = [await registry.create_package("secret", "team-a", "main", "scratch") for _ in range(2)]
    files = [await registry.ingest_file(one, "a/b.txt", "text/plain", b"bytes") for one in (package, done)]
    await registry.finalize_package(done)
    names = {"package": package, "done": done, "file": files[1]}
    for name in ("added", "ended", "overridden"):
        new = NewUpload(package, name, "x/y", "ci:owner", 3, Declared())
        names[name] = (await registry.uploads.create(new)).upload_id
    kept, end = Subscriptions(gateway.parts.views), await gateway.parts.log.end()
    made = await kept.create("ci:owner", {}, "https://receiver.example/", EventFilter(), end)
    names["subscription"] = made.subscription_id
    return {name: str(value) for name, value in names.items()} | {"digest": f"blake3:{blake3(b'bytes').hexdigest()}"}


async def asked(
    scene: Scene, sender: str, request: Request, names: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""

    def filled(text: str) -> str:
        for name, value in (names or scene.names).items():
            text = text.replace(f"{{{name}}}", value)
        return text

    token = scene.tokens[sender]
    headers = {**dict(request.headers), **({} if token is None else bearer(token))}
    if request.body and "Content-Type" not in headers:
        headers["Content-Type"] = "application/json"
    body = filled(request.body.decode("latin-1")).encode("latin-1")
    async with scene.gateway.session.request(
        request.method, filled(request.target), headers=headers, data=body or None
    ) as answer:
        return answer.status, dict(answer.headers), await answer.read()


@dataclass(frozen=True)
class Row:
    """A request for what `team-a` has, and the status that each sender with a sound token gets."""

    owner: int
    reader: int
    another: int
    powerless: int
    target: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def request(self, method: str, template: str) -> Request:
        return Request(method, self.target or template, self.headers, self.body)


TUS = (("Tus-Resumable", "1.0.0"),)
OFFSET = (*TUS, ("Content-Type", "application/offset+octet-stream"), ("Upload-Offset", "0"))
TO_ALL = (200, 200, 200, 200)
UPLOADS = "/v1/packages/{package_id}/uploads"
UPLOAD = UPLOADS + "/{upload_id}"
SUBSCRIPTIONS = "/v1/subscriptions"
SUBSCRIPTION = SUBSCRIPTIONS + "/{subscription_id}"

ROWS: dict[tuple[str, str], Row] = {
    ("POST", "/v1/packages"): Row(
        *(201, 403, 403, 403),
        body=b'{"name": "n", "producer": "team-a", "subject": "main", "retention_class": "scratch"}',
    ),
    ("GET", "/v1/packages"): Row(200, 200, 200, 403),
    ("GET", "/v1/packages/{package_id}"): Row(200, 200, 404, 403, "/v1/packages/{package}"),
    ("GET", "/v1/usage"): Row(200, 200, 200, 403),
    ("GET", "/v1/packages/{package_id}/files"): Row(200, 200, 404, 403, "/v1/packages/{package}/files"),
    ("PUT", "/v1/packages/{package_id}/files/{relative_path}"): Row(
        *(201, 403, 404, 403), "/v1/packages/{package}/files/c", body=b"new"
    ),
    ("GET", "/v1/packages/{package_id}/files/{relative_path}"): Row(
        *(200, 200, 404, 403), "/v1/packages/{package}/files/a/b.txt"
    ),
    ("GET", "/v1/files/{file_id}"): Row(200, 200, 404, 403, "/v1/files/{file}"),
    ("GET", "/v1/files/{file_id}/content"): Row(200, 200, 404, 403, "/v1/files/{file}/content"),
    ("POST", "/v1/packages/{package_id}/files"): Row(
        *(201, 403, 404, 403), "/v1/packages/{package}/files", (("Content-Type", "application/x-tar"),), tar("d")
    ),
    ("GET", "/v1/packages/{package_id}/archive"): Row(200, 200, 404, 403, "/v1/packages/{done}/archive"),
    ("POST", "/v1/blobs/known"): Row(200, 403, 200, 403, body=b'{"addresses": ["{digest}"]}'),
    ("OPTIONS", UPLOADS): Row(204, 204, 204, 204, "/v1/packages/{package}/uploads"),
    ("POST", UPLOADS): Row(
        *(201, 403, 404, 403),
        "/v1/packages/{package}/uploads",
        (*TUS, ("Upload-Length", "3"), ("Upload-Metadata", "filename ZQ==")),
    ),
    ("OPTIONS", UPLOAD): Row(204, 204, 204, 204, "/v1/packages/{package}/uploads/{added}"),
    ("GET", UPLOAD): Row(200, 403, 404, 403, "/v1/packages/{package}/uploads/{added}"),
    ("POST", UPLOAD + "/parts"): Row(
        *(200, 403, 404, 403),
        "/v1/packages/{package}/uploads/{added}/parts",
        (("Content-Type", "application/json"),),
        b'{"offset": 0}',
    ),
    ("PATCH", UPLOAD): Row(204, 403, 404, 403, "/v1/packages/{package}/uploads/{added}", OFFSET, b"new"),
    ("DELETE", UPLOAD): Row(204, 403, 404, 403, "/v1/packages/{package}/uploads/{ended}", TUS),
    ("POST", UPLOAD): Row(
        *(204, 403, 404, 403),
        "/v1/packages/{package}/uploads/{overridden}",
        (*TUS, ("X-HTTP-Method-Override", "DELETE")),
    ),
    ("GET", "/v1/packages/{package_id}/manifest"): Row(200, 200, 404, 403, "/v1/packages/{done}/manifest"),
    ("POST", SUBSCRIPTIONS): Row(*(201, 403, 201, 403), body=b'{"url": "https://receiver.example/"}'),
    ("GET", SUBSCRIPTIONS): Row(200, 403, 200, 403),
    ("GET", SUBSCRIPTION): Row(200, 403, 404, 403, "/v1/subscriptions/{subscription}"),
    ("PATCH", SUBSCRIPTION): Row(
        *(200, 403, 404, 403), "/v1/subscriptions/{subscription}", body=b'{"url": "https://other.example/"}'
    ),
    ("POST", f"{SUBSCRIPTION}/rotate"): Row(200, 403, 404, 403, "/v1/subscriptions/{subscription}/rotate"),
    ("POST", f"{SUBSCRIPTION}/test"): Row(202, 403, 404, 403, "/v1/subscriptions/{subscription}/test"),
    ("POST", f"{SUBSCRIPTION}/redeliver"): Row(
        *(202, 403, 404, 403), "/v1/subscriptions/{subscription}/redeliver", body=b'{"since": "2026-01-01T00:00:00Z"}'
    ),
    ("GET", f"{SUBSCRIPTION}/deliveries"): Row(200, 403, 404, 403, "/v1/subscriptions/{subscription}/deliveries"),
    ("DELETE", SUBSCRIPTION): Row(204, 403, 404, 403, "/v1/subscriptions/{subscription}"),
    ("GET", "/v1/events"): Row(200, 200, 200, 403),
    ("GET", "/v1/events/end"): Row(200, 200, 200, 403),
    ("POST", "/v1/events/cookie"): Row(204, 204, 204, 204),
    ("DELETE", "/v1/events/cookie"): Row(204, 204, 204, 204),
    ("GET", "/v1/schemas/{fingerprint}"): Row(*TO_ALL, f"/v1/schemas/{schema_fingerprint(FILE_INGESTED).hex()}"),
    ("GET", "/v1/whoami"): Row(*TO_ALL),
    **{("GET", path): Row(*TO_ALL) for path in ("/v1/login", "/healthz", "/readyz", "/metrics", "/openapi.json")},
    ("POST", "/v1/packages/{package_id}/finalize"): Row(200, 403, 404, 403, "/v1/packages/{package}/finalize"),
}
"""By method and template, in an order in which the owner's requests can follow each other."""


async def test_every_route_answers_every_sender_as_its_row_says(embedded_settings: Settings, tmp_path: Path) -> None:
    routes = {(route.method, route.template): route for route in ROUTES}
    assert ROWS.keys() == routes.keys(), "a route without a row, or a row without a route"
    async with scene(embedded_settings, tmp_path) as stage:
        secrets = ("team-a", "secret", stage.names["package"], stage.names["done"])
        for key, row in ROWS.items():
            request = row.request(*key)
            recorded = await stage.gateway.events()
            for sender in stage.nobody:
                for method in (key[0], *(("HEAD",) if key[0] == "GET" else ())):
                    named = Request(method, request.target, request.headers, request.body)
                    status, headers, body = await asked(stage, sender, named)
                    if routes[key].access == "open":
                        assert status == row.owner, (key, sender)
                        continue
                    assert status == 401, (key, sender)
                    assert ("invalid_token" in headers["WWW-Authenticate"]) == (sender != "no token")
                    token = stage.tokens[sender]
                    assert token is None or token.encode() not in body + str(headers).encode()
            for sender in ("powerless", "another", "reader"):
                status, _, body = await asked(stage, sender, request)
                assert status == getattr(row, sender), (key, sender, body)
                if status == 200 and sender == "another" and routes[key].access != "open":
                    assert not [one for one in secrets if one.encode() in body], (key, body)
                if status == 404:
                    assert body == (await unknown(stage, sender, request)), key
            assert await stage.gateway.events() == recorded, (key, "somebody else's request was recorded")
            status, _, body = await asked(stage, "owner", request)
            assert status == row.owner, (key, body)


async def test_a_token_in_a_cookie_is_worth_no_more_and_opens_the_feed_alone(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    async with scene(embedded_settings, tmp_path) as stage:
        for sender, token in stage.tokens.items():
            cookie = {} if token is None else {"Cookie": f"{COOKIE}={token}"}
            async with stage.gateway.session.get("/v1/events", headers=cookie) as answer:
                wanted = 401 if sender in stage.nobody else getattr(ROWS["GET", "/v1/events"], sender)
                assert answer.status == wanted, sender
            for path in ("/v1/packages", "/v1/whoami", f"/v1/packages/{stage.names['package']}"):
                async with stage.gateway.session.get(path, headers=cookie) as answer:
                    assert answer.status == 401, (sender, path)


async def unknown(stage: Scene, sender: str, request: Request) -> bytes:
    """The body of the same request for what is not there, with the identifiers of what is."""
    others = {name: str(uuid4()) for name in stage.names}
    _, _, body = await asked(stage, sender, request, others)
    for name, other in others.items():
        body = body.replace(other.encode(), stage.names[name].encode())
    return body


EVENTS = {
    **dict.fromkeys((PACKAGE_CREATED, FILE_INGESTED, PACKAGE_FINALIZED), True),
    **dict.fromkeys((DELEGATED_PACKAGE_CREATED, DELEGATED_FILE_INGESTED, DELEGATED_PACKAGE_FINALIZED), True),
    **dict.fromkeys((LOG_SKIPPED, LOSS_ACCEPTED), False),
}
"""Every kind of event, and whether who may read only its producer's packages sees it; who may read all sees all."""


async def test_every_kind_of_event_is_seen_by_those_who_may_read_its_package(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    assert EVENTS.keys() == {path.stem for path in SCHEMAS.glob("*.avsc")}, "a kind of event has no row"
    async with scene(embedded_settings, tmp_path) as stage:
        stage.names["delegated"] = await _delegated(stage.gateway)
        for accept in ("application/x-ndjson", "text/event-stream"):
            for target, version in (
                ("/v1/events", "v"),
                ("/v1/events?package_id={done}", "v1."),
                ("/v1/events?package_id={delegated}", "v2."),
            ):
                request = Request("GET", target, (("Accept", accept),))
                shown = {sender: await asked(stage, sender, request) for sender in ("reader", "another", "powerless")}
                for kind, of_a_package in EVENTS.items():
                    expected = of_a_package and kind.startswith(version)
                    assert (kind.encode() in shown["reader"][2]) == expected, (kind, target)
                assert (shown["another"][0], shown["another"][2].partition(b"id: ")[0]) == (200, b"")
                assert b"data:" not in shown["another"][2]
                assert shown["powerless"][0] == 403


async def _delegated(gateway: RunningGateway) -> str:
    """A package that somebody filled in another's name."""
    registry = gateway.parts.registry.for_principal(all_rights("ci:bot"), delegates=True)
    package = await registry.create_package("secret", "team-a", "main", "scratch", "ci:owner")
    await registry.ingest_file(package, "a/b.txt", "text/plain", b"bytes", "ci:owner")
    await registry.finalize_package(package, "ci:owner")
    return str(package)


def test_records_of_the_log_itself_are_for_those_who_may_read_everything() -> None:
    """A partition's records belong to no producer."""
    log = UUID(int=9)
    payloads: dict[str, AdministrativePayload] = {
        LOG_SKIPPED: LogSkipped(log, 3, 41, b"d" * 32, 7, "it is no event", "a stray producer"),
        LOSS_ACCEPTED: LossAccepted(log, 3, "file", None, 41, b"d" * 32, None, 41, "an old copy"),
    }
    assert payloads.keys() == {kind for kind, of_a_package in EVENTS.items() if not of_a_package}
    for kind, payload in payloads.items():
        event = administrative_event(payload, None, created_at=1, actor="ada", command_id=uuid4())
        assert event.event_type == kind
        asyncio.run(_check_hidden(event))


async def _check_hidden(event: Event) -> None:
    origins = Origins()
    values = {one.name: getattr(event, one.name) for one in fields(event)}
    origins.note(RecordedEvent(**values, position=Position(UUID(int=9), {})))
    everything_by_parts = Scope((Packages(("a*", "*b")), Packages(("*",), ("main",))))
    assert await origins.hidden({event.package_id}, ScopedFilter(scope=everything_by_parts)) == {event.package_id}
    assert await origins.hidden({event.package_id}, ScopedFilter(scope=EVERYWHERE)) == set()


Use = Callable[[artifact_store.Client, dict[str, UUID]], Awaitable[object]]


def _digest() -> bytes:
    return blake3(b"bytes").digest()


async def _all(items: Any) -> list[Any]:
    async with aclosing(items) as found:
        return [item async for item in found]


def _bundle() -> HeldFiles:
    return HeldFiles([SmallFile(f"bundle/{uuid4()}", "x/y", b"bundle")])


def _named() -> list[NamedFile]:
    return [NamedFile(f"named/{uuid4()}", "x/y", 5, _digest(), _digest())]


NEW = ("n", "team-a", "main", "scratch")
CALLS: dict[str, tuple[Use, str, str]] = {
    "create_package": (lambda c, n: c.create_package(*NEW), "forbidden", "forbidden"),
    "create": (lambda c, n: c.create(*NEW, "anonymous", {}), "forbidden", "forbidden"),
    "check_ingest": (lambda c, n: c.check_ingest(n["package"], "free"), "", "not found"),
    "ingest": (
        lambda c, n: c.ingest(n["package"], str(uuid4()), "x/y", from_any(b"1"), "anonymous", declared=Declared()),
        *("forbidden", "not found"),
    ),
    "ingest_file": (
        lambda c, n: c.ingest_file(n["package"], str(uuid4()), "x/y", b"2"),
        *("forbidden", "not found"),
    ),
    "ingest_files": (lambda c, n: c.ingest_files(n["package"], _bundle(), "anonymous"), "forbidden", "not found"),
    "ingest_named": (lambda c, n: c.ingest_named(n["package"], _named(), "anonymous"), "forbidden", "not found"),
    "stream": (lambda c, n: _streamed(c, n["package"]), "forbidden", "not found"),
    "known_blobs": (lambda c, n: c.known_blobs([_digest()]), "forbidden", "empty"),
    "get_package": (lambda c, n: c.get_package(n["package"]), "", "not found"),
    "list_packages": (lambda c, n: c.list_packages(), "", "empty"),
    "list_files": (lambda c, n: c.list_files(n["package"]), "", "not found"),
    "list_usage": (lambda c, n: c.list_usage(), "", "empty"),
    "get_file": (lambda c, n: _bytes(c.get_file(n["file"])), "", "not found"),
    "get_file_record": (lambda c, n: c.get_file_record(n["file"]), "", "not found"),
    "get_file_at": (lambda c, n: c.get_file_at(n["package"], "a/b.txt"), "", "not found"),
    "open_content": (lambda c, n: _bytes(c.open_content(n["file"])), "", "not found"),
    "get_manifest_bytes": (lambda c, n: c.get_manifest_bytes(n["done"]), "", "not found"),
    "read_files": (lambda c, n: _all(c.read_files(n["done"])), "", "not found"),
    "read_events": (lambda c, n: _all(c.read_events()), "", "empty"),
    "tail_events": (lambda c, n: _first(c.tail_events()), "", "nothing comes"),
    "events": (lambda c, n: _first(c.events(None)), "", "nothing comes"),
    "finalize": (lambda c, n: c.finalize(n["other"], "anonymous"), "forbidden", "not found"),
    "finalize_package": (lambda c, n: c.finalize_package(n["package"]), "forbidden", "not found"),
}
"""Every call of the client, and what the reader and the producer of something else get: an error, or nothing.

The reader gets an answer where the text is empty. The owner gets one everywhere.
"""


async def _bytes(content: Awaitable[AsyncIterator[bytes]]) -> bytes:
    return await joined(await content)


async def _streamed(client: artifact_store.Client, package_id: UUID) -> None:
    async with client.stream(package_id) as files:
        await (await files.add(f"stream/{uuid4()}", b"bytes"))


async def _first(events: Any) -> object:
    async with aclosing(events):
        return await anext(events)


def test_every_call_of_the_client_has_a_row() -> None:
    calls = {name for name, _ in inspect.getmembers(artifact_store.Client, inspect.isfunction) if name[0] != "_"}
    assert CALLS.keys() == calls


async def test_every_call_of_the_client_gives_every_sender_what_its_row_says(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # where no login is kept
    async with scene(embedded_settings, tmp_path) as stage, AsyncExitStack() as stack:
        names = {name: UUID(value) for name, value in stage.names.items() if name != "digest"}
        names["other"] = await stage.gateway.parts.registry.create_package("other", "team-a", "main", "scratch")
        clients: dict[str, artifact_store.Client] = {}
        for sender, token in stage.tokens.items():
            file = tmp_path / f"{sender} token"
            file.write_text(token or "")
            file.chmod(0o600)
            made = artifact_store.Client(stage.gateway.url, token_file=None if token is None else file)
            clients[sender] = await stack.enter_async_context(made)
        for name, (call, reader, another) in CALLS.items():
            recorded = await stage.gateway.events()
            for sender in stage.nobody:
                with pytest.raises(UnauthenticatedError):
                    await call(clients[sender], names)
            with pytest.raises(ForbiddenError):
                await call(clients["powerless"], names)
            for sender, wanted in (("reader", reader), ("another", another)):
                seconds = 0.5 if wanted == "nothing comes" else SECONDS
                assert await outcome(call(clients[sender], names), seconds) == wanted, (name, sender)
            assert await stage.gateway.events() == recorded, name
            await call(clients["owner"], names)


async def outcome(answer: Awaitable[object], seconds: float) -> str:
    """What a call came to, in the words of CALLS."""
    try:
        async with asyncio.timeout(seconds):
            found = await answer
    except ForbiddenError:
        return "forbidden"
    except NotFoundError:
        return "not found"
    except TimeoutError:
        return "nothing comes"
    items = found.items if isinstance(found, Page) else found
    return "empty" if items in ((), [], frozenset()) else ""
