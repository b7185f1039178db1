"""A views database with a full disk, and one that is far away: the view stands still or comes late, and is the same."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from artifact_store.errors import UnavailableError
from projector.rebuild import replay_view
from services.views.database import Views
from services.views.digest import digest_view
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from tests.faults.store_proxy import StoreProxy
from tests.integration.projector_stage import covers, eventually, projecting, same_as_a_fresh_fold
from tests.memory_log import MemoryLog
from tests.services.postgres import PostgresServer
from tests.views_history import History

pytestmark = [pytest.mark.services, pytest.mark.processes]

REGISTRY = PROJECTIONS["registry"]
LATENCY = 0.05


class SmallPostgres(PostgresServer):
    """PostgreSQL with a disk of 32 MiB beside its own, for the tables of a database; started by root."""

    _prepared = False

    def prepare(self) -> None:
        super().prepare()
        (self.home / "small").mkdir(exist_ok=True)
        self._prepared = True

    def user(self) -> str | None:
        return None if self._prepared else super().user()  # who mounts the disk becomes that user behind it

    def command(self) -> list[str]:
        owner = pwd.getpwnam(super().user() or pwd.getpwuid(os.geteuid()).pw_name)
        options = f"size=32m,mode=700,uid={owner.pw_uid},gid={owner.pw_gid}"
        become = f"setpriv --reuid {owner.pw_uid} --regid {owner.pw_gid} --clear-groups"
        mount = f"mount -t tmpfs -o {options} none {self.home / 'small'}"
        return ["unshare", "--mount", "sh", "-c", f'{mount} && exec {become} "$@"', "sh", *super().command()]

    async def small_database(self) -> str:
        """The URL of a database whose tables lie on the small disk."""
        connection = await asyncpg.connect(self.url().replace("+asyncpg", ""))
        try:
            await connection.execute(f"CREATE TABLESPACE small LOCATION '{self.home / 'small'}'")
            await connection.execute("CREATE DATABASE views TABLESPACE small")
        finally:
            await connection.close()
        return self.url("views")

    @property
    def ballast(self) -> Path:
        """A file on that disk, which no other process sees mounted."""
        return Path(f"/proc/{self.pid}/root{self.home}/small/ballast")

    def fill(self) -> None:
        """Leave no room."""
        with self.ballast.open("wb") as file:
            space = os.statvfs(file.fileno())
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)

    def make_room(self) -> None:
        self.ballast.unlink()


@pytest.fixture
async def full(tmp_path: Path) -> AsyncIterator[tuple[SmallPostgres, Views]]:
    with SmallPostgres(tmp_path / "postgres") as server:
        views = Views(await server.small_database())
        await views.migrate()
        yield server, views
        await views.close()


async def test_a_full_database_is_read_and_folded_into_when_there_is_room(
    full: tuple[SmallPostgres, Views], reference: Views, caplog: pytest.LogCaptureFixture
) -> None:
    server, views = full
    log, history = MemoryLog(), History().fill(packages=40, files=20)
    log.append(*history.events[:100])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
        before = await digest_view(views, REGISTRY)
        server.fill()
        log.append(*history.events[100:])

        async def told() -> bool:
            return "No space left on device" in caplog.text

        await eventually(told, "the projector says that the disk is full")
        await Queries(views).checkpoint("registry")
        with pytest.raises(UnavailableError):
            await replay_view(views, log, REGISTRY)
        assert (await digest_view(views, REGISTRY)).rows >= before.rows
        server.make_room()
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)
    await replay_view(views, log, REGISTRY)
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
    assert server.password not in caplog.text


async def test_a_database_that_is_far_away_is_folded_into_in_batches(postgres_url: str, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=60, files=20)
    log.append(*history.events)
    server, _, name = postgres_url.rpartition("/")
    credentials, _, host = server.rpartition("@")
    proxy = StoreProxy(host)
    async with proxy.listening() as through:
        views = Views(f"{credentials}@{through}/{name}")
        await views.migrate()
        with proxy.slow(LATENCY):
            began = time.monotonic()
            async with projecting(views, log, REGISTRY):
                await same_as_a_fresh_fold(views, reference, log, REGISTRY)
            # There and back takes twice as long; an event by itself would need that, and there are many.
            assert time.monotonic() - began < len(history.events) * 2 * LATENCY
        await views.close()
