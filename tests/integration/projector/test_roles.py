"""Least privilege in PostgreSQL: each process works over TLS with its role of docs/security, and cannot do more."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import text

from artifact_store.errors import ArtifactStoreError
from artifact_store.models import EventFilter
from artifact_store.position import Position
from projector.rebuild import replay_view
from services.cli.status import deliveries
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.webhooks.subscriptions import Subscriptions, create_tables
from tests.certificates import Authority
from tests.memory_log import MemoryLog
from tests.services.postgres import USER, PostgresServer
from tests.views_history import History

pytestmark = pytest.mark.services

SQL = Path(__file__).parents[3] / "docs" / "security" / "postgresql.sql"
LOGINS = ("migrate", "replay", "projector", "gateway", "verify", "webhooks")
REGISTRY = PROJECTIONS["registry"]


class TlsServer(PostgresServer):
    """PostgreSQL that lets the product's roles in by TLS alone; its administrator comes without."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder)
        self._issued = authority.issue("postgres", "127.0.0.1")

    def prepare(self) -> None:
        super().prepare()
        rules = f"host all {USER} 127.0.0.1/32 scram-sha-256\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
        (self.home / "hba").write_text(rules)
        for source, name in zip(self._issued, ("server.crt", "server.key"), strict=True):
            shutil.copy(source, self.home / name)
        for path in (self.home / "hba", self.home / "server.crt", self.home / "server.key"):
            path.chmod(0o600)
            if user := self.user():
                shutil.chown(path, user, user)

    def command(self) -> list[str]:
        files = {"hba_file": "hba", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key"}
        options = [part for name, file in files.items() for part in ("-c", f"{name}={self.home / file}")]
        return [*super().command(), "-c", "ssl=on", *options]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    folder = tmp_path_factory.mktemp("roles")
    authority = Authority(folder / "certificates")
    with pytest.MonkeyPatch.context() as environment, TlsServer(folder / "postgres", authority) as found:
        environment.setenv("PGSSLROOTCERT", str(authority.certificate))
        asyncio.run(give_rights(found))
        yield found


async def give_rights(server: TlsServer) -> None:
    admin = await asyncpg.connect(server.url().replace("+asyncpg", ""), ssl=False)
    try:
        for _ in range(2):  # it may be repeated
            await admin.execute(SQL.read_text(encoding="utf-8"))
        for login in LOGINS:
            await admin.execute(f"ALTER ROLE artifact_store_{login} PASSWORD 'secret'")
    finally:
        await admin.close()


@asynccontextmanager
async def as_role(server: TlsServer, role: str, ssl: str = "verify-full") -> AsyncIterator[Views]:
    views = Views(f"postgresql+asyncpg://artifact_store_{role}:secret@{server.endpoint}/{USER}?ssl={ssl}")
    try:
        yield views
    finally:
        await views.close()


async def packages(views: Views) -> int:
    async with views.reading() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM artifact_packages"))).scalar_one())


async def test_each_process_works_as_its_role_and_does_nothing_beyond(server: TlsServer) -> None:
    log, history = MemoryLog(), History()
    log.append(*history.fill(packages=2, files=2).events)
    before = len(history.events)
    async with as_role(server, "migrate") as views:
        await views.migrate()
    async with as_role(server, "projector") as views:
        await catch_up(views, log, REGISTRY)
        with pytest.raises(ArtifactStoreError):
            await replay_view(views, log, REGISTRY)
    async with as_role(server, "replay") as views:
        await replay_view(views, log, REGISTRY)
    log.append(*history.fill(packages=1, files=1).events[before:])
    async with as_role(server, "projector") as views:
        await catch_up(views, log, REGISTRY)
    for role in ("gateway", "verify"):
        async with as_role(server, role) as views:
            assert await packages(views) == 3
            with pytest.raises(ArtifactStoreError):
                await catch_up(views, log, PROJECTIONS["retention"])
            with pytest.raises(ArtifactStoreError):
                await replay_view(views, log, REGISTRY)


async def test_gateways_and_webhooks_alone_know_subscriptions(server: TlsServer) -> None:
    async with as_role(server, "migrate") as views:
        await views.migrate()
        await create_tables(views)
    await give_rights(server)
    position = Position(UUID(int=1), {})
    async with as_role(server, "gateway") as views:
        made = await Subscriptions(views).create("ci:bot", {}, "https://receiver.example/", EventFilter(), position)
    async with as_role(server, "webhooks") as views:
        kept, me = Subscriptions(views), uuid4()
        assert await kept.claim(me, await kept.beat())
        assert await kept.save(me, [])
        assert [one.subscription_id for one in (await kept.load())[0]] == [made.subscription_id]
        await kept.release(me)
        assert await packages(views) >= 0
        with pytest.raises(ArtifactStoreError):
            await catch_up(views, MemoryLog(), REGISTRY)
    for role in ("projector", "verify"):
        async with as_role(server, role) as views:
            with pytest.raises(ArtifactStoreError):
                await Subscriptions(views).load()
    async with as_role(server, "verify") as views:  # `doctor` and `status` count them
        assert "no process delivers to 1 active subscriptions" in (await deliveries(views))["trouble"]
    async with as_role(server, "projector") as views:
        assert (await deliveries(views))["active"] is None


async def test_no_role_gets_in_without_tls(server: TlsServer) -> None:
    for role in LOGINS:
        async with as_role(server, role, ssl="disable") as views:
            with pytest.raises(ArtifactStoreError):
                await packages(views)
