"""What a stranger learns: of packages that a token may not read, no more than of packages that are not there.

Random policies are tried against packages of several producers and subjects. Each request is made for a package that
the policy leaves out and for one that does not exist, and the two answers are compared byte for byte.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from blake3 import blake3

from artifact_store.manifest import ContentAddress
from artifact_store.models import Declared
from services.blobs.resumable.uploads import NewUpload
from services.config import Settings
from services.core.access import Grant, Packages, Principal, Right
from services.registry.direct import DirectRegistry
from services.views import queries
from services.views.tables import artifact_packages
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.tokens import Tokens, bearer, principal

POLICIES = (0, 1, *(pytest.param(seed, marks=pytest.mark.endurance) for seed in range(2, 20)))
ORIGINS = (("team-a", "main"), ("team-b", "main"), ("Team-a", "main"), ("team_a", "re[l]ease?"), ("team%", "*"))
"""Producers and subjects, with what is special in the patterns of either database."""

PATTERNS = (
    *("*", "team-a", "team-*", "team-?", "team_a", "TEAM-A", "t*a", "team%", "[t]eam-a"),
    *("main", "m*n", "re[l]*?", ""),
)


@dataclass(frozen=True)
class Shown:
    """A package, finalized or not, with its only file."""

    producer: str
    subject: str
    package_id: UUID
    file_id: UUID
    content: bytes
    upload_id: UUID

    @property
    def digest(self) -> str:
        return str(ContentAddress.of_digest(blake3(self.content).digest()))


@dataclass(frozen=True)
class Request:
    """One request; `{package}`, `{file}`, `{upload}` and `{digest}` stand for a package, its file, upload and bytes."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


READS = (
    Request("GET", "/v1/packages/{package}"),
    Request("GET", "/v1/packages/{package}?wait_sequence=1"),
    Request("GET", "/v1/packages/{package}?wait_sequence=99"),
    Request("GET", "/v1/packages/{package}/files"),
    Request("GET", "/v1/packages/{package}/files?limit=1&wait_sequence=2"),
    Request("GET", "/v1/packages/{package}/files/a/b.txt"),
    Request("GET", "/v1/packages/{package}/files/no-such"),
    Request("GET", "/v1/packages/{package}/manifest"),
    Request("GET", "/v1/packages/{package}/manifest", (("Accept", "application/json"),)),
    Request("HEAD", "/v1/packages/{package}/manifest"),
    Request("GET", "/v1/packages/{package}/archive"),
    Request("GET", "/v1/packages/{package}/archive?after=a&largest=5"),
    Request("HEAD", "/v1/packages/{package}/archive"),
    Request("GET", "/v1/events?package_id={package}"),
    Request("GET", "/v1/files/{file}"),
    Request("GET", "/v1/files/{file}/content"),
    Request("GET", "/v1/files/{file}/content", (("Range", "bytes=1-2"),)),
    Request("GET", "/v1/files/{file}/content", (("Range", "bytes=900-"),)),
    Request("GET", "/v1/files/{file}/content", (("If-None-Match", '"{digest}"'),)),
    Request("HEAD", "/v1/files/{file}/content"),
    Request("POST", "/v1/blobs/known", body=b'{"addresses": ["{digest}"]}'),
)


TUS = (("Tus-Resumable", "1.0.0"),)
OFFSET = (*TUS, ("Content-Type", "application/offset+octet-stream"), ("Upload-Offset", "0"))
KEY = (("Idempotency-Key", str(UUID(int=7))),)
NAMED = (
    b'{"files": [{"relative_path": "c", "media_type": "x/y", "size_bytes": 5, "content_address": "{digest}", '
    b'"blob": "{digest}"}]}'
)


def tar(name: str = "c") -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name), None)
        return file.getvalue()


WRITES = (
    Request("PUT", "/v1/packages/{package}/files/c", body=b"new"),
    Request("PUT", "/v1/packages/{package}/files/a/b.txt", KEY, b"a path that is taken"),
    Request("PUT", "/v1/packages/{package}/files/a", body=b"a path that is a folder"),
    Request("POST", "/v1/packages/{package}/files", (("Content-Type", "application/x-tar"),), tar()),
    Request("POST", "/v1/packages/{package}/files", body=NAMED),
    Request("POST", "/v1/packages/{package}/finalize", KEY),
    Request(
        "POST", "/v1/packages/{package}/uploads", (*TUS, ("Upload-Length", "3"), ("Upload-Metadata", "filename Yw=="))
    ),
    Request("HEAD", "/v1/packages/{package}/uploads/{upload}", TUS),
    Request("GET", "/v1/packages/{package}/uploads/{upload}"),
    Request("PATCH", "/v1/packages/{package}/uploads/{upload}", OFFSET, b"new"),
    Request("POST", "/v1/packages/{package}/uploads/{upload}", (*OFFSET, ("X-HTTP-Method-Override", "PATCH")), b"new"),
    Request("DELETE", "/v1/packages/{package}/uploads/{upload}", TUS),
)


async def publish(registry: DirectRegistry, producer: str, subject: str, number: int) -> Shown:
    package = await registry.create_package(f"n{number}", producer, subject, "scratch")
    content = f"{producer} {subject} {number}".encode()
    file = await registry.ingest_file(package, "a/b.txt", "text/plain", content)
    upload = await registry.uploads.create(NewUpload(package, "d", "x/y", "ada", 3, Declared()))
    if number % 2:
        await registry.finalize_package(package)
    return Shown(producer, subject, package, file, content, upload.upload_id)


def unknown() -> Shown:
    return Shown("", "", uuid4(), uuid4(), uuid4().bytes, uuid4())


async def answer_of(gateway: RunningGateway, request: Request, of: Shown) -> tuple[int, Mapping[str, str], bytes]:
    """The answer, in which identifiers and digests stand as they do in the request."""
    names = {str(of.package_id): "{package}", str(of.file_id): "{file}", str(of.upload_id): "{upload}"}
    names[of.digest] = "{digest}"

    def filled(text: str) -> str:
        for value, name in names.items():
            text = text.replace(name, value)
        return text

    headers = {name: filled(value) for name, value in request.headers}
    if request.body and "Content-Type" not in headers:
        headers["Content-Type"] = "application/json"
    body = filled(request.body.decode("latin-1")).encode("latin-1")
    async with gateway.session.request(
        request.method, filled(request.target), headers={**headers, **bearer("t")}, data=body or None
    ) as answer:
        found = await answer.read()
        for value, name in names.items():
            found = found.replace(value.encode(), name.encode())
        return answer.status, {k: v for k, v in answer.headers.items() if k not in ("Date", "Content-Length")}, found


def random_policy(dice: random.Random) -> Principal:
    def patterns() -> tuple[str, ...]:
        return tuple(dice.choices(PATTERNS, k=dice.randint(1, 2)))

    rights = frozenset({Right.READ, Right.WRITE})
    return Principal("ci:t", tuple(Grant(rights, Packages(patterns(), patterns())) for _ in range(dice.randint(1, 2))))


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
async def gateway(embedded_settings: Settings, tokens: Tokens) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings, authenticate=tokens) as running:
        yield running


@pytest.mark.parametrize("seed", POLICIES)
async def test_a_foreign_package_is_answered_as_one_that_is_not_there(
    gateway: RunningGateway, tokens: Tokens, seed: int
) -> None:
    registry = gateway.parts.registry
    shown = [await publish(registry, *origin, number) for number, origin in enumerate((*ORIGINS, *ORIGINS[:2]))]
    tokens.principals["t"] = policy = random_policy(random.Random(seed))
    scope = policy.scope(Right.READ)
    foreign = [one for one in shown if not scope.includes(one.producer, one.subject)]
    events = await gateway.events()
    for request in (*READS, *WRITES):
        nothing = await answer_of(gateway, request, unknown())
        for one in foreign:
            assert await answer_of(gateway, request, one) == nothing, (policy, one, request)
    assert await gateway.events() == events
    await check_listings(gateway, [one for one in shown if one not in foreign])


async def test_a_digest_gives_neither_the_bytes_nor_word_of_them(gateway: RunningGateway, tokens: Tokens) -> None:
    registry = gateway.parts.registry
    own, foreign = [await publish(registry, producer, "main", 0) for producer in ("team-a", "team-b")]
    tokens.principals["t"] = principal("t", Right.READ, Right.WRITE, producers=("team-a",))
    known = Request("POST", "/v1/blobs/known", body=b'{"addresses": ["{digest}"]}')
    named = Request("POST", f"/v1/packages/{own.package_id}/files", body=NAMED)
    for request in (known, named):
        nothing = await answer_of(gateway, request, unknown())
        assert await answer_of(gateway, request, foreign) == nothing
    assert (await answer_of(gateway, known, own))[2] == b'{"known":["{digest}"]}'
    renamed = replace(named, body=NAMED.replace(b'"size_bytes": 5', b'"size_bytes": %d' % len(own.content)))
    assert (await answer_of(gateway, renamed, own))[0] == 201


@pytest.mark.parametrize("lacking", ["the view is empty", "newer packages came"])
async def test_a_repeat_gets_the_first_answer_although_the_view_shows_nothing_of_its_bytes(
    gateway: RunningGateway, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    registry = gateway.parts.registry
    known, own, foreign = [await publish(registry, producer, "main", 0) for producer in ("team-a", "team-a", "team-b")]
    tokens.principals["t"] = principal("t", Right.READ, Right.WRITE, producers=("team-a",))
    body = NAMED.replace(b'"size_bytes": 5', b'"size_bytes": %d' % len(known.content))
    named = Request("POST", f"/v1/packages/{own.package_id}/files", KEY, body)
    first = await answer_of(gateway, named, known)
    assert first[0] == 201
    if lacking == "the view is empty":
        async with gateway.parts.views.writing() as connection:
            await connection.execute(artifact_packages.delete())
    else:
        monkeypatch.setattr(queries, "NEWEST_PACKAGES", 1)
        await publish(registry, "team-a", "main", 2)
    assert await answer_of(gateway, named, known) == first
    # The key does not open other bytes, nor does it tell which are stored.
    refused = await answer_of(gateway, named, unknown())
    assert refused[0] == 422
    assert await answer_of(gateway, named, foreign) == refused


async def check_listings(gateway: RunningGateway, visible: list[Shown]) -> None:
    """Lists, counts and streams show the visible packages and no others."""
    ids = {str(one.package_id) for one in visible}
    assert {item["package_id"] for item in await items(gateway, "/v1/packages?limit=3")} == ids
    for producer, subject in ORIGINS:
        found = await items(gateway, "/v1/packages", producer=producer, subject=subject)
        assert {item["package_id"] for item in found} == {
            str(one.package_id) for one in visible if (one.producer, one.subject) == (producer, subject)
        }

    async with gateway.session.get("/v1/events", headers=bearer("t")) as answer:
        events = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert {event["package_id"] for event in events} == ids
    assert [event["id"] for event in events] == [
        str(event.event_id) async for event in gateway.parts.log.read() if str(event.package_id) in ids
    ]


async def items(gateway: RunningGateway, target: str, **params: str) -> list[dict[str, Any]]:
    """All items of a listing, page by page."""
    found: list[dict[str, Any]] = []
    following: str | None = target
    while following is not None:
        async with gateway.session.get(following, params=params or None, headers=bearer("t")) as answer:
            assert answer.status == 200
            found += (await answer.json())["items"]
            following = str(answer.links["next"]["url"]) if "next" in answer.links else None
        params = {}
    return found
