"""Processes of two adjacent releases share a cluster while one is replaced by the other, and rolled back.

Producers, a follower and an unfinished upload continue throughout: nothing is lost, and nobody waits longer than for a
take-over.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import aiohttp
import pytest
from blake3 import blake3

from artifact_store.documents.resumable_uploads import encode_metadata
from services.config import SecretStr, Settings
from services.log.kafka.connection import SESSION_TIMEOUT_MS
from tests.faults.http_load import Load
from tests.faults.previous_release import AnyRelease, PreviousRelease
from tests.faults.torture.clients import PlainClient
from tests.faults.torture.oracle import Verdict, caught_up, read_log, verify
from tests.faults.torture.work import CREATE, FINALIZE, INGEST, Entry, Work, creation
from tests.integration.conditions import until
from tests.integration.processes import metrics_of, partitions_of
from tests.services.process import free_ports
from tests.standstill import Standstill

pytestmark = pytest.mark.services

GATEWAYS = 2
TAKEOVER_SECONDS = 2 * SESSION_TIMEOUT_MS / 1000
FILES = 3
_TUS = {"Tus-Resumable": "1.0.0"}
_FROM_LOG = 'takeovers_total{restored_from="log"}'


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> PreviousRelease:
    return PreviousRelease(tmp_path_factory.mktemp("previous-release"))


class WholePackages(Load):
    """Producers that create, fill and finalize packages, and ask again for what was answered long ago."""

    async def _produce(self, n: int) -> None:
        before: Entry | None = None
        while not self._stop.is_set():
            made = creation(uuid4())
            files = [Work(INGEST, made.package_id, uuid4(), f"{i}.txt", i) for i in range(FILES)]
            for work in (made, *files, Work(FINALIZE, made.package_id, uuid4())):
                last = await self._sent(n, work)
                if work.kind == CREATE and before is not None:
                    again = await self._sent(n, before.work)
                    assert again.answer == before.answer
            before = last

    async def _sent(self, n: int, work: Work) -> Entry:
        began = self._waiting[n] = monotonic()
        answer, attempts = await self.client.send(work)
        entry = Entry(work, answer, began, monotonic(), attempts)
        self.entries.append(entry)
        return entry


class Follower:
    """Follows all events over HTTP, from one gateway after the other, each time from the last position."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.seen: list[str] = []
        self._urls = urls
        self._position: str | None = None
        self._task = asyncio.create_task(self._follow())

    async def end(self, expected: set[str]) -> None:
        """Wait until all expected events came, and hold that each came once."""

        async def there() -> bool:
            return self._task.done() or len(self.seen) >= len(expected)

        await until(there, 60, "the follower does not get all events")
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            await self._task
        assert len(self.seen) == len(set(self.seen)) == len(expected)
        assert set(self.seen) == expected

    async def _follow(self) -> None:
        at = 0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None, sock_connect=2)) as session:
            while True:
                query = {"follow": "true", **({"since": self._position} if self._position else {})}
                try:
                    async with session.get(f"{self._urls[at % len(self._urls)]}/v1/events", params=query) as answer:
                        assert answer.status in (200, 429, 503), await answer.text()
                        if answer.status == 200:
                            await self._read(answer)
                except (aiohttp.ClientError, ConnectionError):
                    at += 1

    async def _read(self, answer: aiohttp.ClientResponse) -> None:
        async for line in answer.content:
            if line.endswith(b"\n") and line.strip():
                event = json.loads(line)
                self.seen.append(event["id"])
                self._position = event["position"]


class Upload:
    """One file that is sent in two requests, to two gateways, and asked for at both."""

    def __init__(self, first: str, second: str) -> None:
        self._urls = first, second
        self._body = b"0123456789abcdef" * (1 << 14)
        self._half = len(self._body) // 2
        self._path = ""
        self.package_id = UUID(int=0)

    async def begin(self) -> None:
        """Create the package and the upload at the first gateway, and send it half of the bytes."""
        async with aiohttp.ClientSession(self._urls[0]) as session:
            fields = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
            async with session.post("/v1/packages", json=fields) as answer:
                assert answer.status == 201, await answer.text()
                self.package_id = UUID((await answer.json())["package_id"])
            headers = {
                **_TUS,
                "Upload-Length": str(len(self._body)),
                "Upload-Metadata": encode_metadata({"relative_path": "large.bin"}),
            }
            async with session.post(f"/v1/packages/{self.package_id}/uploads", headers=headers) as answer:
                assert answer.status == 201, await answer.text()
                self._path = urlsplit(answer.headers["Location"]).path
            await self._send(session, 0, self._body[: self._half])

    async def finish(self) -> None:
        """Send the other half to the second gateway; both then tell the same of it, in fields that both know."""
        async with aiohttp.ClientSession(self._urls[1]) as session:
            await self._send(session, self._half, self._body[self._half :])
        first, second = await self._told()
        files = first.pop("file"), second.pop("file")
        assert first == second
        known = files[0].keys() & files[1].keys()
        assert {name: files[0][name] for name in known} == {name: files[1][name] for name in known}
        assert files[0]["content_address"] == f"blake3:{blake3(self._body).hexdigest()}"

    async def _told(self) -> list[dict[str, Any]]:
        found = []
        for url in self._urls:
            async with aiohttp.ClientSession(url) as session, session.get(self._path, headers=_TUS) as answer:
                assert answer.status == 200, await answer.text()
                found.append(await answer.json())
        return found

    async def _send(self, session: aiohttp.ClientSession, offset: int, data: bytes) -> None:
        headers = {**_TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
        async with session.patch(self._path, data=data, headers=headers) as answer:
            assert answer.status in (200, 204), await answer.text()
            assert int(answer.headers["Upload-Offset"]) == offset + len(data)


@asynccontextmanager
async def cluster(
    settings: Settings, folder: Path, released: PreviousRelease | None
) -> AsyncIterator[list[AnyRelease]]:
    """Gateways of one release, each the owner of a partition, and a projector process of the same."""
    async with AsyncExitStack() as stack:
        processes = []
        for n, port in enumerate(free_ports(GATEWAYS + 1)):
            # Gateways of the previous release prove to be gateways only where a secret is set.
            own = replace(settings, state_dir=folder / f"state-{n}", internal_secret=SecretStr("the same for all"))
            command, listens = ("gateway", True) if n < GATEWAYS else ("projector", False)
            process = AnyRelease(own, folder / f"process-{n}", command, port=port, listens=listens)
            process.released = released
            await asyncio.to_thread(stack.enter_context, process)
            processes.append(process)
        await spread(processes[:GATEWAYS], settings)
        yield processes


async def spread(gateways: Sequence[AnyRelease], settings: Settings) -> None:
    """Wait until each gateway owns a partition."""

    async def there() -> bool:
        owned = [await asyncio.to_thread(partitions_of, gateway) for gateway in gateways]
        return sum(owned) == settings.kafka_partitions and min(owned) > 0

    await until(there, 60, "the gateways do not share the partitions")


def migrate(settings: Settings, folder: Path, released: PreviousRelease | None) -> None:
    """Run `migrate` of that release, or of this one. Blocks."""
    command = AnyRelease(settings, folder, "migrate")
    command.released = released
    subprocess.run(command.command(), env={**os.environ, **command.environment()}, check=True, timeout=120)


async def longest_wait(
    settings: Settings,
    process: AnyRelease,
    after: PreviousRelease | None,
    gateways: Sequence[AnyRelease],
    load: Load,
) -> float:
    """Replace one process; the longest that a command waited meanwhile, in seconds, without standstills."""
    with Standstill() as machine:
        moment = monotonic()
        await asyncio.to_thread(process.stop)
        process.released = after
        await asyncio.to_thread(process.start)
        await spread(gateways, settings)
        await load.settle()
    return load.longest(moment) - machine.longest(moment)


async def test_an_upgrade_and_its_rollback_are_done_one_process_at_a_time_under_load(
    real_settings: Settings, tmp_path: Path, previous: PreviousRelease
) -> None:
    """In the order of the operating guide, on the same state, while everybody continues."""
    await asyncio.to_thread(migrate, real_settings, tmp_path / "before", previous)
    async with cluster(real_settings, tmp_path, previous) as processes:
        *gateways, projector = processes
        urls = [gateway.endpoint for gateway in gateways]
        uploads: list[UUID] = []

        async def replaced(order: Sequence[AnyRelease], after: PreviousRelease | None, load: Load) -> None:
            upload = Upload(*urls)
            await upload.begin()
            for process in order:
                longest = await longest_wait(real_settings, process, after, gateways, load)
                assert longest < TAKEOVER_SECONDS, f"a command waited {longest:.1f} s"
                if process is gateways[0]:
                    await upload.finish()
            uploads.append(upload.package_id)

        async with PlainClient(urls) as client:
            load, follower = WholePackages(client), Follower(urls)
            await load.settle()
            await asyncio.to_thread(migrate, real_settings, tmp_path / "after", None)
            await replaced([projector, *gateways], None, load)
            assert not [m for gateway in gateways for m in metrics_of(gateway) if _FROM_LOG in m]
            await replaced([*gateways, projector], previous, load)
            await load.end(real_settings, others=uploads)
            events = await asyncio.to_thread(lambda: list(read_log(real_settings)))
            await follower.end({str(event.event_id) for event in events})

        async def all_seen() -> bool:
            return await asyncio.to_thread(caught_up, real_settings)

        await until(all_seen, 60, "the projections do not catch up")
        verdict = Verdict()
        await asyncio.to_thread(verify, real_settings, verdict)
        assert verdict.clean, verdict.said
