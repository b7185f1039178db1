"""`ingest-single`: files of 4 KiB put one by one, 64 at a time, in files/s. `ingest-one`: one at a time, p50 in ms.

Ours are `PUT`s to one gateway process, in eight packages: every file is hashed, stored and recorded before it is
answered. The baseline of `ingest-single` are presigned `PUT`s of the same size straight to the same store. That of
`ingest-one` is the sum of what cannot be spared: one such `PUT`, and one command of the gateway's own writer, as
`append-latency` measures it. All by the same client (aiohttp, kept connections), with addresses and bodies made before
the clock starts. No projector runs: ingest needs no view.

`ingest-single-tokens`: the `PUT`s of `ingest-single` with a token of an OIDC issuer, to a gateway that a policy tells
who may write; the baseline are the same `PUT`s to another gateway, which asks nobody who they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import uuid4

import aiohttp
from yarl import URL

from artifact_store.client.client import Client
from benchmarks.append_latency import AppendLatency
from benchmarks.copiers import Bucket
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from services.config import Settings
from tests.oidc_provider import AUDIENCE, provider

FILES = 4_000
FILE_BYTES = 4_096
CONCURRENCY = 64
PACKAGES = 8
FILES_ALONE = 300

MICROS = 1_000_000

_TOKEN_SECONDS = 86_400

_POLICY = """\
[[issuer]]
alias = "ci"
url = "{url}"
audience = ["{audience}"]
[[rule]]
issuer = "ci"
claims = {{ sub = "job-*" }}
can = ["read", "write"]
producers = ["bench*"]
"""

Item = TypeVar("Item")

Put = tuple[URL, bytes, int]
"""Address, body, and the status that says that it is stored."""


class SinglePuts:
    """The same files by two ways; see the module."""

    def __init__(self, stage: Stage, token_file: Path | None = None) -> None:
        """Requests to the gateway carry the token in `token_file`."""
        self._stage = stage
        self._token_file = token_file
        self._draw = Random(7)
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {"files": FILES, "file_bytes": FILE_BYTES, "concurrency": CONCURRENCY, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        async with Client(self._stage.gateway.endpoint, token_file=self._token_file) as registry:
            packages = [
                await registry.create_package(f"single-{number}", "benchmark", "single", "scratch")
                for number in range(PACKAGES)
            ]
        base = f"{self._stage.gateway.endpoint}/v1/packages"
        puts = [
            (URL(f"{base}/{packages[number % PACKAGES]}/files/frame-{number:05}.bin"), body, 201)
            for number, body in enumerate(self._bodies())
        ]
        objects = await asyncio.to_thread(self._stage.count, "blobs/")
        token = None if self._token_file is None else self._token_file.read_text()
        seconds, costs = await with_costs(self._stage, put_all(puts, CONCURRENCY, token))
        self._found = {**costs, "objects": await asyncio.to_thread(self._stage.count, "blobs/") - objects}
        return FILES / seconds

    async def baseline(self) -> float:
        """Straight to the store."""
        # Objects stay until the end: where many were removed a moment ago, making new ones takes longer.
        prefix = f"copies/{uuid4().hex}"
        seconds, _ = await put_all(presigned(self._stage.bucket, prefix, self._bodies()), CONCURRENCY)
        found = await asyncio.to_thread(self._stage.count, prefix)
        assert found == FILES, f"{found} objects are there instead of {FILES}"
        return FILES / seconds

    def _bodies(self) -> Iterator[bytes]:
        """Bytes that were never seen before."""
        return (self._draw.randbytes(FILE_BYTES) for _ in range(FILES))


class TokenPuts:
    """The same files with and without tokens; see the module."""

    def __init__(self, with_tokens: SinglePuts, without: SinglePuts) -> None:
        self._with = with_tokens
        self._without = without

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what the last run of each took."""
        return {**self._with.details(), "without": self._without.details()}

    async def ours(self) -> float:
        """To the gateway that asks for tokens."""
        return await self._with.ours()

    async def baseline(self) -> float:
        """To the gateway that does not."""
        return await self._without.ours()


class OnePut:
    """One file after the other; see the module."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._draw = Random(8)
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what the last baseline was made of."""
        return {"files": FILES_ALONE, "file_bytes": FILE_BYTES, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        endpoint = self._stage.gateway.endpoint
        async with Client(endpoint) as registry:
            package = await registry.create_package("alone", "benchmark", "single", "scratch")
        base = f"{endpoint}/v1/packages/{package}/files"
        puts = [(URL(f"{base}/frame-{number:05}.bin"), body, 201) for number, body in enumerate(self._bodies())]
        gateway = self._stage.gateway_cpu()
        _, waits = await put_all(puts, 1)
        micros = (self._stage.gateway_cpu() - gateway) / FILES_ALONE * MICROS
        self._found["gateway_cpu_micros_a_file"] = round(micros)
        return waits[FILES_ALONE // 2] * 1_000

    async def baseline(self) -> float:
        """Straight to the store, and straight to the log."""
        _, waits = await put_all(presigned(self._stage.bucket, f"copies/{uuid4().hex}", self._bodies()), 1)
        put, append = waits[FILES_ALONE // 2] * 1_000, await AppendLatency(self._stage.settings).ours()
        self._found |= {"put_ms": round(put, 2), "append_ms": round(append, 2)}
        return put + append

    def _bodies(self) -> Iterator[bytes]:
        return (self._draw.randbytes(FILE_BYTES) for _ in range(FILES_ALONE))


def presigned(bucket: Bucket, prefix: str, bodies: Iterable[bytes]) -> list[Put]:
    client = bucket.client()
    return [
        (URL(client.presigned_put_object(bucket.name, f"{prefix}/{number:05}"), encoded=True), body, 200)
        for number, body in enumerate(bodies)
    ]


async def put_all(puts: Sequence[Put], concurrency: int, token: str | None = None) -> tuple[float, list[float]]:
    """Seconds for all, and how long each waited for its answer, sorted."""

    async def put(session: aiohttp.ClientSession, each: Put) -> None:
        address, body, stored = each
        async with session.put(address, data=body) as answer:
            said = await answer.read()
        assert answer.status == stored, said

    return await send_all(puts, put, concurrency, token)


async def send_all(
    items: Iterable[Item],
    send: Callable[[aiohttp.ClientSession, Item], Awaitable[None]],
    concurrency: int,
    token: str | None = None,
) -> tuple[float, list[float]]:
    """Send one request for each item. Seconds for all, and how long each waited for its answer, sorted."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    waits = []
    waiting = iter(items)

    async def work(session: aiohttp.ClientSession) -> None:
        for item in waiting:
            began = time.perf_counter()
            await send(session, item)
            waits.append(time.perf_counter() - began)

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(session))
        seconds = time.perf_counter() - began
    return seconds, sorted(waits)


async def with_costs(stage: Stage, sending: Awaitable[tuple[float, list[float]]]) -> tuple[float, dict[str, Any]]:
    """Seconds for the requests of FILES files to the gateway, and what each of them cost."""
    gateway, client = stage.gateway_cpu(), time.process_time()
    seconds, waits = await sending
    return seconds, {
        "gateway_cpu_micros_a_file": round((stage.gateway_cpu() - gateway) / FILES * MICROS),
        "client_cpu_micros_a_file": round((time.process_time() - client) / FILES * MICROS),
        "p50_ms": round(waits[len(waits) // 2] * 1_000, 1),
        "p99_ms": round(waits[len(waits) * 99 // 100] * 1_000, 1),
    }


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[SinglePuts]:
    async with gateway_stage(settings, projectors=False) as stage:
        yield SinglePuts(stage)


@asynccontextmanager
async def _opened_alone(settings: Settings) -> AsyncIterator[OnePut]:
    async with gateway_stage(settings, projectors=False) as stage:
        yield OnePut(stage)


@asynccontextmanager
async def _opened_with_tokens(settings: Settings) -> AsyncIterator[TokenPuts]:
    with TemporaryDirectory(prefix="artifact-store-bench-") as folder:
        policy, token_file = Path(folder) / "policy.toml", Path(folder) / "token"
        async with provider() as issuer, gateway_stage(settings, projectors=False) as open_stage:
            issuer.lifetime = _TOKEN_SECONDS
            policy.write_text(_POLICY.format(url=issuer.url, audience=AUDIENCE), encoding="utf-8")
            token_file.write_text(issuer.token(), encoding="utf-8")
            guarded = replace(settings, policy=policy)
            async with gateway_stage(guarded, projectors=False) as stage:
                yield TokenPuts(SinglePuts(stage, token_file), SinglePuts(open_stage))


PLAN = Plan("ingest-single", "files/s", 2.0, _opened, targets={"seaweedfs": 1.0})
WITH_TOKENS = Plan("ingest-single-tokens", "files/s", 0.9, _opened_with_tokens)
ALONE = Plan("ingest-one", "ms p50", 1.3, _opened_alone, lower_is_better=True)
