"""A package of very many files: finalizing takes linear time and hardly delays a neighbour on its partition.

Its manifest is read and verified through a gateway as `pull` does it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from artifact_store import Client
from artifact_store.byte_streams import from_any
from artifact_store.errors import DuplicateRelativePathError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement, Declared
from artifact_store.transfers.pull import pull, read_manifest
from schemas.runs import StoredFile
from services.blobs.port import StoredBlob
from services.config import Settings
from services.core.decide import INLINE_MANIFEST_BYTES, Command, FinalizePackage, IngestCheck, IngestFiles
from services.core.state import FINALIZED
from services.log.port import CommandWriter
from services.log.state import partition_state as state
from services.log.state.state_file import unsealed
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import ready, settled
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.kafka_stage import create_in, kafka_settings, open_kafka_log
from tests.standstill import Standstill

pytestmark = pytest.mark.services

CONTENT = b"the same in every file"
A_COMMAND = 64
AT_A_TIME = 8
SLOW_CLIENTS = 16
"""More than there is memory for."""

LONGEST_SECONDS = 1.0
LINEAR = 2.0
"""How much more processor time a file may take in a package of four times the files."""


@pytest.fixture
def kafka(kafka_url: str, s3_bucket: dict[str, Any], tmp_path: Path) -> Settings:
    views = f"sqlite+aiosqlite:///{tmp_path / 'views.db'}"
    return kafka_settings(kafka_url, tmp_path, kafka_partitions=1, views_url=views, **s3_bucket)


@asynccontextmanager
async def gateway_on(kafka: Settings) -> AsyncIterator[RunningGateway]:
    async with open_kafka_log(kafka), running_gateway(kafka, wait_seconds=300.0) as gateway:
        await gateway.parts.views.migrate()
        await ready(gateway.parts.writer)
        yield gateway


async def build(gateway: RunningGateway, files: int) -> UUID:
    """An open package of so many files, whose bytes are one blob."""
    writer = gateway.parts.writer
    blob = await gateway.parts.blobs.store(from_any(CONTENT), declared=Declared(), max_bytes=len(CONTENT))
    one = StoredFile("", "text/plain", blob.length, blob.blake3, blob.sha256, "s3", blob.key, 0, blob.length, 7)
    made = create_in(0)
    await settled(writer, made)
    commands = iter(
        [
            IngestFiles(
                made.package_id,
                uuid4(),
                "ada",
                tuple(replace(one, relative_path=f"{n:06}.txt") for n in range(start, min(start + A_COMMAND, files))),
            )
            for start in range(0, files, A_COMMAND)
        ]
    )

    async def ingest() -> None:
        for command in commands:
            await settled(writer, command)

    await asyncio.gather(*(ingest() for _ in range(AT_A_TIME)))
    return made.package_id


class Neighbour:
    """Another producer on the partition: one command after the other, and how long each took."""

    def __init__(self, writer: CommandWriter) -> None:
        self.done: list[tuple[Command, Acknowledgement]] = []
        self.waits: list[float] = []
        self._writer = writer
        self._began = time.monotonic()
        self._waiting = True
        self._task = asyncio.ensure_future(self._work())

    def longest(self) -> float:
        """The longest wait since the last call, in seconds; one that goes on is counted as far as it has come."""
        waits, self.waits = self.waits, []
        return max([*waits, time.monotonic() - self._began] if self._waiting else waits, default=0.0)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            made = create_in(0)
            added = IngestFiles(made.package_id, uuid4(), "ada", (stored("a"),))
            for command in (made, added, FinalizePackage(made.package_id, uuid4(), "ada")):
                self._began, self._waiting = time.monotonic(), True
                self.done.append((command, await self._writer.submit(command)))
                self._waiting = False
                self.waits.append(time.monotonic() - self._began)
                await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Measured:
    """Seconds: of a first question, for which the package is read back, of its finalization, by the clock and of this
    process, the neighbour's longest waits, when nothing happened and meanwhile, and how long the machine stood still.
    """

    files: int
    manifest_bytes: int
    reading: float
    finalizing: float
    processor: float
    idle_wait: float
    longest_wait: float
    stood_still: float


async def saved_as_finalized(kafka: Settings, package_id: UUID) -> bool:
    """Whether the state file of the partition has the package's end."""
    (path,) = kafka.state_dir.glob("*-0.db")
    with closing(sqlite3.connect(path)) as file:
        row = file.execute("SELECT body FROM packages WHERE package_id = ?", (package_id.bytes,)).fetchone()
    return row is not None and unsealed(row[0])[0] == FINALIZED


async def finalized(kafka: Settings, files: int, destination: Path | None = None) -> Measured:
    """Build a package, start anew, and finalize it beside a neighbour; also its retries are answered as it was."""
    async with gateway_on(kafka) as gateway:
        package_id = await build(gateway, files)
    async with gateway_on(kafka) as gateway:
        writer = gateway.parts.writer
        neighbour = Neighbour(writer)
        await asyncio.sleep(1.0)
        idle_wait = neighbour.longest()
        with Standstill() as machine:
            moment = began = time.monotonic()
            with pytest.raises(DuplicateRelativePathError):
                await writer.check_ingest(IngestCheck(package_id, ["000000.txt"], None))
            reading = time.monotonic() - began
            end = FinalizePackage(package_id, uuid4(), "ada")
            began, processor = time.monotonic(), time.process_time()
            done, again = await asyncio.gather(writer.submit(end), writer.submit(end))
            finalizing, processor = time.monotonic() - began, time.process_time() - processor
            await until(lambda: saved_as_finalized(kafka, package_id), 60.0, "no checkpoint has the finalization")
            longest_wait = neighbour.longest()
        stood_still = machine.longest(moment)
        await neighbour.end()
        assert again == done == await writer.submit(end)
        address = ContentAddress.of_digest(done.manifest_digest or b"")
        async with Client(gateway.url) as client:
            manifest = await client.get_manifest_bytes(package_id, wait_sequence=done.sequence)
            verified = await read_manifest(client, package_id, address)
            if destination is not None:
                assert (await pull(client, package_id, destination)).manifest_digest == address
        assert len(manifest) > INLINE_MANIFEST_BYTES
        assert [file.relative_path for file in verified.files] == [f"{n:06}.txt" for n in range(files)]
        assert_recorded_once(await read_valid(gateway.parts.log), [*neighbour.done, (end, done)])
    return Measured(files, len(manifest), reading, finalizing, processor, idle_wait, longest_wait, stood_still)


def assert_neighbour_hardly_waited(found: Measured) -> None:
    """On a busy machine it also waits when nothing is finalized, and in vain while the machine stands still."""
    assert found.longest_wait - found.stood_still < LONGEST_SECONDS + found.idle_wait, found


async def test_a_package_of_many_files_is_finalized_beside_a_neighbour_and_pulled(
    kafka: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.5)
    monkeypatch.setattr(state, "LARGE", 500)
    found = await finalized(kafka, 1_500, tmp_path / "pulled")
    assert len(list((tmp_path / "pulled").iterdir())) == found.files
    assert {path.read_bytes() for path in (tmp_path / "pulled").iterdir()} == {CONTENT}
    assert_neighbour_hardly_waited(found)


async def test_a_manifest_does_not_wait_for_clients_that_send_slowly(kafka: Settings) -> None:
    async with gateway_on(kafka) as gateway:
        package_id = await build(gateway, 1_500)
        go_on = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"x"
            await go_on.wait()

        def store(body: AsyncIterator[bytes]) -> asyncio.Future[StoredBlob]:
            return asyncio.ensure_future(gateway.parts.blobs.store(body, declared=Declared(), max_bytes=1 << 20))

        uploads = [store(slowly()) for _ in range(SLOW_CLIENTS)]
        one_more = store(from_any(b"y"))
        finalizing = asyncio.ensure_future(gateway.parts.writer.submit(FinalizePackage(package_id, uuid4(), "ada")))
        both: list[asyncio.Future[Any]] = [one_more, finalizing]
        first, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert first == {finalizing}
        go_on.set()
        assert (await finalizing).sequence == 1_502
        await asyncio.gather(*uploads, one_more)


@pytest.mark.endurance
async def test_a_hundred_thousand_files_are_finalized_in_linear_time_and_their_manifest_verified(
    kafka: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    quarter = await finalized(kafka, 25_000)
    whole = await finalized(kafka, 100_000)
    with capsys.disabled():
        print(f"\n{quarter}\n{whole}")  # noqa: T201 - figures are half of its purpose
    for found in (quarter, whole):
        assert_neighbour_hardly_waited(found)
    assert whole.processor / whole.files < LINEAR * quarter.processor / quarter.files
