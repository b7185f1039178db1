"""Bodies are sent again only if they can be read again, whole, and are never recorded as other bytes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web
from blake3 import blake3

from artifact_store import FileSource, RetryPolicy
from artifact_store.byte_streams import CHUNK_BYTES
from artifact_store.client.bodies import BodySource, CountedSource, FileStamp, PiecesSource, SeekableSource
from artifact_store.errors import ContentMismatchError, CorruptError, PushBackError, UnavailableError
from artifact_store.models import Declared
from tests.unit.artifact_store.client.failing_gateway import (
    FILE,
    PACKAGE,
    Answering,
    FailingGateway,
    client_of,
    cuts,
    failing_gateway,
    ingested,
    refuses,
)


async def once(chunks: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


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
        with pytest.raises(CorruptError, match="did not arrive as it was sent"):
            await put(gateway, b"some bytes")


async def test_the_digest_of_a_file_is_that_of_what_iterating_gives(tmp_path: Path) -> None:
    path, data = tmp_path / "a", os.urandom(2 * CHUNK_BYTES + 17)
    path.write_bytes(data)
    source = FileSource(path, FileStamp.of(path.stat()))
    assert await source.blake3() == blake3(data).digest()
    assert await source.behind(CHUNK_BYTES + 1).blake3() == blake3(data[CHUNK_BYTES + 1 :]).digest()
    os.truncate(path, CHUNK_BYTES)
    with pytest.raises(ContentMismatchError, match="changed while it was pushed"):
        await source.blake3()


@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 7), (1 << 20,), (700_000, 700_000, 1), (262_144,) * 9])
async def test_pieces_are_joined_into_chunks_of_a_mebibyte_at_most(sizes: tuple[int, ...]) -> None:
    pieces = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    source = PiecesSource(pieces)
    for _ in range(2):
        chunks = [chunk async for chunk in source]
        assert b"".join(chunks) == b"".join(pieces)
        assert all(0 < len(chunk) <= 1 << 20 for chunk in chunks)
    assert source.size_bytes == sum(sizes)
    assert b"".join([chunk async for chunk in source.behind(3)]) == b"".join(pieces)[3:]


async def test_reads_do_not_wait_for_files_that_are_being_hashed(tmp_path: Path) -> None:
    begun, end, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    class Slow(FileSource):
        def _hash_now(self, given_up: threading.Event) -> bytes:
            loop.call_soon_threadsafe(begun.set)
            assert end.wait(30)
            return super()._hash_now(given_up)

    path = tmp_path / "a"
    path.write_bytes(b"some bytes")
    stamp = FileStamp.of(path.stat())
    hashing = [asyncio.create_task(Slow(path, stamp).blake3()) for _ in range(64)]
    try:
        async with asyncio.timeout(5):
            await begun.wait()
            assert await FileSource(path, stamp).read_whole() == b"some bytes"
    finally:
        end.set()
        digests = await asyncio.gather(*hashing)
    assert set(digests) == {blake3(b"some bytes").digest()}
