"""A stream bundles files, acknowledges them in order, holds a bounded number of bytes, and reports every file."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import web

from artifact_store import Client, RetryPolicy, SyncClient
from artifact_store.client.stream import BATCH_FILES, REQUESTS_AT_ONCE, Added, FileStream
from artifact_store.errors import (
    ConfigurationError,
    CorruptError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    InvalidPathError,
    InvalidRequestError,
    TooLargeError,
    UnavailableError,
)
from artifact_store.models import IngestedFile
from tests.unit.artifact_store.client.failing_gateway import (
    FILE,
    PACKAGE,
    Answering,
    FailingGateway,
    client_of,
    cuts,
    failing_gateway,
    refuses,
)
from tests.unit.artifact_store.client.recording_gateway import Recorder

HASTY = RetryPolicy(total_seconds=0.05, first_pause_seconds=0.001, longest_pause_seconds=0.01)


@asynccontextmanager
async def stream_to(
    *script: Answering, policy: RetryPolicy | None = None, max_bytes: int | None = None
) -> AsyncIterator[tuple[FileStream, FailingGateway]]:
    """An open stream to a gateway that answers as the script says."""
    async with (
        failing_gateway(*script) as gateway,
        client_of(gateway, *([policy] if policy else [])) as registry,
        registry.stream(PACKAGE, max_bytes=max_bytes) as files,
    ):
        yield files, gateway


def content(number: int) -> bytes:
    return b"%d," % number * 10


async def add_all(registry: Client, count: int) -> None:
    async with registry.stream(PACKAGE) as files:
        for number in range(count):
            await files.add(f"{number}", content(number))


async def test_a_loop_of_adds_takes_few_requests_and_keeps_the_order() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records) as (files, gateway):
        added = [await files.add(f"{number:04}", content(number)) for number in range(2 * BATCH_FILES)]
        ingested = [await each for each in added]
    assert recorder.files == {f"{number:04}": content(number) for number in range(2 * BATCH_FILES)}
    assert [file.relative_path for file in ingested] == sorted(recorder.files)
    assert len(gateway.seen) == 2
    assert {seen.raw_path for seen in gateway.seen} == {f"/v1/packages/{PACKAGE}/files"}


async def test_files_that_are_added_at_the_same_time_travel_together() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records) as (files, _):
        await asyncio.gather(*(files.add(f"{number}", content(number)) for number in range(50)))
    assert len(recorder.requests) == 1
    assert len(recorder.files) == 50


async def test_acknowledgements_come_in_the_order_of_adding() -> None:
    recorder, go = Recorder(), asyncio.Event()
    told: list[str] = []

    async def tell(added: Added) -> None:
        told.append((await added).relative_path)

    async with stream_to(recorder.held(go), recorder.records) as (files, _):
        added = [await files.add("first", b"", "text/x-log"), await files.add("later", b"", "text/x-log")]
        waiting = [asyncio.create_task(tell(each)) for each in added]
        await recorder.recorded.wait()
        assert list(recorder.files) == ["later"]  # which is answered now
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting[1]), 0.1)
        go.set()
        await asyncio.gather(*waiting)
    assert told == ["first", "later"]


async def test_adding_waits_while_the_stream_holds_as_much_as_it_may() -> None:
    recorder, go = Recorder(), asyncio.Event()
    taken: list[Added] = []

    async def add(files: FileStream) -> None:
        for number in range(100):
            taken.append(await files.add(f"{number}", bytes(9_000)))  # noqa: PERF401 - the list shows how far it came

    async with stream_to(recorder.held(go), max_bytes=105_000) as (files, _):
        adding = asyncio.create_task(add(files))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(adding), 0.1)
        assert len(taken) == 10
        go.set()
        await adding
    assert len(recorder.files) == 100


async def test_no_more_requests_than_the_limit_are_under_way() -> None:
    recorder, go = Recorder(), asyncio.Event()
    async with stream_to(recorder.held(go)) as (files, gateway):
        for number in range(REQUESTS_AT_ONCE + 2):
            await files.add(f"{number}", b"", "text/x-log")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(files.flush(), 0.1)
        assert len(gateway.seen) == REQUESTS_AT_ONCE
        go.set()
    assert len(gateway.seen) == REQUESTS_AT_ONCE + 2


async def test_a_request_whose_answer_was_lost_is_sent_again_under_its_key() -> None:
    recorder = Recorder()
    later = refuses(503, "push-back", {"Retry-After": "0"})
    async with stream_to(recorder.loses_answers, cuts, later, recorder.records) as (files, gateway):
        for number in range(20):
            await files.add(f"{number}", content(number))
    assert len(recorder.files) == 20
    assert len(gateway.seen) == 4
    assert len(set(gateway.sent("Idempotency-Key"))) == 1


async def test_a_refused_file_is_alone_with_its_refusal() -> None:
    recorder = Recorder(files={"13": b"before"})
    async with stream_to(recorder.records) as (files, _):
        added = [await files.add(f"{number}", content(number)) for number in range(40)]
        with pytest.raises(DuplicateRelativePathError):
            await added[13]
        others = [await each for number, each in enumerate(added) if number != 13]
    assert [file.relative_path for file in others] == [f"{number}" for number in range(40) if number != 13]
    assert len(recorder.files) == 40
    assert recorder.files["13"] == b"before"


async def test_a_path_that_is_added_twice_is_refused_the_second_time() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records) as (files, _):
        first, second = await files.add("a", b"first"), await files.add("a", b"second")
        assert (await first).relative_path == "a"
        with pytest.raises(DuplicateRelativePathError):
            await second
    assert recorder.files == {"a": b"first"}


async def test_leaving_raises_a_refusal_that_nobody_awaited() -> None:
    recorder = Recorder(files={"1": b"", "2": b""})
    async with failing_gateway(recorder.records) as gateway, client_of(gateway) as registry:
        with pytest.raises(DuplicateRelativePathError) as raised:
            await add_all(registry, 10)
    assert raised.value.__notes__ == ["and 1 more files were refused"]
    assert len(recorder.files) == 10


async def test_a_refusal_of_the_package_ends_the_stream() -> None:
    refusal = refuses(409, "illegal-package-state")
    async with failing_gateway(refusal) as gateway, client_of(gateway) as registry:
        files = await registry.stream(PACKAGE).__aenter__()
        added = [await files.add(f"{number}", b"") for number in range(9)]
        with pytest.raises(IllegalPackageStateError):
            await added[3]
        with pytest.raises(IllegalPackageStateError):
            await files.add("another", b"")
        with pytest.raises(IllegalPackageStateError):
            await files.__aexit__(None, None, None)
    assert len(gateway.seen) == 1


async def test_a_gateway_that_stays_away_ends_a_stream_in_memory() -> None:
    async with failing_gateway(cuts) as gateway, client_of(gateway, HASTY) as registry:
        with pytest.raises(UnavailableError):
            await add_all(registry, 5)


async def test_other_bytes_than_were_sent_end_the_stream() -> None:
    recorder = Recorder()

    async def damages(request: web.Request, body: bytes) -> web.StreamResponse:
        return await recorder.records(request, body.replace(b"1,", b"2,"))

    async with failing_gateway(damages) as gateway, client_of(gateway) as registry:
        with pytest.raises(CorruptError, match="do not finalize"):
            await add_all(registry, 5)


async def test_large_files_and_own_media_types_travel_alone_and_in_order() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records) as (files, _):
        added = [
            await files.add("a", b"a"),
            await files.add("b", b"b", "application/octet-stream"),  # as its name suggests
            await files.add("large", bytes(300_000)),
            await files.add("c", b"c"),
            await files.add("d", b"d", "text/x-log"),
            await files.add("é", b"e"),
        ]
        assert [(await each).relative_path for each in added] == ["a", "b", "large", "c", "d", "é"]
    assert sorted(recorder.requests) == [["a", "b"], ["c"], ["d"], ["large"], ["é"]]
    assert recorder.media_types["d"] == "text/x-log"
    assert recorder.media_types["c"] == "application/octet-stream"


async def test_a_bad_path_or_size_is_refused_at_once_and_the_stream_goes_on() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records, max_bytes=10_000) as (files, _):
        with pytest.raises(InvalidPathError):
            await files.add("../a", b"")
        with pytest.raises(InvalidRequestError):
            await files.add("a", b"", "text/plain ")
        with pytest.raises(TooLargeError):
            await files.add("a", bytes(10_000))
        with pytest.raises(TypeError):
            await files.add("a", "text")  # type: ignore[arg-type]  # as a program without types might
        await files.add("a", bytearray(b"a"))
    assert recorder.files == {"a": b"a"}


async def test_a_block_that_raises_drops_what_waits() -> None:
    recorder, go = Recorder(), asyncio.Event()
    async with failing_gateway(recorder.held(go)) as gateway, client_of(gateway) as registry:
        with suppress(ZeroDivisionError):
            async with registry.stream(PACKAGE) as files:
                added = await files.add("a", b"")
                raise ZeroDivisionError
        with pytest.raises(UnavailableError, match="closed before"):
            await added
        with pytest.raises(ConfigurationError, match="closed"):
            await files.add("b", b"")


async def test_a_file_can_be_awaited_as_soon_as_it_is_added() -> None:
    recorder = Recorder()
    async with stream_to(recorder.records) as (files, _):
        ingested = await asyncio.wait_for(wait_twice(files), 10)
    assert (ingested.relative_path, recorder.files) == ("a", {"a": b"a"})


async def wait_twice(files: FileStream) -> IngestedFile:
    return await (await files.add("a", b"a"))


async def test_a_handle_that_nobody_keeps_takes_no_memory() -> None:
    recorder, go = Recorder(), asyncio.Event()
    async with stream_to(recorder.held(go)) as (files, _):
        handle = weakref.ref(await files.add("a", b""))
        assert handle() is None
        go.set()
    assert recorder.files == {"a": b""}


async def test_a_program_without_an_event_loop_adds_files_too() -> None:
    recorder = Recorder()

    def program(url: str) -> None:
        with SyncClient(url) as registry:
            with registry.stream(PACKAGE) as files:
                added = [files.add(f"{number}", content(number)) for number in range(30)]
                assert [each.result(5).relative_path for each in added] == [f"{number}" for number in range(30)]
                files.add("last", b"")
                files.flush()
                assert "last" in recorder.files
            with pytest.raises(DuplicateRelativePathError), registry.stream(PACKAGE) as files:
                files.add("1", b"")
            with pytest.raises(ConfigurationError, match="closed"):
                files.add("2", b"")
        with pytest.raises(ConfigurationError, match="closed"):
            registry.get_package(PACKAGE)

    async with failing_gateway(recorder.records) as gateway:
        await asyncio.to_thread(program, gateway.url)


async def test_an_iterator_of_the_client_without_a_loop_ends_as_the_other_does() -> None:
    def program(url: str) -> None:
        with SyncClient(url) as registry:
            assert b"".join(registry.get_file(FILE)) == b"whole"

    async def whole(_request: web.Request, _body: bytes) -> web.StreamResponse:
        return web.Response(body=b"whole")

    async with failing_gateway(whole) as gateway:
        await asyncio.to_thread(program, gateway.url)
