"""Producers' ways to a gateway: plain HTTP, and the client library. Both try another gateway when one fails.

Every attempt of a command has the same command id. Only pauses and other gateways come between a command and its
answer: any other answer goes into the journal.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Protocol, Self

import aiohttp
from yarl import URL

import artifact_store
from artifact_store.client.bodies import BytesSource
from artifact_store.client.transport import RetryPolicy
from artifact_store.errors import ArtifactStoreError, BadRecordError, PushBackError, UnavailableError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement, Declared
from tests.faults.torture.work import ACTOR, CREATE, INGEST, MEDIA_TYPE, Answer, Work, package_fields

ATTEMPT_SECONDS = 10.0
"""How long one gateway may keep still before another is asked."""

GIVE_UP_SECONDS = 180.0
"""A command that is not answered by then counts as an error that the client has seen."""

_LATER = (429, 503, 504)
_BAD_RECORD = b"urn:artifact-store:problem:bad-record"
"""The partition stands before a stranger's record until an operator confirms it. Nothing is wrong with the command."""

_PAUSE_SECONDS = (0.05, 0.1, 0.2, 0.5)


class UnexpectedAnswerError(Exception):
    """The answer is neither an acknowledgement nor a request to come again."""


class Client(Protocol):
    """Sends one command until it is acknowledged; the answer and how many attempts it took."""

    async def send(self, work: Work) -> tuple[Answer, int]:
        """Raises UnexpectedAnswerError."""

    async def __aenter__(self) -> Self:
        """Open connections."""

    async def __aexit__(self, *_: object) -> None:
        """Close them."""


class PlainClient:
    """HTTP without any library of ours."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(ATTEMPT_SECONDS, sock_connect=2)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, work: Work) -> tuple[Answer, int]:
        """See `Client`."""
        loop = asyncio.get_running_loop()
        deadline, attempts, at = loop.time() + GIVE_UP_SECONDS, 0, random.randrange(len(self._urls))
        last = ""
        while loop.time() < deadline:
            attempts += 1
            pause = _PAUSE_SECONDS[min(attempts, len(_PAUSE_SECONDS)) - 1] * random.uniform(0.5, 1.5)
            try:
                status, headers, body = await self._attempt(self._urls[at % len(self._urls)], work)
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                last = type(error).__name__
            else:
                if 200 <= status < 300:
                    return answer_of(json.loads(body)), attempts
                last = f"{status} {body[:500].decode(errors='replace')}"
                if status not in _LATER and _BAD_RECORD not in body:
                    raise UnexpectedAnswerError(f"{work.kind} {work.command_id} of package {work.package_id}: {last}")
                pause += float(headers.get("Retry-After", "0"))
            at += 1
            await asyncio.sleep(pause)
        raise UnexpectedAnswerError(
            f"{work.kind} {work.command_id} of package {work.package_id}: no answer in {GIVE_UP_SECONDS:.0f} s, "
            f"{attempts} attempts, the last: {last}"
        )

    async def _attempt(self, url: str, work: Work) -> tuple[int, dict[str, str], bytes]:
        headers = {"Idempotency-Key": str(work.command_id), "X-Actor": ACTOR}
        async with self._request(url, work, headers) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    def _request(self, url: str, work: Work, headers: dict[str, str]) -> aiohttp.client._RequestContextManager:
        target = URL(url + target_of(work), encoded=True)
        if work.kind == CREATE:
            return self._session.post(target, json=package_fields(work), headers=headers)
        if work.kind == INGEST:
            return self._session.put(target, data=work.bytes, headers={**headers, "Content-Type": MEDIA_TYPE})
        return self._session.post(target, headers=headers)


class LibraryClient:
    """The client library, one registry a gateway."""

    def __init__(self, urls: Sequence[str]) -> None:
        policy = RetryPolicy(total_seconds=ATTEMPT_SECONDS / 2, idle_seconds=ATTEMPT_SECONDS, connect_seconds=2)
        self._registries = [artifact_store.Client(url, policy, notify=lambda _error, _seconds: None) for url in urls]

    async def __aenter__(self) -> Self:
        for registry in self._registries:
            await registry.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for registry in self._registries:
            await registry.__aexit__(None, None, None)

    async def send(self, work: Work) -> tuple[Answer, int]:
        """See `Client`. An attempt is all that the library did with one gateway."""
        loop = asyncio.get_running_loop()
        deadline, attempts, at = loop.time() + GIVE_UP_SECONDS, 0, random.randrange(len(self._registries))
        while True:
            attempts += 1
            try:
                return _answer(await self._ask(self._registries[at % len(self._registries)], work)), attempts
            except (BadRecordError, PushBackError, UnavailableError) as error:
                if loop.time() > deadline:
                    raise UnexpectedAnswerError(f"{work.kind} {work.command_id}: {error.detail}") from error
                if isinstance(error, BadRecordError):
                    await asyncio.sleep(_PAUSE_SECONDS[-1])  # all others the library has retried by itself
            except ArtifactStoreError as error:
                text = f"{work.kind} {work.command_id} of package {work.package_id}: {type(error).__name__}"
                raise UnexpectedAnswerError(f"{text}: {error.detail}") from error
            at += 1

    async def _ask(self, registry: artifact_store.Client, work: Work) -> Acknowledgement:
        if work.kind == CREATE:
            fields = package_fields(work)
            return await registry.create(**fields, actor=ACTOR, command_id=work.command_id)
        if work.kind == INGEST:
            return await registry.ingest(
                work.package_id,
                work.path,
                MEDIA_TYPE,
                BytesSource(work.bytes),
                ACTOR,
                declared=Declared(size_bytes=len(work.bytes)),
                command_id=work.command_id,
            )
        return await registry.finalize(work.package_id, ACTOR, command_id=work.command_id)


def target_of(work: Work) -> str:
    """The request target of a command."""
    if work.kind == CREATE:
        return "/v1/packages"
    if work.kind == INGEST:
        return f"/v1/packages/{work.package_id}/files/{work.path}"
    return f"/v1/packages/{work.package_id}/finalize"


def answer_of(body: dict[str, object]) -> Answer:
    """From the JSON of a 2xx answer."""
    address = body.get("content_address") or body.get("manifest_digest") or ""
    return Answer(int(str(body["sequence"])), str(body["event_digest"]), str(address))


def _answer(done: Acknowledgement) -> Answer:
    digest = done.files[0].blake3 if done.files else done.manifest_digest
    address = "" if digest is None else str(ContentAddress.of_digest(digest))
    return Answer(done.sequence, done.event_digest.hex(), address)
