"""Access to routes: each one is tried with every kind of token."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from uuid import uuid4

import pytest

from artifact_store.events import PACKAGE_CREATED
from ingest_gateway.app import ROUTES
from ingest_gateway.protocol import request
from ingest_gateway.protocol.declaration import Route
from schemas.codec import schema_fingerprint
from services.config import Settings
from services.core.access import Right, all_rights
from tests.integration.http.test_strangers import tar
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS, STALLING_BYTES, connected
from tests.integration.tokens import Tokens, bearer, principal

OPEN = {
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/login")),
    ("GET", "/v1/schemas/{fingerprint}"),
    ("DELETE", "/v1/events/cookie"),
    ("OPTIONS", "/v1/packages/{package_id}/uploads"),
    ("OPTIONS", "/v1/packages/{package_id}/uploads/{upload_id}"),
}
"""What is answered to everybody."""

TOKENS = Tokens(
    expired=replace(principal("old", *Right), expires_at=1.0),
    reader=principal("reader", Right.READ),
    writer=principal("writer", Right.WRITE),
    operator=principal("operator", Right.OPERATE, Right.DISPOSE, Right.DELEGATE, Right.SUBSCRIBE),
    subscriber=principal("subscriber", Right.READ, Right.SUBSCRIBE),
    nothing=principal("nothing"),
)


def target(route: Route) -> str:
    """A path of the route, with identifiers of what is not there."""
    ids = {name: uuid4() for name in ("package_id", "file_id", "upload_id", "subscription_id")}
    fingerprint = schema_fingerprint(PACKAGE_CREATED).hex()
    return route.template.format(**ids, relative_path="a/b", fingerprint=fingerprint)


async def status(gateway: RunningGateway, route: Route, token: str | None) -> int:
    headers = {} if token is None else bearer(token)
    async with gateway.session.request(route.method, target(route), headers=headers) as answer:
        if answer.status in (401, 403):
            assert answer.content_type == "application/problem+json"
            challenge = answer.headers["WWW-Authenticate"]
            assert challenge.startswith('Bearer realm="artifact-store"')
            assert ("error=" in challenge) == (token is not None)
        return answer.status


async def test_every_route_is_refused_to_those_who_may_not_call_it(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        for route in ROUTES:
            name = f"{route.method} {route.template}"
            found = {token: await status(gateway, route, token) for token in (None, *TOKENS.principals)}
            if (route.method, route.template) in OPEN:
                assert all(answered < 400 for answered in found.values()), name
                continue
            if route.access == "identified":
                assert (found.pop(None), found.pop("expired")) == (401, 401), name
                assert set(found.values()) <= {200, 204}, name
                continue
            assert (found[None], found["expired"], found["nothing"]) == (401, 401, 403), name
            allowed = {token for token, answered in found.items() if answered not in (401, 403)}
            reads = route.method == "GET" and "uploads" not in name
            wanted = {"reader", "subscriber"} if reads else {"writer"}
            if route.access is Right.SUBSCRIBE:  # to have events sent takes the right to read them, too
                wanted = {"subscriber"} | ({"operator"} if route.template != "/v1/subscriptions" or reads else set())
            assert allowed == wanted, name
        assert await gateway.events() == 0


async def test_what_is_open_names_no_package_and_nobody(embedded_settings: Settings) -> None:
    names = {"name": "the-name", "producer": "the-producer", "subject": "the-subject", "retention_class": "scratch"}
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        async with gateway.session.post("/v1/packages", json=names, headers=bearer("writer")) as answer:
            package = (await answer.json())["package_id"]
        async with gateway.session.put(
            f"/v1/packages/{package}/files/the-path", data=b"x", headers=bearer("writer")
        ) as answer:
            file = (await answer.json())["file_id"]
        for path in (f"/v1/packages/{package}", f"/v1/files/{file}", "/v1/packages?producer=the-producer"):
            async with gateway.session.get(path, headers=bearer("reader")) as answer:
                assert answer.status == 200
        for method, template in OPEN:
            if method == "GET" and "{" not in template:
                async with gateway.session.get(template) as answer:
                    shown = await answer.text()
                for secret in (package, file, "the-", "ci:writer", "ci:reader"):
                    assert secret not in shown, template


async def test_a_head_request_needs_what_its_get_needs(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        for path in (f"/v1/files/{uuid4()}/content", "/v1/events"):
            async with gateway.session.head(path) as answer:
                assert answer.status == 401
            async with gateway.session.head(path, headers=bearer("writer")) as answer:
                assert answer.status == 403


async def test_an_upload_is_refused_before_it_is_asked_for(embedded_settings: Settings) -> None:
    # No place is free: whoever got as far as asking for one would be pushed back.
    async with (
        running_gateway(embedded_settings, authenticate=TOKENS, max_uploads=0) as gateway,
        connected(gateway.port) as client,
    ):
        client.send(f"PUT /v1/packages/{uuid4()}/files/a", "Content-Length: 5", "Expect: 100-continue")
        answer = await client.answer()  # a 100 would come first
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        async with gateway.session.put(f"/v1/packages/{uuid4()}/files/a", headers=bearer("reader")) as refused:
            assert refused.status == 403
        async with gateway.session.put(f"/v1/packages/{uuid4()}/files/a", headers=bearer("writer")) as full:
            assert full.status == 503


async def test_two_authorizations_are_none(embedded_settings: Settings) -> None:
    async with (
        running_gateway(embedded_settings, authenticate=TOKENS) as gateway,
        connected(gateway.port) as client,
    ):
        client.send("GET /v1/packages", "Authorization: Bearer reader", "Authorization: Bearer writer")
        assert (await client.answer()).status == 401


async def test_a_method_in_a_header_needs_the_rights_of_that_method(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "/v1/packages/{package_id}/uploads/{upload_id}"
    loosened = [
        replace(route, access="open") if (route.method, route.template) == ("POST", template) else route
        for route in ROUTES
    ]
    monkeypatch.setattr("ingest_gateway.app.ROUTES", tuple(loosened))
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        path = template.format(package_id=uuid4(), upload_id=uuid4())
        for method, answered in (("DELETE", 401), ("PATCH", 401), ("HEAD", 412)):  # 412: no version of tus is named
            async with gateway.session.post(path, headers={"X-HTTP-Method-Override": method}) as answer:
                assert answer.status == answered


async def test_an_actor_may_not_be_another_than_the_sender(embedded_settings: Settings) -> None:
    package = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        post = gateway.session.post
        async with post("/v1/packages", json=package, headers={**bearer("writer"), "X-Actor": "ada"}) as answer:
            assert (answer.status, (await answer.json())["type"]) == (403, "urn:artifact-store:problem:forbidden")
        async with post("/v1/packages", json=package, headers=bearer("writer")) as answer:
            assert answer.status == 201
        async with gateway.session.get("/v1/events", headers=bearer("reader")) as answer:
            (line,) = (await answer.text()).splitlines()
        assert json.loads(line)["actor"] == "ci:writer"


async def test_an_upload_takes_no_bytes_of_another_sender(embedded_settings: Settings) -> None:
    """Both may write to the package; the event of the file names who began the upload."""
    tokens = Tokens(ada=principal("ada", Right.WRITE), bob=principal("bob", Right.WRITE))
    package = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
    tus = {"Tus-Resumable": "1.0.0"}
    async with running_gateway(embedded_settings, authenticate=tokens) as gateway:
        async with gateway.session.post("/v1/packages", json=package, headers=bearer("ada")) as answer:
            uploads = f"{answer.headers['Location']}/uploads"
        begun = {**tus, **bearer("ada"), "Upload-Length": "2", "Upload-Metadata": f"relative_path {_base64('u')}"}
        async with gateway.session.post(uploads, headers=begun) as answer:
            assert answer.status == 201, await answer.text()
            upload = answer.headers["Location"]
        part = {**tus, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        for token, expected in (("bob", 404), ("ada", 204)):
            async with gateway.session.patch(upload, data=b"ok", headers={**part, **bearer(token)}) as answer:
                assert answer.status == expected, await answer.text()


@pytest.mark.parametrize("kind", ["content", "archive"])
@pytest.mark.parametrize("change", ["revoked", "fewer rights"])
async def test_a_download_ends_with_the_rights_to_it(embedded_settings: Settings, kind: str, change: str) -> None:
    tokens = Tokens(t=principal("t", Right.READ, producers=("p",)))
    async with running_gateway(embedded_settings, authenticate=tokens, heartbeat_seconds=0.0) as gateway:
        registry = gateway.parts.registry
        package = await registry.create_package("n", "p", "s", "scratch")
        file = await registry.ingest_file(package, "a", "x/y", bytes(STALLING_BYTES))
        await registry.finalize_package(package)
        path = {"content": f"/v1/files/{file}/content", "archive": f"/v1/packages/{package}/archive"}[kind]
        async with connected(gateway.port) as client:
            client.send(f"GET {path}", "Authorization: Bearer t")
            assert (await client.head())[0] == 200
            if change == "revoked":
                del tokens.principals["t"]
            else:
                tokens.principals["t"] = principal("t", Right.READ, producers=("other",))
            came = 0
            with suppress(ConnectionError):
                async with asyncio.timeout(SECONDS):
                    while piece := await client.reader.read(1 << 20):
                        came += len(piece)
            assert came < STALLING_BYTES


TUS = ("Tus-Resumable: 1.0.0", "Content-Type: application/offset+octet-stream")
BODIES = (
    ("PUT {package}/files/a", b"a file"),
    ("POST {package}/files", tar("b"), "Content-Type: application/x-tar"),
    ("POST {package}/uploads", b"a file", *TUS, "Upload-Length: 6", "Upload-Metadata: filename Yw=="),
    (
        "POST /v1/packages",
        b'{"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}',
        "Content-Type: application/json",
    ),
)
"""Requests that become one event each: line, body and headers."""


@pytest.mark.parametrize(
    ("change", "answered"),
    [("revoked", {401}), ("fewer rights", {403, 404}), ("none of all", {403}), ("another rule", {201})],
)
async def test_what_loses_its_right_before_its_last_byte_is_not_recorded(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch, change: str, answered: set[int]
) -> None:
    monkeypatch.setattr(request, "RIGHTS_SECONDS", 0.0)
    before = all_rights("ci:t") if change == "none of all" else principal("t", Right.WRITE, producers=("p",))
    after = principal("t", Right.WRITE, producers=("p*",) if change == "another rule" else ("other",))
    tokens = Tokens()
    async with running_gateway(embedded_settings, authenticate=tokens) as gateway:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        for line, body, *headers in BODIES:
            tokens.principals["t"] = before
            recorded = await gateway.events()
            async with connected(gateway.port) as client:
                headers += ["Authorization: Bearer t", "Expect: 100-continue", f"Content-Length: {len(body)}"]
                client.send(line.format(package=f"/v1/packages/{package}"), *headers)
                await client.may_go_on()  # the sender has the right until here
                client.writer.write(body[:-1])
                if change == "revoked":
                    del tokens.principals["t"]
                else:
                    tokens.principals["t"] = after
                client.writer.write(body[-1:])
                assert (await client.answer()).status in answered, line
            assert await gateway.events() == recorded + (answered == {201}), line


async def test_what_outlives_its_token_is_recorded(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of issuers often live for less time than an upload takes."""
    monkeypatch.setattr(request, "RIGHTS_SECONDS", 0.0)
    ends = time.time() + 60
    tokens = Tokens(t=replace(principal("t", Right.WRITE), expires_at=ends))
    async with running_gateway(embedded_settings, authenticate=tokens) as gateway:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        async with connected(gateway.port) as client:
            headers = ("Authorization: Bearer t", "Expect: 100-continue", "Content-Length: 1")
            client.send(f"PUT /v1/packages/{package}/files/a", *headers)
            await client.may_go_on()
            monkeypatch.setattr(request, "time", SimpleNamespace(time=lambda: ends + 1))
            del tokens.principals["t"]  # nobody takes it any more
            client.writer.write(b"a")
            assert (await client.answer()).status == 201


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def test_everyone_with_a_token_learns_who_they_are(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        async with gateway.session.get("/v1/whoami", headers=bearer("reader")) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            assert await answer.json() == {
                "actor": "ci:reader",
                "principal": "ci:reader",
                "rights": [{"can": ["read"], "producers": ["*"], "subjects": ["*"]}],
                "expires_at": None,
            }
        async with gateway.session.get("/v1/login") as answer:
            assert await answer.json() == {"issuers": []}


async def test_the_document_says_who_may_call_what(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway, gateway.session.get("/openapi.json") as answer:
        document = await answer.json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for route in ROUTES:
        operation = document["paths"][route.template][route.method.lower()]
        is_open = (route.method, route.template) in OPEN
        assert ("security" in operation, {"401", "403"} <= operation["responses"].keys()) == (not is_open, not is_open)
