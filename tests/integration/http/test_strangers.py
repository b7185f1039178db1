"""A stranger learns no more about packages that their token may not read than about missing ones.

Random policies are tried against packages of several producers and subjects. Each request is made for a package that
the policy excludes and for one that does not exist, and the two answers are compared byte for byte.
"""

from __future__ import annotations

import base64
import io
import json
import random
import tarfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from blake3 import blake3

from artifact_store.archives.bundle import HeldFiles, NamedFile, SmallFile
from artifact_store.byte_streams import joined
from artifact_store.errors import UnknownContentError
from artifact_store.events import FileIngested
from artifact_store.manifest import ContentAddress
from artifact_store.models import Declared
from services.blobs.resumable.uploads import NewUpload
from services.config import Settings
from services.core.access import Grant, Packages, Principal, Right, Scope
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
    command_id: UUID
    """Of the command that ingested the file."""
    blob: str
    """The address of what the file lies in, from `offset` on."""
    offset: int
    manifest: str
    """The manifest's address, or one that nothing has."""
    created_at: int

    @property
    def digest(self) -> str:
        return address(self.content)

    @property
    def names(self) -> dict[str, str]:
        """What stands for which placeholder in a `Request`."""
        return {
            "{package}": str(self.package_id),
            "{file}": str(self.file_id),
            "{upload}": str(self.upload_id),
            "{command}": str(self.command_id),
            "{digest}": self.digest,
            "{blob}": self.blob,
            "{offset}": str(self.offset),
            "{size}": str(len(self.content)),
            "{manifest}": self.manifest,
            "{content}": self.content.decode("latin-1"),
        }


def address(content: bytes) -> str:
    return str(ContentAddress.of_digest(blake3(content).digest()))


@dataclass(frozen=True)
class Request:
    """One request; the placeholders in it are those of `Shown.names`."""

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
    Request("POST", "/v1/blobs/known", body=b'{"addresses": ["{blob}", "{manifest}"]}'),
    Request("GET", "/v1/packages?manifest_digest={manifest}"),
    Request("GET", f"/v1/packages/{{package}}/files?cursor={queries.write_cursor('files', 'a')}"),
    Request("GET", "/v1/events?package_id={package}", (("Accept", "text/event-stream"),)),
    Request("HEAD", "/v1/events?package_id={package}"),
    Request("GET", "/v1/packages/{package}/files/a/b.txt?wait_sequence=2"),
    Request("GET", "/v1/packages/{package}/manifest?wait_sequence=3"),
    Request("GET", "/v1/packages/{package}/archive?wait_sequence=3"),
)


OF_EACH_ANSWER = ("Date", "Content-Length", "X-Request-ID")
"""Headers that differ from answer to answer."""

TUS = (("Tus-Resumable", "1.0.0"),)
ADDRESS = (("X-Content-Address", "{digest}"),)
OFFSET = (*TUS, ("Content-Type", "application/offset+octet-stream"), ("Upload-Offset", "0"))
KEY = (("Idempotency-Key", str(UUID(int=7))),)
THEIR_KEY = (("Idempotency-Key", "{command}"),)
NAMED = (
    b'{"files": [{"relative_path": "c", "media_type": "x/y", "size_bytes": {size}, "content_address": "{digest}", '
    b'"blob": "{digest}"}]}'
)
NAMED_WHERE_IT_LIES = NAMED.replace(b'"blob": "{digest}"', b'"blob": "{blob}", "offset": {offset}')


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
    Request("PUT", "/v1/packages/{package}/files/a/b.txt", THEIR_KEY, b"{content}"),
    Request("POST", "/v1/packages/{package}/finalize", THEIR_KEY),
    Request("PUT", "/v1/packages/{package}/files/c", (("X-Content-Address", "{digest}"),), b"{content}"),
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
    content = f"{producer} {subject} {number}".encode().ljust(32)
    command = uuid4()
    files = [SmallFile("a/b.txt", "text/plain", content), SmallFile("a/c.txt", "text/plain", uuid4().bytes)]
    bundle = HeldFiles(files[: 1 + number % 2])  # two lie in one pack
    done = await registry.ingest_files(package, bundle, "ada", command_id=command)
    upload = await registry.uploads.create(NewUpload(package, "d", "x/y", "ada", 3, Declared()))
    manifest = str(await registry.finalize_package(package)) if number % 2 else address(uuid4().bytes)
    created_at = (await registry.get_package(package)).created_at
    events = [event.payload async for event in registry.read_events(package_id=package)]
    place = next(payload.receipt for payload in events if isinstance(payload, FileIngested))
    lies = await joined(registry._blobs.read(place.key, 0, await registry._blobs.size(place.key) or 0))
    return Shown(
        *(producer, subject, package, done.files[0].file_id, content, upload.upload_id, command),
        *(address(lies), place.offset, manifest, created_at),
    )


def unknown() -> Shown:
    """What is not there."""
    content = uuid4().hex.encode()
    ids = [uuid4() for _ in range(4)]
    return Shown("", "", ids[0], ids[1], content, ids[2], ids[3], address(b"x" + content), 0, address(b""), 0)


async def answer_of(gateway: RunningGateway, request: Request, of: Shown) -> tuple[int, Mapping[str, str], bytes]:
    """The answer, in which identifiers and digests stand as they do in the request."""

    def filled(text: str) -> str:
        for name, value in of.names.items():
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
        for name, value in of.names.items():
            if len(value) > 30:  # no number; a file that lies alone has the address of its blob
                found = found.replace(value.encode("latin-1"), b"{digest}" if name == "{blob}" else name.encode())
        return answer.status, {k: v for k, v in answer.headers.items() if k not in OF_EACH_ANSWER}, found


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
    for one in foreign:
        listed = [
            await answer_of(gateway, Request("GET", f"/v1/packages?limit=2&cursor={cursor}"), one)
            for cursor in (queries.write_cursor("packages", one.created_at, id_) for id_ in (one.package_id, uuid4()))
        ]
        assert listed[0] == listed[1], (policy, one)
    assert await gateway.events() == events
    visible = [one for one in shown if one not in foreign]
    await check_listings(gateway, visible, policy)
    writable = [await publish(registry, one.producer, one.subject, 100) for one in visible[:1]]
    for own in writable:
        await check_bytes(gateway, own, foreign)


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
    assert (await answer_of(gateway, named, own))[0] == 201


async def test_what_lies_beside_ones_own_bytes_stays_unknown(gateway: RunningGateway) -> None:
    """Files of several packages share objects, and one file may lie in several."""
    registry = gateway.parts.registry
    theirs, own = [await registry.create_package("n", team, "main", "scratch") for team in ("team-b", "team-a")]
    first, second, third = (text.ljust(32) for text in (b"first", b"second", b"third"))
    for folder, other in (("a", second), ("b", third)):
        files = [SmallFile(f"{folder}/{number}", "x/y", content) for number, content in enumerate((first, other))]
        await registry.ingest_files(theirs, HeldFiles(files), "ada")

    def named(path: str, content: bytes, *pack: bytes) -> list[NamedFile]:
        lies = blake3(b"".join(pack)).digest()
        return [NamedFile(path, "x/y", len(content), blake3(content).digest(), lies, 32 * pack.index(content))]

    await registry.ingest_named(own, named("a", first, first, second), "ada")
    stranger = registry.for_principal(principal("t", Right.READ, Right.WRITE, producers=("team-a",)))
    for foreign in (named("b", second, first, second), named("b", first, first, third)):
        with pytest.raises(UnknownContentError):
            await stranger.ingest_named(own, foreign, "t")
    await stranger.ingest_named(own, named("b", first, first, second), "t")


@pytest.mark.parametrize("lacking", ["the view is empty", "newer packages came"])
async def test_a_repeat_gets_the_first_answer_although_the_view_shows_nothing_of_its_bytes(
    gateway: RunningGateway, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    registry = gateway.parts.registry
    known, own, foreign = [await publish(registry, producer, "main", 0) for producer in ("team-a", "team-a", "team-b")]
    tokens.principals["t"] = principal("t", Right.READ, Right.WRITE, producers=("team-a",))
    named = Request("POST", f"/v1/packages/{own.package_id}/files", KEY, NAMED)
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


async def check_bytes(gateway: RunningGateway, own: Shown, foreign: list[Shown]) -> None:
    """Writers of their own packages learn nothing about the bytes of others by naming or sending them.

    An answer that records something is compared without the event's digest, in which there is a time.
    """
    files = f"/v1/packages/{own.package_id}/files"
    tus = f"/v1/packages/{own.package_id}/uploads"
    for number, one in enumerate(foreign):
        for body in (NAMED, NAMED_WHERE_IT_LIES):
            request = Request("POST", files, body=body)
            assert await answer_of(gateway, request, one) == await answer_of(gateway, request, unknown()), one
        for headers in ((), (("X-Content-Address", "{digest}"),)):
            answers = []
            for of, name in ((one, "known"), (unknown(), "new")):
                sent = Request("PUT", f"{files}/{name}-{number}-{len(headers)}", headers, b"{content}")
                status, told, body = await answer_of(gateway, sent, of)
                answers.append((status, sorted(told), sorted(json.loads(body)), b"{digest}" in body))
            assert answers[0] == answers[1], one
        begun = []
        for of in (one, unknown()):
            name = base64.b64encode(f"tus {uuid4()}".encode()).decode()
            begins = (*TUS, ("Upload-Length", "{size}"), ("Upload-Metadata", f"filename {name}"))
            status, told, body = await answer_of(gateway, Request("POST", tus, (*begins, *ADDRESS)), of)
            begun.append((status, sorted(told), told["Upload-Offset"], body))
        assert begun[0] == begun[1], one  # the bytes are asked for, whether they are stored or not


async def check_listings(gateway: RunningGateway, visible: list[Shown], policy: Principal) -> None:
    """Lists, counts and streams show the visible packages and no others."""
    ids = {str(one.package_id) for one in visible}
    for limit in (1, 3):
        assert [item["package_id"] for item in await items(gateway, f"/v1/packages?limit={limit}", page=limit)] == [
            str(one.package_id) for one in reversed(visible)
        ]
    whole = Scope(tuple(one for one in policy.scope(Right.READ).packages if "*" in one.subjects))
    assert {total["producer"] for total in await items(gateway, "/v1/usage?limit=1", page=1)} == {
        producer for producer, _ in ORIGINS if whole.includes(producer, "any")
    }
    for producer, subject in ORIGINS:
        found = await items(gateway, "/v1/packages", producer=producer, subject=subject)
        assert {item["package_id"] for item in found} == {
            str(one.package_id) for one in visible if (one.producer, one.subject) == (producer, subject)
        }

    recorded = [event async for event in gateway.parts.log.read()]
    for start in (None, recorded[len(recorded) // 2]):
        since = {} if start is None else {"since": str(start.position)}
        rest = recorded if start is None else recorded[recorded.index(start) + 1 :]
        wanted = [str(event.event_id) for event in rest if str(event.package_id) in ids]
        async with gateway.session.get("/v1/events", params=since, headers=bearer("t")) as answer:
            assert [json.loads(line)["id"] for line in (await answer.text()).splitlines()] == wanted
        sent = {**bearer("t"), "Accept": "text/event-stream"}
        async with gateway.session.get("/v1/events", params=since, headers=sent) as answer:
            lines = [line.partition(": ") for line in (await answer.text()).splitlines() if line]
        assert {field for field, _, _ in lines} <= {"id", "event", "data"}
        assert [json.loads(value)["id"] for field, _, value in lines if field == "data"] == wanted


async def items(gateway: RunningGateway, target: str, *, page: int = 0, **params: str) -> list[dict[str, Any]]:
    """All items of a listing, page by page; but for the last, pages have `page` items if that is said."""
    found: list[dict[str, Any]] = []
    following: str | None = target
    while following is not None:
        async with gateway.session.get(following, params=params or None, headers=bearer("t")) as answer:
            assert answer.status == 200
            listed = (await answer.json())["items"]
            found += listed
            following = str(answer.links["next"]["url"]) if "next" in answer.links else None
            assert not page or following is None or len(listed) == page
        params = {}
    return found
