"""Bundles over HTTP: a lost connection costs only what was in flight, and an archive that lies is noticed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from artifact_store import Client
from artifact_store.archives.bundle import Group, HeldFiles, SmallFile, StreamedFile
from artifact_store.archives.tar import END, entry_header, tar_of_small
from artifact_store.errors import CorruptError, IllegalPackageStateError, UnavailableError
from tests.unit.artifact_store.client.failing_gateway import (
    PACKAGE,
    Answering,
    client_of,
    cuts,
    failing_gateway,
    refuses,
)

FILES = [SmallFile(f"{number:04}", "application/octet-stream", b"%d" % number * 1_000) for number in range(800)]


def streams(data: bytes, *, whole: bool) -> Answering:
    """Answer with an archive; one that is not whole is cut off behind these bytes."""

    async def answer(request: web.Request, _body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
        await response.prepare(request)
        await response.write(data)
        if not whole:
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


async def read(registry: Client) -> list[SmallFile]:
    found: list[SmallFile] = []
    async for group in registry.read_files(PACKAGE, largest=5_000):
        assert not isinstance(group, StreamedFile)
        found += group
    return found


async def test_a_broken_archive_goes_on_behind_the_last_whole_file() -> None:
    first = tar_of_small(FILES[:500])
    script = (streams(first, whole=False), streams(tar_of_small(FILES) + END, whole=True))
    async with failing_gateway(*script) as gateway, client_of(gateway) as registry:
        found = await read(registry)
    after = gateway.seen[1].raw_path.partition("after=")[2].partition("&")[0]
    assert gateway.seen[0].raw_path == f"/v1/packages/{PACKAGE}/archive?largest=5000"
    assert found[: int(after) + 1] == FILES[: int(after) + 1]
    # The second answer begins anew, as the test has it: all of it is given on, and nothing is lost between.
    assert found[int(after) + 1 :] == FILES


@pytest.mark.parametrize(
    "data",
    [b"no archive" * 100, tar_of_small(FILES[:3]), entry_header("../up", 0) + END, tar_of_small(FILES) + END + b"x"],
)
async def test_an_archive_that_lies_is_found_out(data: bytes) -> None:
    async with failing_gateway(streams(data, whole=True)) as gateway, client_of(gateway) as registry:
        with pytest.raises(CorruptError):
            await read(registry)


async def test_a_gateway_that_brings_nothing_again_and_again_is_given_up() -> None:
    async with failing_gateway(streams(b"", whole=False)) as gateway, client_of(gateway) as registry:
        with pytest.raises(UnavailableError):
            await read(registry)


async def test_a_refusal_is_raised_as_it_is() -> None:
    async with failing_gateway(refuses(409, "illegal-package-state")) as gateway, client_of(gateway) as registry:
        with pytest.raises(IllegalPackageStateError):
            await read(registry)


async def ingested(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.json_response(
        {"package_id": str(PACKAGE), "files": [], "sequence": 3, "event_digest": "ab" * 32}, status=201
    )


async def test_files_in_memory_are_sent_again_under_the_same_key() -> None:
    async with failing_gateway(cuts, refuses(503, "unavailable"), ingested) as gateway, client_of(gateway) as registry:
        done = await registry.ingest_files(PACKAGE, HeldFiles(FILES[:5]), "me")
    assert done.sequence == 3
    assert {seen.body for seen in gateway.seen} == {tar_of_small(FILES[:5]) + END}
    assert len(set(gateway.sent("Idempotency-Key"))) == 1
    assert set(gateway.sent("Content-Type")) == {"application/x-tar"}


async def test_a_stream_of_files_is_not_sent_twice() -> None:
    async def once() -> AsyncIterator[Group]:
        yield FILES[:5]

    async with failing_gateway(cuts) as gateway, client_of(gateway) as registry:
        with pytest.raises(UnavailableError, match="cannot be read again"):
            await registry.ingest_files(PACKAGE, once(), "me")
    assert len(gateway.seen) == 1
