"""The client tries again with the same command id, waits as it is told, and gives up in time."""

from __future__ import annotations

import asyncio
import time
from uuid import UUID, uuid4

import pytest
from aiohttp import web

import artifact_store.client.transport
from artifact_store import RetryPolicy
from artifact_store.documents.problem_details import TYPE_PREFIX, retry_after
from artifact_store.errors import (
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
from tests.unit.artifact_store.client.failing_gateway import (
    FILE,
    PACKAGE,
    Answering,
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


async def test_a_refusal_behind_an_answer_that_was_lost_is_not_told_as_nothing_recorded() -> None:
    busy = refuses(503, "push-back", {"Retry-After": "3600"})
    async with failing_gateway(cuts, busy) as gateway, client_of(gateway) as registry:
        with pytest.raises(UnavailableError):
            await registry.create_package(*ABOUT)
    assert len(gateway.seen) == 2


@pytest.mark.slow
async def test_trying_ends_with_the_time_that_it_may_take() -> None:
    async with failing_gateway(cuts) as gateway, client_of(gateway, SHORT) as registry:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="outcome is unknown"):
            await registry.create_package(*ABOUT)
    assert time.monotonic() - began < 30
    assert len(gateway.seen) > 1


@pytest.mark.slow
async def test_a_view_that_stays_behind_is_a_wait_that_ran_out() -> None:
    async with failing_gateway(refuses(504, "wait-timeout")) as gateway, client_of(gateway, SHORT) as registry:
        with pytest.raises(WaitTimeoutError):
            await registry.get_package(PACKAGE)
    assert len(gateway.seen) > 1


@pytest.mark.slow
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
        with pytest.raises(CorruptError, match="is this the URL of a gateway"):
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


@pytest.mark.slow
async def test_a_request_that_waits_for_others_of_this_process_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_store.client.transport, "_AT_ONCE", 2)
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
