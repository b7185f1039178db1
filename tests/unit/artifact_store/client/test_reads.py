"""The client's reads: whole files are checked, lost connections are resumed, own writes are waited for."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from aiohttp import web
from blake3 import blake3
from yarl import URL

from artifact_store.client import downloads as content_module
from artifact_store.client import transport as transport_module
from artifact_store.client.client import Written
from artifact_store.client.following import follow_events
from artifact_store.client.transport import Transport
from artifact_store.documents.event_lines import event_line, position_in, position_line
from artifact_store.documents.http import LOG_END
from artifact_store.errors import CorruptError, FileNotFoundInRegistryError, RangeNotSatisfiableError, UnavailableError
from artifact_store.events import FileIngested, RecordedEvent, StorageReceipt
from artifact_store.models import EventFilter
from artifact_store.position import Position
from tests.unit.artifact_store.client.failing_gateway import (
    FILE,
    PACKAGE,
    QUICK,
    Answering,
    answers,
    client_of,
    created,
    failing_gateway,
    refuses,
)

CONTENT = bytes(range(256)) * 8192
LOG = UUID("33333333-3333-4333-8333-333333333333")


def serves(content: bytes, *, stop_after: int | None = None, claimed: bytes | None = None) -> Answering:
    """Give the range that is asked for; cut the connection after some bytes, or name another content's digest."""

    async def answer(request: web.Request, _body: bytes) -> web.StreamResponse:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2] or len(content)) if asked else len(content), len(content) - 1)
        part = content[first : last + 1]
        digest = blake3(content if claimed is None else claimed).hexdigest()
        headers = {"ETag": f'"blake3:{digest}"', "Content-Length": str(len(part))}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        response = web.StreamResponse(status=206 if asked else 200, headers=headers)
        await response.prepare(request)
        await response.write(part[:stop_after])
        if stop_after is not None and stop_after < len(part) and request.transport is not None:
            request.transport.close()
        return response

    return answer


async def read(*script: Answering, offset: int = 0, length: int | None = None) -> tuple[bytes, list[str | None], int]:
    """The bytes, the ranges that were asked for, and the longest chunk."""
    async with failing_gateway(*script) as gateway, client_of(gateway) as registry:
        chunks = [chunk async for chunk in await registry.open_content(FILE, offset, length)]
    return b"".join(chunks), gateway.sent("Range"), max(map(len, chunks), default=0)


async def test_a_file_comes_in_chunks_of_at_most_one_mebibyte() -> None:
    content, ranges, longest = await read(serves(CONTENT))
    assert content == CONTENT
    assert ranges == [None]
    assert longest <= 1 << 20


async def test_a_lost_connection_is_taken_up_where_it_broke_off() -> None:
    content, ranges, _ = await read(serves(CONTENT, stop_after=100_000), serves(CONTENT, stop_after=5), serves(CONTENT))
    assert content == CONTENT
    assert len(ranges) == 3
    assert ranges[0] is None
    assert ranges[-1] is not None
    assert ranges[-1].startswith("bytes=100")


async def test_a_gateway_that_is_away_in_the_middle_is_waited_for() -> None:
    content, ranges, _ = await read(serves(CONTENT, stop_after=9), refuses(503, "unavailable"), serves(CONTENT))
    assert content == CONTENT
    assert len(ranges) == 3


async def test_a_part_of_a_file_is_that_part() -> None:
    content, ranges, _ = await read(serves(CONTENT), offset=7, length=300)
    assert content == CONTENT[7:307]
    assert ranges == ["bytes=7-306"]


async def test_a_part_that_reaches_beyond_the_end_ends_there() -> None:
    content, _, _ = await read(serves(CONTENT), offset=len(CONTENT) - 3, length=300)
    assert content == CONTENT[-3:]


async def test_bytes_that_are_not_those_of_the_address_are_an_error_at_the_end() -> None:
    with pytest.raises(CorruptError, match="not those of blake3:"):
        await read(serves(CONTENT, claimed=b"something else"))


async def test_a_gateway_that_brings_no_byte_any_more_is_given_up() -> None:
    with pytest.raises(UnavailableError):
        await read(serves(CONTENT, stop_after=10), serves(CONTENT, stop_after=0))


async def test_an_answer_with_another_range_is_an_error() -> None:
    with pytest.raises(CorruptError, match="the requested range"):
        await read(answers(200, {}), offset=5)


async def test_a_file_that_is_not_there_shows_before_iterating() -> None:
    async with failing_gateway(refuses(404, "file-not-found")) as gateway, client_of(gateway) as registry:
        with pytest.raises(FileNotFoundInRegistryError):
            await registry.get_file(FILE)


async def test_no_bytes_of_a_file_need_no_range() -> None:
    document: dict[str, object] = {
        "file_id": str(FILE),
        "package_id": str(PACKAGE),
        "relative_path": "a",
        "media_type": "text/plain",
        "size_bytes": 3,
        "content_address": "blake3:" + "00" * 32,
        "sha256": "00" * 32,
        "created_at": "2026-01-01T00:00:00.000000Z",
    }
    async with failing_gateway(answers(200, document)) as gateway, client_of(gateway) as registry:
        assert [chunk async for chunk in await registry.open_content(FILE, 1, 0)] == []
        with pytest.raises(RangeNotSatisfiableError):
            await registry.open_content(FILE, 3, 0)


async def test_an_iterator_that_is_never_begun_lets_go_of_its_connection() -> None:
    async with failing_gateway(serves(CONTENT)) as gateway, client_of(gateway) as registry:
        for _ in range(200):  # more than the client has connections
            await registry.open_content(FILE)
    assert len(gateway.seen) == 200


def dawdles(content: bytes, seconds: float) -> Answering:
    """Begin at once, and give the rest after some time."""

    async def answer(request: web.Request, _body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[:1])
        await asyncio.sleep(seconds)
        await response.write(content[1:])
        return response

    return answer


async def test_a_manifest_may_take_longer_than_a_request_as_long_as_it_comes() -> None:
    policy = replace(QUICK, total_seconds=2.0)
    async with failing_gateway(dawdles(CONTENT, 2.1)) as gateway, client_of(gateway, policy) as registry:
        assert await registry.get_manifest_bytes(PACKAGE) == CONTENT


async def test_a_manifest_that_was_cut_is_asked_for_anew_some_times() -> None:
    cut = serves(CONTENT, stop_after=1000)
    async with failing_gateway(cut, cut, serves(CONTENT)) as gateway, client_of(gateway) as registry:
        assert await registry.get_manifest_bytes(PACKAGE, "json") == CONTENT
        assert gateway.sent("Accept") == ["application/json"] * 3
    async with failing_gateway(cut) as gateway, client_of(gateway) as registry:
        with pytest.raises(UnavailableError):
            await registry.get_manifest_bytes(PACKAGE)
        assert len(gateway.seen) == 5


async def test_a_manifest_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "MAX_MANIFEST_BYTES", len(CONTENT) - 1)
    async with failing_gateway(serves(CONTENT)) as gateway, client_of(gateway) as registry:
        with pytest.raises(CorruptError, match="more bytes than a manifest can have"):
            await registry.get_manifest_bytes(PACKAGE)


def package(sequence: int) -> Answering:
    """A package as the view has it."""
    document: dict[str, object] = {
        "package_id": str(PACKAGE),
        "name": "n",
        "producer": "p",
        "subject": "s",
        "retention_class": "scratch",
        "status": "created",
        "metadata": {},
        "manifest_digest": None,
        "last_event_sequence": sequence,
        "created_at": "2026-01-01T00:00:00.000000Z",
        "finalized_at": None,
    }
    return answers(200, document)


async def test_reads_wait_for_what_the_same_client_wrote() -> None:
    async with failing_gateway(created(7), package(7)) as gateway, client_of(gateway) as registry:
        await registry.create_package("n", "p", "s", "scratch")
        await registry.get_package(PACKAGE)
        await registry.get_package(PACKAGE, wait_sequence=9)
        await registry.get_package(uuid4())
    assert [seen.raw_path.partition("?")[2] for seen in gateway.seen[1:]] == ["wait_sequence=7", "wait_sequence=9", ""]


async def test_a_listing_waits_once_for_what_the_same_client_wrote() -> None:
    empty = answers(200, {"items": [], "next": None})
    async with failing_gateway(created(7), package(7), empty) as gateway, client_of(gateway) as registry:
        await registry.create_package("n", "p", "s", "scratch")
        await registry.list_packages()
        await registry.list_packages()
    assert [seen.raw_path for seen in gateway.seen[1:]] == [
        f"/v1/packages/{PACKAGE}?wait_sequence=7",
        "/v1/packages?limit=100",
        "/v1/packages?limit=100",
    ]


def test_what_was_written_long_ago_is_forgotten() -> None:
    written = Written(remembered=2)
    first, second, third = (uuid4() for _ in range(3))
    for package_id in (first, second, first, third):
        written.wrote(package_id, 5)
    written.wrote(first, 3)
    assert [written.last(p) for p in (first, second, third)] == [5, 0, 5]
    assert set(written.unseen()) == {first, third}


def event(number: int) -> RecordedEvent:
    """An event at offset `number`."""
    receipt = StorageReceipt(uuid4(), "local", "k", 0, 1, 1)
    return RecordedEvent(
        event_id=uuid4(),
        event_type="v1.file.ingested",
        package_id=PACKAGE,
        sequence=number + 2,
        created_at=1_000_000 + number,
        actor="ada",
        command_id=uuid4(),
        command_index=0,
        command_count=1,
        payload_digest=bytes(32),
        previous_digest=bytes(32),
        payload=FileIngested(uuid4(), f"läs/{number}", "text/plain", 1, bytes(32), bytes(32), receipt),
        position=Position(LOG, {0: number + 1}),
    )


EVENTS = [event(number) for number in range(6)]


def lines(*, cut_within: bool = False, until: int = 6) -> Answering:
    """The events behind `since`, one a line; cut in the middle of one, or ended."""

    async def answer(request: web.Request, _body: bytes) -> web.StreamResponse:
        since = request.rel_url.query.get("since")
        first = Position.parse(since).offsets[0] if since else 0
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b"\n" + b"".join(event_line(e) + b"\n" for e in EVENTS[first:until]))
        if cut_within:
            await response.write(event_line(EVENTS[until])[:50])
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


async def test_events_come_each_once_over_lost_connections() -> None:
    script = (lines(cut_within=True, until=2), refuses(503, "unavailable"), lines(cut_within=True, until=4), lines())
    async with failing_gateway(*script) as gateway, client_of(gateway) as registry:
        assert [found async for found in registry.read_events()] == EVENTS
    assert "since=" not in gateway.seen[0].raw_path
    assert f"since={EVENTS[3].position}" in gateway.seen[-1].raw_path


async def test_following_goes_on_when_the_gateway_ends_the_answer() -> None:
    async with failing_gateway(lines(until=3), lines()) as gateway, Transport(gateway.url, QUICK) as transport:
        events = follow_events(transport, None, EventFilter(PACKAGE), follow=True)
        async with asyncio.timeout(30):
            assert [await anext(events) for _ in range(6)] == EVENTS
        await events.aclose()  # type: ignore[attr-defined]  # a generator
    assert "follow=true" in gateway.seen[0].raw_path
    assert f"package_id={PACKAGE}" in gateway.seen[0].raw_path


async def test_following_what_is_new_or_wanted_goes_on_from_where_reading_was() -> None:
    """`now` is the log's end of the first request, and what the filter passed over is not looked through again."""

    async def cut(position: Position | None, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={LOG_END: str(EVENTS[0].position)})
        await response.prepare(request)
        if position is not None:
            await response.write(position_line(str(position)) + b"\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    async def begins(request: web.Request, _body: bytes) -> web.StreamResponse:
        return await cut(None, request)

    async def passes_over(request: web.Request, _body: bytes) -> web.StreamResponse:
        return await cut(EVENTS[3].position, request)

    async with failing_gateway(begins, passes_over, lines()) as gateway, client_of(gateway) as registry:
        events = registry.tail_events(
            since="now", where=EventFilter(producers={"a&b", "c"}, types={"v1.file.ingested"})
        )
        async with asyncio.timeout(30):
            assert await anext(events) == EVENTS[4]
    asked = [URL(seen.raw_path, encoded=True).query for seen in gateway.seen]
    assert [query["since"] for query in asked] == ["now", str(EVENTS[0].position), str(EVENTS[3].position)]
    assert asked[0].getall("producer") == ["a&b", "c"]
    assert (asked[0]["type"], asked[0]["positions"]) == ("v1.file.ingested", "true")


@pytest.mark.parametrize("said", ["no position", str(EVENTS[0].position)[:-4]])
def test_a_position_line_without_a_position_is_an_error(said: str) -> None:
    with pytest.raises(CorruptError):
        position_in(position_line(said))


async def test_a_line_that_is_no_event_is_an_error() -> None:
    async def answer(_request: web.Request, _body: bytes) -> web.StreamResponse:
        return web.Response(body=b'{"type":"v9.unknown"}\n')

    async with failing_gateway(answer) as gateway, client_of(gateway) as registry:
        with pytest.raises(CorruptError):
            await anext(registry.read_events())


@pytest.mark.slow
@pytest.mark.parametrize(("idle_seconds", "given_up"), [(0.0, False), (30.0, True)])
async def test_a_quiet_log_is_followed_over_any_number_of_connections_that_lived_for_a_while(
    idle_seconds: float, given_up: bool
) -> None:
    """Only those that are lost at once are counted: here all are, by who is patient for 30 s."""
    lost: list[Answering] = [lines(cut_within=True, until=0)] * 6
    policy = replace(QUICK, idle_seconds=idle_seconds)
    async with failing_gateway(*lost, lines()) as gateway, Transport(gateway.url, policy) as transport:
        events = follow_events(transport, None, EventFilter(), follow=True)
        async with asyncio.timeout(30):
            if given_up:
                with pytest.raises(UnavailableError):
                    await anext(events)
            else:
                assert await anext(events) == EVENTS[0]
        await events.aclose()  # type: ignore[attr-defined]  # a generator


async def test_a_gateway_that_keeps_still_for_long_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "QUIET_SECONDS", 0.2)
    frozen = asyncio.Event()

    async def freezes(request: web.Request, _body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await frozen.wait()
        return response

    async with failing_gateway(freezes, lines()) as gateway, Transport(gateway.url, QUICK) as transport:
        events = follow_events(transport, None, EventFilter(), follow=True)
        async with asyncio.timeout(30):
            assert await anext(events) == EVENTS[0]
        await events.aclose()  # type: ignore[attr-defined]  # a generator
        frozen.set()
