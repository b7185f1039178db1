"""Unusual answers of an S3 store: full, overloaded, moved, and failed with status 200."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import uuid4

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from artifact_store.errors import UnavailableError
from artifact_store.models import Declared
from services.blobs.intake import digests_of
from services.blobs.s3.requests import Endpoint
from services.blobs.s3.store import S3BlobStore

PART = 5 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error(status: int, code: str) -> web.Response:
    return web.Response(
        status=status, text=f'<?xml version="1.0"?>\n<Error><Code>{code}</Code></Error>', content_type="application/xml"
    )


@asynccontextmanager
async def answered_by(handler: Handler) -> AsyncIterator[S3BlobStore]:
    app = web.Application(client_max_size=2 * PART)
    app.router.add_route("*", "/{path:.*}", handler)
    async with TestServer(app) as server:
        at = Endpoint(f"{server.host}:{server.port}", "bucket", False, "user", "secret", "us-east-1")
        store = S3BlobStore(at, part_bytes=PART, held_bytes=2 * PART, attempts=3)
        try:
            yield store
        finally:
            await store.close()


async def zeros(size: int) -> AsyncIterator[bytes]:
    yield bytes(size)


async def test_bytes_of_a_pack_are_sent_in_pieces() -> None:
    """aiohttp warns of a body of more than 1 MiB in one piece, and warnings are errors here."""
    data, got = bytes(range(256)) * 8192, []

    async def answer(request: web.Request) -> web.Response:
        if request.method == "HEAD":
            return web.Response(status=404)
        got.append(await request.read())
        return web.Response()

    async with answered_by(answer) as store:
        await store.store_bytes(data, await digests_of(data))
    assert got == [data]


@pytest.mark.parametrize(
    "answer",
    [
        (507, "InsufficientStorage"),
        (500, "XMinioStorageFull"),
        (400, "XMinioAdminBucketQuotaExceeded"),
        (403, "QuotaExceeded"),
    ],
)
async def test_a_full_store_is_said_to_be_full_at_once(answer: tuple[int, str]) -> None:
    asked = 0

    async def full(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        await request.read()
        return error(*answer)

    async with answered_by(full) as store:
        with pytest.raises(UnavailableError, match="is full: make room") as refused:
            await store.store(zeros(10), declared=Declared(), max_bytes=10)
        with pytest.raises(UnavailableError, match="is full"):
            await store.check()
    assert asked == 2
    assert refused.value.retry_after == 10


@pytest.mark.parametrize("answer", [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout"), (502, "")])
async def test_an_overloaded_store_is_asked_again_a_few_times(answer: tuple[int, str]) -> None:
    for bad in (2, 3):
        left = bad

        async def overloaded(request: web.Request) -> web.StreamResponse:
            nonlocal left
            await request.read()
            left -= 1
            return error(*answer) if left >= 0 else web.Response()

        async with answered_by(overloaded) as store:
            if bad == 2:
                assert (await store.store(zeros(10), declared=Declared(), max_bytes=10)).length == 10
            else:
                with pytest.raises(UnavailableError, match=str(answer[0])):
                    await store.store(zeros(10), declared=Declared(), max_bytes=10)


@pytest.mark.parametrize("failures", [1, 3])
async def test_a_completion_that_fails_under_status_200_is_not_taken_for_done(failures: int) -> None:
    left = failures
    kept: set[str] = set()

    async def store_of_parts(request: web.Request) -> web.StreamResponse:
        nonlocal left
        await request.read()
        if request.method == "POST" and "uploads" in request.query:
            return web.Response(text="<Result xmlns='x:'><UploadId>id</UploadId></Result>")
        if request.method == "POST":
            left -= 1
            if left >= 0:
                return error(200, "InternalError")
            return web.Response(text="\n  <?xml version='1.0'?><CompleteMultipartUploadResult/>")
        if request.method == "HEAD":
            return web.Response(status=404)
        key = re.sub(r"[0-9a-f-]{36}", "UUID", request.path)
        if request.method == "DELETE":
            kept.discard(key + request.query.get("uploadId", ""))
            return web.Response(status=204)
        kept.add(key + request.query.get("uploadId", ""))
        return web.Response(headers={"ETag": '"e"'})

    async with answered_by(store_of_parts) as store:
        if failures == 1:
            blob = await store.store(zeros(PART + 1), declared=Declared(), max_bytes=2 * PART)
            assert blob.length == PART + 1
        else:
            with pytest.raises(UnavailableError, match="InternalError"):
                await store.store(zeros(PART + 1), declared=Declared(), max_bytes=2 * PART)
    # Of one that is completed the record stays for a day, of one that is not neither that nor the upload.
    assert kept == ({"/bucket/multipart/UUID", "/bucket/uploads/UUIDid"} if failures == 1 else set())


@pytest.mark.slow
async def test_a_store_may_think_about_a_completion_for_longer_than_about_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.blobs.s3.requests.ANSWER_SECONDS", 0.5)
    completions = 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal completions
        await request.read()
        if request.method == "POST" and "uploads" in request.query:
            return web.Response(text="<Result><UploadId>id</UploadId></Result>")
        if request.method == "POST":
            completions += 1
            await asyncio.sleep(1.5)
            return web.Response(text="<CompleteMultipartUploadResult/>")
        return web.Response(headers={"ETag": '"e"'})

    async with answered_by(slow) as store:
        assert (await store.store(zeros(PART + 1), declared=Declared(), max_bytes=2 * PART)).length == PART + 1
    assert completions == 1


async def test_an_upload_whose_beginning_is_cancelled_is_ended() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def slow(request: web.Request) -> web.StreamResponse:
        if request.method == "DELETE":
            ended.append(request.query["uploadId"])
            return web.Response(status=204)
        asked.set()
        await go_on.wait()
        return web.Response(text="<Result><UploadId>id</UploadId></Result>")

    async with answered_by(slow) as store, asyncio.timeout(60):
        beginning = asyncio.create_task(store.parts.begin(uuid4(), 3 * PART))
        await asked.wait()
        beginning.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        assert ended == ["id"]


async def test_a_redirect_is_reported_not_followed() -> None:
    async def moved(request: web.Request) -> web.StreamResponse:
        assert "elsewhere" not in request.path
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async with answered_by(moved) as store:
        with pytest.raises(UnavailableError, match="307"):
            await store.size("blobs/x")
        with pytest.raises(UnavailableError, match="307"):
            await anext(aiter(store.read("blobs/x", 0, 1)))


async def test_a_store_that_ignores_conditional_puts_still_keeps_the_right_bytes() -> None:
    kept: dict[str, bytes] = {}

    async def unconditional(request: web.Request) -> web.StreamResponse:
        kept[request.path] = await request.read()
        return web.Response()

    async with answered_by(unconditional) as store:
        for _ in range(2):
            blob = await store.store(zeros(10), declared=Declared(), max_bytes=10)
    assert kept == {f"/bucket/{blob.key}": bytes(10)}


@pytest.mark.parametrize("status", [200, 403, 404])
@pytest.mark.parametrize("days", [1, -1])
async def test_the_store_s_time_is_known_from_its_answers_even_if_it_refuses_ours(status: int, days: int) -> None:
    its = datetime.now(UTC) + timedelta(days=days)

    async def dated(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Date": format_datetime(its, usegmt=True)})

    async with answered_by(dated) as store:
        assert store.clock.ahead() is None
        assert abs(await store.now() - its) < timedelta(seconds=10)
        assert abs((store.clock.ahead() or 0) / 1e6 + days * 86_400) < 10


@pytest.mark.parametrize("date", [None, "yesterday", ""])
async def test_a_store_that_names_no_time_has_ours(date: str | None) -> None:
    async def undated(request: web.Request) -> web.StreamResponse:
        answer = web.Response(headers={} if date is None else {"Date": date})
        await answer.prepare(request)
        return answer

    class Undated(web.Response):
        async def _prepare_headers(self) -> None:
            await super()._prepare_headers()
            del self.headers["Date"]

    async def without(_: web.Request) -> web.StreamResponse:
        return Undated()

    async with answered_by(without if date is None else undated) as store:
        assert abs(await store.now() - datetime.now(UTC)) < timedelta(seconds=10)
        assert store.clock.ahead() is None


async def test_readiness_writes_only_while_no_write_has_shown_that_the_store_takes_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    full = False

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.method)
        return error(507, "InsufficientStorage") if full and request.method == "PUT" else web.Response()

    async with answered_by(answer) as store:
        for _ in range(3):
            await store.check()
        assert asked == ["PUT", "HEAD", "HEAD"]

        full = True
        with pytest.raises(UnavailableError):
            await store.put_object("resumable/a", b"a")
        asked.clear()
        for _ in range(2):
            with pytest.raises(UnavailableError, match="full"):
                await store.check()
        assert asked == ["PUT", "PUT"]

        full = False
        await store.check()
        monkeypatch.setattr("services.blobs.s3.store.PROVEN_SECONDS", 0.0)
        await store.check()
        assert asked == ["PUT"] * 4
