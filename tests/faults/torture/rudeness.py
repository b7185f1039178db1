"""Badly behaved clients: one stops in the middle of a body, another does not wait for its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from random import Random
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from tests.faults.torture.clients import target_of
from tests.faults.torture.work import ACTOR, CREATE, MEDIA_TYPE, Work, package_fields

_CONNECTIONS = 20


async def hang_up_half_way(rng: Random, urls: Sequence[str], package_id: UUID) -> None:
    """Announce files, send half of each, keep still, hang up. None of them must ever be recorded."""

    async def one(n: int) -> None:
        length = rng.choice([100, 200_000])
        head = (
            f"PUT /v1/packages/{package_id}/files/half/{n}.bin HTTP/1.1\r\nHost: [::1]\r\nX-Actor: {ACTOR}\r\n"
            f"Idempotency-Key: {uuid4()}\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {length}\r\n\r\n"
        )
        await _send(rng.choice(urls), head.encode() + b"h" * (length // 2), rng.uniform(0.0, 3.0))

    await asyncio.gather(*(one(n) for n in range(_CONNECTIONS)))


async def leave_without_answer(rng: Random, urls: Sequence[str], works: Sequence[Work]) -> None:
    """Send whole commands and hang up before the answer can come; some are carried out, some are not."""

    async def one(work: Work) -> None:
        body = json.dumps(package_fields(work)).encode() if work.kind == CREATE else work.bytes
        media_type = "application/json" if work.kind == CREATE else MEDIA_TYPE
        head = (
            f"{'POST' if work.kind == CREATE else 'PUT'} {target_of(work)} HTTP/1.1\r\nHost: [::1]\r\n"
            f"X-Actor: {ACTOR}\r\nIdempotency-Key: {work.command_id}\r\nContent-Type: {media_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        await _send(rng.choice(urls), head.encode() + body, rng.uniform(0.0, 0.05))

    await asyncio.gather(*(one(work) for work in works))


async def _send(url: str, request: bytes, seconds: float) -> None:
    """Send, wait that long, reset the connection. It does not matter if the gateway is down."""
    parts = urlsplit(url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, parts.port), 2)
    except (OSError, TimeoutError):
        return
    try:
        writer.write(request)
        await asyncio.sleep(seconds)
    finally:
        writer.transport.abort()
