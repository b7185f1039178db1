"""A gateway's limits: a request beyond them is answered with when to try again, and no client can lock out the rest."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import pytest

import artifact_store
from ingest_gateway.protocol import connections
from services.blobs.memory import TURN_SECONDS
from services.config import Settings
from services.core.access import Right
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS, STALLING_BYTES, Client, RawAnswer, connected
from tests.integration.tokens import Tokens, bearer, principal

ME, YOU, THEM = "127.0.0.1", "127.0.0.2", "127.0.0.3"
"""Clients: loopback has many addresses."""

PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


def client(gateway: RunningGateway, address: str = ME) -> AbstractAsyncContextManager[Client]:
    return connected(gateway.port, address)


async def new_package(gateway: RunningGateway) -> UUID:
    done = await gateway.parts.registry.create("n", "p", "s", "scratch", "ada", {})
    return done.package_id


def put(package: UUID, name: str = "a") -> str:
    return f"PUT /v1/packages/{package}/files/{name}"


def expecting(size: int) -> tuple[str, str]:
    return "Expect: 100-continue", f"Content-Length: {size}"


def refused(answer: RawAnswer, status: int, kind: str) -> bool:
    problem = answer.problem()
    assert problem["type"] == f"urn:artifact-store:problem:{kind}"
    assert int(answer.headers["retry-after"]) >= 1
    return bool(answer.status == problem["status"] == status)


async def test_uploads_beyond_the_bounds_are_refused_before_their_body(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_uploads=4) as gateway, AsyncExitStack() as stack:
        package = await new_package(gateway)

        async def begun(address: str, name: str) -> Client:
            found = await stack.enter_async_context(client(gateway, address))
            found.send(put(package, name), *expecting(5))
            return found

        mine = [await begun(ME, name) for name in ("a", "b")]
        for one in mine:
            await one.may_go_on()
        assert refused(await (await begun(ME, "c")).answer(), 429, "too-many-at-once")  # half is what one may have
        yours = [await begun(YOU, name) for name in ("d", "e")]
        for one in yours:
            await one.may_go_on()
        assert refused(await (await begun(THEM, "f")).answer(), 503, "push-back")  # and these were all
        async with gateway.session.post("/v1/packages", json=PACKAGE) as answer:
            assert answer.status == 201  # what is no upload is not held up

        mine[0].writer.write(b"bytes")
        assert (await mine[0].answer()).status == 201
        yours[0].writer.transport.abort()

        async def one_left_alone() -> bool:
            async with gateway.session.get("/metrics") as answer:
                return "artifact_store_http_uploads 2.0" in await answer.text()

        await until(one_left_alone, SECONDS, "an upload whose client went away kept its place")
        again = await begun(ME, "c")
        await again.may_go_on()
        again.writer.write(b"bytes")
        assert (await again.answer()).status == 201


async def test_downloads_beyond_the_bounds_are_refused_and_their_places_become_free(
    embedded_settings: Settings,
) -> None:
    async with running_gateway(embedded_settings, max_downloads=4) as gateway, AsyncExitStack() as stack:
        package = await new_package(gateway)
        file = await gateway.parts.registry.ingest_file(package, "a", "x/y", bytes(STALLING_BYTES))
        content = f"/v1/files/{file}/content"
        await gateway.parts.registry.finalize(package, "ada")
        archive = f"/v1/packages/{package}/archive"

        async def asked(address: str, path: str, method: str = "GET") -> Client:
            found = await stack.enter_async_context(client(gateway, address))
            found.send(f"{method} {path}")
            return found

        mine = [await asked(ME, path) for path in (content, archive)]
        for one in mine:
            assert (await one.head())[0] == 200  # and then it reads no further
        for path in (content, archive):
            assert refused(await (await asked(ME, path)).answer(), 429, "too-many-at-once")
        yours = [await asked(YOU, path) for path in (content, archive)]
        for one in yours:
            assert (await one.head())[0] == 200
        for path in (content, archive):
            assert refused(await (await asked(THEM, path)).answer(), 503, "push-back")
            assert (await (await asked(THEM, path, "HEAD")).head())[0] == 200  # no bytes, no place
        async with gateway.session.put(f"/v1/packages/{await new_package(gateway)}/files/b", data=b"b") as stored:
            assert stored.status == 201  # uploads have places of their own
        mine[0].writer.transport.abort()

        async def one_left_alone() -> bool:
            async with gateway.session.get("/metrics") as answer:
                return "artifact_store_http_downloads 3.0" in await answer.text()

        await until(one_left_alone, SECONDS, "a download whose client went away kept its place")
        assert (await (await asked(ME, content)).head())[0] == 200


async def test_the_client_library_comes_again_until_there_is_a_place(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_uploads=2) as gateway, client(gateway) as first:
        package = await new_package(gateway)
        first.send(put(package), *expecting(5))
        await first.may_go_on()
        refusals: list[str] = []
        async with artifact_store.Client(
            gateway.url, notify=lambda error, _: refusals.append(error.detail)
        ) as registry:
            pushed = asyncio.create_task(registry.ingest_file(package, "b", "text/plain", b"bytes", actor="ada"))

            async def was_refused() -> bool:
                return bool(refusals)

            await until(was_refused, SECONDS, "the second upload was taken")
            first.writer.write(b"bytes")
            assert (await first.answer()).status == 201
            await asyncio.wait_for(pushed, SECONDS)
        assert "1 uploads come from this address" in refusals[0]


async def test_connections_beyond_the_bounds_get_one_answer_and_are_closed(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_connections=4) as gateway, AsyncExitStack() as stack:

        async def served(address: str) -> Client:
            found = await stack.enter_async_context(client(gateway, address))
            found.send("GET /v1/packages")
            return found

        held = [await served(address) for address in (ME, ME, YOU, YOU)]
        assert [(await one.answer()).status for one in held] == [200] * 4
        mine, theirs = await served(ME), await served(THEM)
        assert refused(await mine.answer(), 503, "push-back")
        assert await mine.is_closed()
        assert refused(await theirs.answer(), 503, "push-back")
        for path in ("/healthz", "/readyz", "/metrics"):  # a busy gateway is no dead one
            async with client(gateway, THEM) as asking:
                asking.send(f"GET {path}")
                assert (await asking.answer()).status == 200

        held[3].writer.transport.abort()

        async def a_place_is_free() -> bool:
            one = await served(THEM)
            return (await one.answer()).status == 200

        await until(a_place_is_free, SECONDS, "a connection that is gone kept its place")
        assert refused(await (await served(ME)).answer(), 503, "push-back")


async def test_no_client_has_more_than_half_of_the_connections(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_connections=4) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(gateway, address)) for address in (ME, ME, ME, YOU)]
        for one in clients:
            one.send("GET /v1/packages")
        answers = [await one.answer() for one in clients]
        assert [answer.status for answer in answers] == [200, 200, 429, 200]
        assert refused(answers[2], 429, "too-many-at-once")


async def test_connections_that_exceed_even_that_are_cut_off(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_EXCESS", 1)
    monkeypatch.setattr(connections, "EXCESS_SECONDS", 0.5)
    async with running_gateway(embedded_settings, max_connections=1) as gateway, AsyncExitStack() as stack:
        one, two, three = [await stack.enter_async_context(client(gateway)) for _ in range(3)]
        assert await three.is_closed()
        assert await two.is_closed()  # it said nothing for as long as it might stay
        one.send("GET /v1/packages")
        assert (await one.answer()).status == 200


async def test_json_bodies_share_the_room_that_there_is(embedded_settings: Settings) -> None:
    def wanted(filling: int) -> dict[str, Any]:
        return {**PACKAGE, "metadata": {"filling": "x" * filling}}

    async with running_gateway(embedded_settings, json_room_bytes=4000) as gateway:
        for filling, status in ((1000, 201), (2500, 429), (5000, 503), (1000, 201)):
            async with gateway.session.post("/v1/packages", json=wanted(filling)) as answer:
                assert answer.status == status
                assert (answer.headers.get("Retry-After") is not None) == (status != 201)


async def test_no_client_has_more_than_half_of_the_places_for_followers(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_followers=4) as gateway, AsyncExitStack() as stack:

        async def following(address: str) -> Client:
            found = await stack.enter_async_context(client(gateway, address))
            found.send("GET /v1/events?follow=true")
            return found

        for _ in range(2):
            assert (await (await following(ME)).head())[0] == 200
        assert refused(await (await following(ME)).answer(), 429, "too-many-at-once")
        for _ in range(2):
            assert (await (await following(YOU)).head())[0] == 200
        assert refused(await (await following(THEM)).answer(), 503, "push-back")


async def test_who_reads_events_to_the_end_needs_a_place_as_a_follower_does(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, max_reads=4) as gateway, AsyncExitStack() as stack:
        for _ in range(200):  # more than what lies between a gateway and a client that takes nothing
            metadata = {"text": "x" * 60_000}
            await gateway.parts.registry.create("n", "p", "s", "scratch", "ada", metadata)

        async def reading(address: str) -> Client:
            found = await stack.enter_async_context(client(gateway, address))
            found.send("GET /v1/events")
            return found

        for _ in range(2):
            assert (await (await reading(ME)).head())[0] == 200
        assert refused(await (await reading(ME)).answer(), 429, "too-many-at-once")
        for _ in range(2):
            assert (await (await reading(YOU)).head())[0] == 200
        assert refused(await (await reading(THEM)).answer(), 503, "push-back")


@pytest.mark.parametrize("kind", ["file", "tar"])
async def test_what_the_state_refuses_is_refused_before_the_body(embedded_settings: Settings, kind: str) -> None:
    async with running_gateway(embedded_settings) as gateway:
        unknown, finalized, filled = uuid4(), await new_package(gateway), await new_package(gateway)
        await gateway.parts.registry.finalize(finalized, "ada")
        async with gateway.session.put(f"/v1/packages/{filled}/files/a", data=b"bytes") as answer:
            assert answer.status == 201
        media_type = {"file": "text/plain", "tar": "application/x-tar"}[kind]
        cases = [(unknown, 404, "package-not-found"), (finalized, 409, "illegal-package-state")]
        if kind == "file":
            cases.append((filled, 409, "duplicate-relative-path"))

        async def check(package: UUID, status: int, problem: str) -> None:
            line = put(package) if kind == "file" else f"POST /v1/packages/{package}/files"
            async with client(gateway) as asking:
                asking.send(line, *expecting(1000), f"Content-Type: {media_type}")
                answer = await asking.answer()  # the answer itself, no 100-continue before it
                assert (answer.status, answer.problem()["type"].rpartition(":")[2]) == (status, problem)
                assert answer.headers["connection"] == "close"
                assert await asking.is_closed()

        # At the same time: each connection stands for ten seconds, in case that its body comes all the same.
        await asyncio.gather(*(check(*case) for case in cases))


LARGE_BYTES = 64 << 20
LARGE_UPLOADS = 16
TRICKLE_BYTES = 64 * 1024
TRICKLE_SECONDS = 0.25
"""Four times the pace below which a body is given up while others wait."""


@pytest.mark.services
async def test_small_uploads_pass_large_ones_that_hold_all_the_memory(
    embedded_settings: Settings, s3_bucket: dict[str, Any]
) -> None:
    settings = Settings(log_url=embedded_settings.log_url, views_url=embedded_settings.views_url, **s3_bucket)
    async with running_gateway(settings) as gateway, AsyncExitStack() as stack:
        package = await new_package(gateway)
        reading: set[int] = set()

        async def upload(n: int) -> None:
            async with client(gateway) as one:
                one.send(put(package, f"large-{n}"), *expecting(LARGE_BYTES))
                await one.may_go_on()
                reading.add(n)
                while True:
                    one.writer.write(bytes(TRICKLE_BYTES))
                    await one.writer.drain()
                    await asyncio.sleep(TRICKLE_SECONDS)  # a client that sends slowly

        large = [asyncio.create_task(upload(n)) for n in range(LARGE_UPLOADS)]
        stack.push_async_callback(asyncio.wait, large)
        for task in large:
            stack.callback(task.cancel)

        async def memory_is_short() -> bool:
            async with gateway.session.get("/metrics") as answer:
                begun = f"artifact_store_http_uploads {LARGE_UPLOADS}.0" in await answer.text()
            return begun and len(reading) >= 8

        await until(memory_is_short, SECONDS, "the large uploads did not begin")
        assert len(reading) < LARGE_UPLOADS, "there was memory for all: the test shows nothing"
        before = set(reading)
        async with asyncio.timeout(TURN_SECONDS / 2):  # behind the large ones they would wait until those give up
            for n, size in enumerate((1, 4096, 70_000, 200_000) * 2):
                async with gateway.session.put(f"/v1/packages/{package}/files/{n}", data=bytes(size)) as answer:
                    assert answer.status == 201
        assert reading == before, "large uploads came to an end meanwhile: the test shows nothing"


@pytest.mark.parametrize(
    ("quota", "most"), [("packages", 2), ("bytes", 150), ("metadata bytes", 150), ("resumable uploads", 2)]
)
async def test_a_principal_that_used_its_quota_is_told_when_to_come_again(
    embedded_settings: Settings, quota: str, most: int
) -> None:
    about = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": {"k": "v" * 20}}
    async with running_gateway(embedded_settings, quotas={quota: most}) as gateway:
        package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
        where = f"/v1/packages/{package}"
        statuses = []
        for number in range(3):
            if quota == "bytes":
                asking = gateway.session.put(f"{where}/files/{number}", data=bytes(100))
            elif quota == "resumable uploads":
                begins = {"Tus-Resumable": "1.0.0", "Upload-Length": "9", "Upload-Metadata": f"filename {'YWJj'[:4]}"}
                asking = gateway.session.post(f"{where}/uploads", headers=begins)
            else:
                asking = gateway.session.post("/v1/packages", json=about)
            async with asking as answer:
                statuses.append(answer.status)
                if answer.status == 429:
                    assert (await answer.json())["type"].endswith("quota-exceeded")
                    assert int(answer.headers["Retry-After"]) >= 1
        assert statuses == [201, 201, 429]
        async with gateway.session.get("/v1/packages") as answer:
            assert answer.status == 200


TUS = {"Tus-Resumable": "1.0.0", "Upload-Metadata": "filename YWJj"}
BYTES = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}


async def test_open_uploads_are_counted_by_address_where_nobody_proves_who_they_are(
    embedded_settings: Settings,
) -> None:
    async with running_gateway(embedded_settings, quotas={"open uploads": 2}) as gateway:
        package = await new_package(gateway)

        async def begin(address: str = ME, key: UUID | None = None, name: str = "YWJj") -> RawAnswer:
            begins = {**TUS, "Upload-Metadata": f"filename {name}", "Upload-Length": "2", "Content-Length": "0"}
            if key is not None:
                begins["Idempotency-Key"] = str(key)
            async with client(gateway, address) as one:
                one.send(f"POST /v1/packages/{package}/uploads", *(f"{name}: {text}" for name, text in begins.items()))
                return await one.answer()

        key = uuid4()
        first, second = await begin(key=key), await begin(name="ZGVm")
        assert refused(await begin(), 429, "quota-exceeded")
        assert (await begin(key=key)).headers["location"] == first.headers["location"]  # a repeat is no further one
        assert (await begin(key=key, name="eHl6")).status == 422  # nor does one that is refused make room
        assert refused(await begin(), 429, "quota-exceeded")
        assert (await begin(YOU)).status == 201
        async with gateway.session.delete(first.headers["location"], headers=TUS) as answer:
            assert answer.status == 204
        third = await begin()
        assert third.status == 201
        assert refused(await begin(), 429, "quota-exceeded")
        async with gateway.session.patch(second.headers["location"], headers=BYTES, data=b"ok") as answer:
            assert answer.status == 204
        assert (await begin(name="Z2hp")).status == 201


async def test_open_uploads_of_one_token_are_no_quota_of_another(embedded_settings: Settings) -> None:
    tokens = Tokens(ada=principal("ada", Right.WRITE), bob=principal("bob", Right.WRITE))
    async with running_gateway(embedded_settings, authenticate=tokens, quotas={"open uploads": 1}) as gateway:
        package = await new_package(gateway)
        for token, status in (("ada", 201), ("ada", 429), ("bob", 201)):
            begins = {**TUS, **bearer(token), "Upload-Length": "2"}
            async with gateway.session.post(f"/v1/packages/{package}/uploads", headers=begins) as answer:
                assert answer.status == status
