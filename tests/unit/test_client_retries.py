"""The client tries again with the same command id, waits as it is told, and gives up in time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp import web

import services.client.transport
from services.blobs.port import Declared
from services.client import FileSource, RetryPolicy
from services.client.problems import retry_after
from services.client.sources import BodySource, CountedSource, FileStamp, SeekableSource
from services.errors import (
    ArtifactStoreError,
    ContentMismatchError,
    CorruptError,
    PackageNotFoundError,
    PushBackError,
    RangeNotSatisfiableError,
    RejectedError,
    UnavailableError,
    UnknownRetentionClassError,
    WaitTimeoutError,
)
from services.http.problems import TYPE_PREFIX
from tests.unit.client_gateway import (
    FILE,
    PACKAGE,
    Answering,
    FailingGateway,
    answers,
    client_of,
    created,
    cuts,
    failing_gateway,
    ingested,
    refuses,
)

SHORT = RetryPolicy(total_seconds=2.0, first_pause_seconds=0.1, longest_pause_seconds=0.2)
ABOUT = ("run", "lab", "sample", "scratch")


async def once(chunks: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    "failure",
    [
        refuses(503, "unavailable"),
        refuses(503, "push-back", {"Retry-After": "0"}),
        answers(429, {}, {"Retry-After": "0"}),
        answers(502, "a proxy's own page"),
        answers(504, "a proxy's own page"),
        cuts,
    ],
)
async def test_a_write_is_tried_again_with_the_same_command_id(failure: Answering) -> None:
    async with failing_gateway(failure, failure, created()) as gateway, client_of(gateway) as registry:
        assert await registry.create_package(*ABOUT) == PACKAGE
    assert len(gateway.seen) == 3
    keys = set(gateway.sent("Idempotency-Key"))
    assert len(keys) == 1
    UUID(keys.pop())
    assert len({seen.body for seen in gateway.seen}) == 1


async def test_a_command_id_of_the_caller_is_the_one_that_is_sent() -> None:
    mine = uuid4()
    async with failing_gateway(cuts, created()) as gateway, client_of(gateway) as registry:
        await registry.create_package(*ABOUT, command_id=mine)
    assert gateway.sent("Idempotency-Key") == [str(mine), str(mine)]


async def test_two_writes_have_two_command_ids() -> None:
    async with failing_gateway(created()) as gateway, client_of(gateway) as registry:
        await registry.create_package(*ABOUT)
        await registry.create_package(*ABOUT)
    assert len(set(gateway.sent("Idempotency-Key"))) == 2


async def test_the_pause_that_a_gateway_asks_for_is_kept() -> None:
    busy = refuses(503, "push-back", {"Retry-After": "0.4"})
    async with failing_gateway(busy, created()) as gateway, client_of(gateway) as registry:
        began = time.monotonic()
        await registry.create_package(*ABOUT)
    assert time.monotonic() - began >= 0.4


async def test_a_pause_beyond_the_time_that_is_left_is_not_begun() -> None:
    busy = refuses(429, "push-back", {"Retry-After": "3600"})
    async with failing_gateway(busy) as gateway, client_of(gateway) as registry:
        with pytest.raises(PushBackError) as caught:
            await registry.create_package(*ABOUT)
    assert caught.value.retry_after == 3600
    assert len(gateway.seen) == 1


async def test_trying_ends_with_the_time_that_it_may_take() -> None:
    async with failing_gateway(cuts) as gateway, client_of(gateway, SHORT) as registry:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="outcome is unknown"):
            await registry.create_package(*ABOUT)
    assert time.monotonic() - began < 30
    assert len(gateway.seen) > 1


async def test_a_view_that_stays_behind_is_a_wait_that_ran_out() -> None:
    async with failing_gateway(refuses(504, "wait-timeout")) as gateway, client_of(gateway, SHORT) as registry:
        with pytest.raises(WaitTimeoutError):
            await registry.get_package(PACKAGE)
    assert len(gateway.seen) > 1


async def test_nothing_that_answers_is_unavailable() -> None:
    async with failing_gateway(created()) as gateway:
        pass
    async with client_of(gateway, SHORT) as registry:
        with pytest.raises(UnavailableError, match="cannot reach the gateway"):
            await registry.create_package(*ABOUT)


@pytest.mark.parametrize(
    ("status", "name", "error"),
    [
        (404, "package-not-found", PackageNotFoundError),
        (422, "unknown-retention-class", UnknownRetentionClassError),
        (422, "content-mismatch", ContentMismatchError),
        (500, "corrupt", CorruptError),
        (500, "internal", ArtifactStoreError),
        (451, "of-a-later-version", RejectedError),
    ],
)
async def test_a_refusal_is_its_own_error_and_is_not_tried_again(
    status: int, name: str, error: type[Exception]
) -> None:
    async with failing_gateway(refuses(status, name)) as gateway, client_of(gateway) as registry:
        with pytest.raises(error) as caught:
            await registry.create_package(*ABOUT)
    assert type(caught.value) is error
    assert str(caught.value) == f"this is {name}"
    assert len(gateway.seen) == 1


async def test_an_answer_that_is_no_gateways_is_told_as_such() -> None:
    async with failing_gateway(answers(200, {"hello": "world"})) as gateway, client_of(gateway) as registry:
        with pytest.raises(CorruptError, match="is the URL that of a gateway"):
            await registry.create_package(*ABOUT)


async def test_a_range_that_does_not_exist_tells_the_length_of_the_file() -> None:
    document = {
        "type": f"{TYPE_PREFIX}range-not-satisfiable",
        "title": "-",
        "status": 416,
        "detail": "beyond the end",
        "size": 7,
    }
    async with failing_gateway(answers(416, document)) as gateway, client_of(gateway) as registry:
        with pytest.raises(RangeNotSatisfiableError) as caught:
            await registry.open_content(FILE, 9)
    assert caught.value.size == 7
    assert gateway.sent("Range") == ["bytes=9-"]


async def put(gateway: FailingGateway, stream: Any, declared: Declared | None = None) -> UUID:
    async with client_of(gateway) as registry:
        return await registry.ingest_file(PACKAGE, "a", "text/plain", stream, declared=declared)


@pytest.mark.parametrize("stream", [b"abc" * 1000, BytesIO(b"abc" * 1000)])
async def test_a_body_that_can_be_read_again_is_sent_again_whole(stream: object) -> None:
    async with failing_gateway(cuts, refuses(503, "unavailable"), ingested) as gateway:
        assert await put(gateway, stream) == FILE
    assert [seen.body for seen in gateway.seen] == [b"abc" * 1000] * 3
    assert len(set(gateway.sent("Idempotency-Key"))) == 1


async def test_a_large_file_is_sent_again_whole_with_its_length(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096 * 3
    path = tmp_path / "large"
    path.write_bytes(content)
    async with failing_gateway(cuts, ingested) as gateway:
        await put(gateway, FileSource(path, FileStamp.of(path.stat())))
    assert [seen.body == content for seen in gateway.seen] == [True, True]
    assert gateway.sent("Content-Length") == [str(len(content))] * 2
    assert gateway.sent("Expect") == ["100-continue"] * 2


async def test_a_server_that_knows_nothing_of_continuing_gets_the_body_all_the_same() -> None:
    impatient = RetryPolicy(total_seconds=5.0, idle_seconds=0.3, first_pause_seconds=0.01)
    async with failing_gateway(ingested) as gateway, client_of(gateway, impatient) as registry:
        gateway.continues = False
        assert await registry.ingest_file(PACKAGE, "a", "text/plain", once((b"one", b"two"))) == FILE
    assert gateway.seen[-1].body == b"onetwo"
    assert gateway.sent("Expect")[-1] is None


@pytest.mark.parametrize("failure", [cuts, refuses(503, "unavailable")])
async def test_a_stream_that_was_begun_is_not_sent_again(failure: Answering) -> None:
    async with failing_gateway(failure, ingested) as gateway:
        with pytest.raises(UnavailableError, match=r"cannot be read again.*command id"):
            await put(gateway, once((b"one", b"two")))
    assert len(gateway.seen) == 1


async def test_a_stream_that_was_left_before_it_had_anything_is_not_sent_as_one_without_bytes() -> None:
    async with failing_gateway(ingested) as gateway:

        async def silent() -> AsyncIterator[bytes]:
            gateway.drop()
            await asyncio.Event().wait()
            yield b"never"

        with pytest.raises(UnavailableError, match="cannot be read again"):
            await put(gateway, silent())
    assert [seen.body for seen in gateway.seen] in ([], [b""])


async def test_what_was_opened_for_an_attempt_is_closed_when_the_attempt_fails() -> None:
    open_now: set[int] = set()

    class Opening(BodySource):
        size_bytes = None

        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            assert not open_now, "that of the attempt before is still open"
            mine = object()
            open_now.add(id(mine))
            try:
                if tries.pop(0):
                    gateway.drop()
                while tries:  # the first attempts go on until they are stopped
                    yield bytes(1 << 18)
                yield b"last"
            finally:
                open_now.discard(id(mine))

    tries = [True, True, True, False]
    async with failing_gateway(ingested) as gateway:
        read: list[int] = []
        assert await put(gateway, CountedSource(Opening(), read.append)) == FILE
    assert not tries
    assert not open_now
    assert sum(read) == len(b"last")


async def test_a_stream_that_was_pushed_back_after_it_was_read_is_not_sent_again() -> None:
    async with failing_gateway(refuses(503, "push-back", {"Retry-After": "0"}), ingested) as gateway:
        with pytest.raises(PushBackError):
            await put(gateway, once((b"one", b"two")))
    assert len(gateway.seen) == 1


async def test_a_stream_that_fails_shows_its_own_error() -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield b"one"
        raise LookupError("the source is gone")

    async with failing_gateway(ingested) as gateway:
        with pytest.raises(LookupError, match="the source is gone"):
            await put(gateway, breaks())


@pytest.mark.parametrize("size", [2, 9])
async def test_a_stream_of_another_length_than_declared_is_refused(size: int) -> None:
    async with failing_gateway(ingested) as gateway:
        with pytest.raises(ContentMismatchError):
            await put(gateway, once((b"one", b"two")), Declared(size_bytes=size))


@pytest.mark.parametrize("beyond", ["more", "failure"])
async def test_nothing_is_recorded_of_a_stream_that_goes_on_behind_its_declared_length(beyond: str) -> None:
    async def going_on() -> AsyncIterator[bytes]:
        yield b"0123456789"
        if beyond == "failure":
            raise LookupError("the source is gone")
        yield b"x"

    async with failing_gateway(ingested) as gateway:
        with pytest.raises(LookupError if beyond == "failure" else ContentMismatchError):
            await put(gateway, going_on(), Declared(size_bytes=10))
    assert not any(seen.body for seen in gateway.seen)


async def test_a_body_that_is_said_to_have_no_bytes_is_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"")
    empty = FileSource(path, FileStamp.of(path.stat()))
    async with failing_gateway(ingested) as gateway:
        assert await put(gateway, empty, Declared(size_bytes=0)) == FILE
        with pytest.raises(ContentMismatchError, match="more bytes than declared"):
            await put(gateway, once((b"precious",)), Declared(size_bytes=0))
        path.write_bytes(b"by now")
        with pytest.raises(ContentMismatchError, match="changed while"):
            await put(gateway, empty, Declared(size_bytes=0))
    assert [seen.body for seen in gateway.seen] == [b""]


async def test_a_stream_that_has_no_bytes_is_sent_again() -> None:
    async with failing_gateway(cuts, refuses(503, "unavailable"), ingested) as gateway:
        assert await put(gateway, once(()), Declared(size_bytes=0)) == FILE
    assert [seen.body for seen in gateway.seen] == [b""] * 3


async def test_a_file_is_not_moved_by_a_read_that_an_attempt_left_behind() -> None:
    held, go_on = threading.Event(), threading.Event()

    class Slow(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if not held.is_set():
                held.set()
                go_on.wait(20)
            return super().read(size)

    source = SeekableSource(Slow(b"one" * 1_000_000))

    async def take() -> bytes:
        return b"".join([chunk async for chunk in source])

    first = asyncio.ensure_future(take())
    await asyncio.to_thread(held.wait, 20)
    first.cancel()
    second = asyncio.ensure_future(take())
    await asyncio.sleep(0)  # it has begun, and would have set the file back
    go_on.set()
    assert await second == b"one" * 1_000_000
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="a file that the kernel makes up")
async def test_a_file_that_holds_more_than_its_length_is_refused() -> None:
    made_up = Path("/proc/version")
    assert made_up.stat().st_size == 0
    async with failing_gateway(ingested) as gateway:
        with pytest.raises(ContentMismatchError, match="changed while"):
            await put(gateway, FileSource(made_up, FileStamp.of(made_up.stat())), Declared(size_bytes=0))
    assert not gateway.seen


async def test_a_file_that_is_written_to_while_it_is_sent_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "torn"
    path.write_bytes(bytes(3 << 20))

    def rewrite(read: int) -> None:
        if read and path.read_bytes() == bytes(3 << 20):
            path.write_bytes(b"new" * (1 << 20))

    source = CountedSource(FileSource(path, FileStamp.of(path.stat())), rewrite)
    async with failing_gateway(ingested) as gateway:
        with pytest.raises(ContentMismatchError, match="changed while"):
            await put(gateway, source, Declared(size_bytes=3 << 20))
    assert not any(len(seen.body) == 3 << 20 for seen in gateway.seen)


async def test_a_stream_waits_for_as_many_refusals_as_it_takes_before_its_first_byte() -> None:
    async with failing_gateway(ingested) as gateway:
        gateway.refused_early = 4
        assert await put(gateway, once((b"one", b"two"))) == FILE
    assert gateway.sent("Expect") == ["100-continue"] * 5
    assert [seen.body for seen in gateway.seen] == [b""] * 4 + [b"onetwo"]


async def test_a_request_that_waits_for_others_of_this_process_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.client.transport, "_AT_ONCE", 2)
    hurried = RetryPolicy(total_seconds=1.5, idle_seconds=1.5, first_pause_seconds=0.01)
    under_way = most = 0

    async def slow(request: web.Request, body: bytes) -> web.StreamResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.2)
        under_way -= 1
        return await (ingested if request.method == "PUT" else created())(request, body)

    async with failing_gateway(slow) as gateway, client_of(gateway, hurried) as registry:
        puts = [registry.ingest_file(PACKAGE, "a", "text/plain", b"abc") for _ in range(16)]
        calls = [registry.create_package(*ABOUT) for _ in range(16)]
        await asyncio.gather(*puts, *calls)
    assert len(gateway.seen) == 32
    assert most == 4, "two bodies, and two calls, which do not wait for bodies"


async def test_a_file_that_changes_while_it_is_sent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * 100)
    source = FileSource(path, FileStamp.of(path.stat()))
    with path.open("ab") as more:
        more.write(b"y")
    async with failing_gateway(ingested) as gateway:
        with pytest.raises(ContentMismatchError, match=r"log\.txt changed while"):
            await put(gateway, source)


async def test_bytes_that_arrived_as_others_are_noticed() -> None:
    async def garbled(request: web.Request, body: bytes) -> web.StreamResponse:
        return await ingested(request, b"!" + body[1:])

    async with failing_gateway(garbled) as gateway:
        with pytest.raises(CorruptError, match="arrived as other bytes"):
            await put(gateway, b"some bytes")


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("a b.txt", "a%20b.txt"),
        ("%41", "%2541"),
        ("x#y?z", "x%23y%3Fz"),
        ("läs/mig", "l%C3%A4s/mig"),
        ("a+b&c=d;e,f@[g]", "a%2Bb%26c%3Dd%3Be%2Cf%40%5Bg%5D"),
    ],
)
async def test_a_path_arrives_as_it_is(path: str, raw: str) -> None:
    async with failing_gateway(ingested) as gateway, client_of(gateway) as registry:
        await registry.ingest_file(PACKAGE, path, "text/plain", b"")
    assert gateway.seen[0].raw_path == f"/v1/packages/{PACKAGE}/files/{raw}"


async def test_an_actor_that_a_header_would_change_is_refused() -> None:
    async with failing_gateway(created()) as gateway, client_of(gateway) as registry:
        with pytest.raises(ValueError, match="space"):
            await registry.create_package(*ABOUT, " ada")
        with pytest.raises(ValueError, match="control characters"):
            await registry.create_package(*ABOUT, "ada\r\nX-Evil: 1")
        await registry.create_package(*ABOUT, "Åda Lövelace")
    assert gateway.sent("X-Actor") == ["Åda Lövelace"]


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Mon, 01 Jan 2001 00:00:00 +99999999999999999999") is None
    assert retry_after("soon") is None
    assert retry_after(None) is None
