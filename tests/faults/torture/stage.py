"""The stage of a torture: brokers behind our network, MinIO, PostgreSQL, gateways and all projectors.

The first gateway reaches the brokers through the network's proxies, the others directly; brokers reach each other
through separate proxies. The last gateway may have a small disk for its state. A gateway or projector that ends without
being told to is recorded, and restarted as any supervisor would.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from services.config import SecretStr, Settings
from services.runtime.addresses import ListenAddress
from services.views.projections import PROJECTIONS
from tests.faults.peers import SplitCluster
from tests.faults.proxy import Network, ProxiedCluster
from tests.faults.small_disk import SmallDisk
from tests.faults.store_proxy import StoreProxy
from tests.faults.torture.leaders import in_sync
from tests.integration.processes import ProductProcess, get, output_of, readiness
from tests.services.kafka import KafkaBroker
from tests.services.minio import MinioServer
from tests.services.postgres import PostgresServer
from tests.services.process import ServiceError, free_ports
from tests.services.s3 import REGION
from tests.services.shared import ROOT

PARTITIONS = 6
BROKERS = 3
GATEWAYS = 3

SMALL_DISK_MIB = 96
"""Three times what a gateway leaves free on the disk of its state."""

_FILL_BYTES = 65536
_START_SECONDS = 90.0
_WATCH_SECONDS = 0.5
_WHOLE_SECONDS = 90.0

_T = TypeVar("_T")


class TorturedCluster(ProxiedCluster, SplitCluster):
    """A network between clients and brokers, and another one among the brokers."""


class Part(ProductProcess):
    """A gateway or projector of the stage; a gateway counts as started when it answers, ready or not."""

    wanted = True
    """Whether it is to run; what is not running although it is wanted has ended by itself."""

    disk: SmallDisk | None = None
    """A small disk for its state, from its next start on."""

    said_release: str | None = None
    """The release that it says it is from its next start on; None: its own."""

    def prepare(self) -> None:
        """Its clock is right unless it was set."""
        if not self._clock.exists():
            self._clock.write_text("0", encoding="ascii")

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "tests.faults.torture.wrong_clock", str(self._clock), *self._arguments]
        return command if self.disk is None else self.disk.command(command)

    def environment(self) -> dict[str, str]:
        said = {} if self.said_release is None else {"SAID_RELEASE": self.said_release}
        return {**super().environment(), "PYTHONPATH": str(ROOT), **said}

    def change(self, **settings: Any) -> None:
        """Give it these settings from its next start on."""
        self._settings = replace(self._settings, **settings)

    def answers(self) -> bool:
        return not self._listens or get(f"{self.endpoint}/healthz") == 200

    def set_clock(self, ahead_seconds: int) -> None:
        """Let its clock be so much ahead of the right time from now on, also when it is started again."""
        self._clock.write_text(str(ahead_seconds), encoding="ascii")
        if self.running:
            os.kill(self.pid, signal.SIGUSR1)

    def says(self) -> str:
        """Why the gateway cannot write, as `/readyz` says; empty when it can, or gives no answer. Blocks."""
        with suppress(OSError, HTTPException):
            return readiness(self)
        return ""

    @property
    def _clock(self) -> Path:
        return self.folder / "clock"


@dataclass
class Stage:
    """Everything that runs. `settings` reach the parts directly."""

    folder: Path
    settings: Settings
    cluster: TorturedCluster
    network: Network
    minio: MinioServer
    postgres: PostgresServer
    gateways: list[Part]
    projectors: list[Part]
    small_disk: Path | None
    """The small separate disk with the last gateway's state, if it has one."""
    store: StoreProxy | None = None
    """Between the parts and MinIO, if it is."""
    database: StoreProxy | None = None
    """Between the parts and PostgreSQL, if it is."""
    ended: list[str] = field(default_factory=list)
    """Processes that ended by themselves, with the end of what they wrote."""
    strays: list[bytes] = field(default_factory=list)
    """Values of committed records that are no events; each was written once, without a key."""

    @property
    def urls(self) -> list[str]:
        """Where the gateways are."""
        return [gateway.endpoint for gateway in self.gateways]

    @property
    def topic(self) -> str:
        """The log of record."""
        return f"{self.settings.log_url.rpartition('/')[2]}.events"

    async def up_again(self, part: Part) -> None:
        """Start a part that was ended; again when it ends at once, as it may while others are down."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                await in_thread(part.start)
                part.wanted = True
                return
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def watch(self) -> None:
        """Note and restart what ends by itself, for ever."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for part in [*self.gateways, *self.projectors]:
                if part.wanted and not part.running:
                    part.wanted = False
                    how = f"{part.folder.name} ended by itself, exit code {part.exit_code}"
                    self.ended.append(f"{how}: {part.end_of_log()[-2000:]}")
                    await self.up_again(part)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Within the block nothing more can be written to the small disk."""
        assert self.small_disk is not None
        other = self.small_disk / "other"
        try:
            with other.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(_FILL_BYTES))
            yield
        finally:
            other.unlink(missing_ok=True)

    async def whole(self) -> None:
        """Wait until every partition of every topic has all its replicas in sync. Raises TimeoutError."""
        deadline = time.monotonic() + _WHOLE_SECONDS
        while not await in_thread(lambda: in_sync(self.cluster)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the brokers did not come together again in {_WHOLE_SECONDS:.0f} s")
            await asyncio.sleep(0.3)


_threads = ThreadPoolExecutor(16, thread_name_prefix="torture")


async def in_thread(call: Callable[[], _T]) -> _T:
    """Run what blocks beside the event loop, which carries the proxies.

    It is waited for even when the wait is cancelled: what is just being started must be known before it can be ended.
    """
    running = asyncio.get_running_loop().run_in_executor(_threads, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


@asynccontextmanager
async def staged(
    folder: Path,
    *,
    keep: Callable[[], bool],
    own_mounts: bool = False,
    proxied: bool = False,
    minio: MinioServer | None = None,
    postgres: PostgresServer | None = None,
    brokers: int = BROKERS,
    gateways: int = GATEWAYS,
) -> AsyncIterator[Stage]:
    """All of it, started; stopped at the end of the block, its data deleted unless `keep` says otherwise.

    `own_mounts`: what this process mounts ends with it, so that one gateway can have a small disk. `proxied`: the parts
    reach MinIO and PostgreSQL through proxies.
    """
    cluster = TorturedCluster(folder / "kafka", brokers)
    minio = minio or MinioServer(folder / "minio")
    postgres = postgres or PostgresServer(folder / "postgres")
    servers = [minio, postgres]
    parts: list[Part] = []
    try:
        await asyncio.gather(in_thread(cluster.start), *(in_thread(server.start) for server in servers))
        settings = _settings(folder, cluster, minio, postgres)
        await in_thread(lambda: output_of(settings, "migrate"))
        async with AsyncExitStack() as stack:
            network = await stack.enter_async_context(cluster.network())
            store = database = None
            through = settings
            if proxied:
                store, database = StoreProxy(minio.endpoint), StoreProxy(postgres.endpoint)
                store_at = await stack.enter_async_context(store.listening())
                database_at = await stack.enter_async_context(database.listening())
                through = replace(
                    settings,
                    blobs_url=settings.blobs_url.replace(minio.endpoint, store_at),
                    views_url=settings.views_url.replace(postgres.endpoint, database_at),
                )
            writing, projectors = _parts(folder, through, cluster, gateways)
            parts += [*writing, *projectors]
            small_disk = _small_disk(writing[-1].folder / "state") if own_mounts else None
            stage = Stage(
                *(folder, settings, cluster, network, minio, postgres, writing, projectors, small_disk),
                store=store,
                database=database,
            )
            await asyncio.gather(*(in_thread(part.start) for part in parts))
            yield stage
            for part in parts:
                part.wanted = False
            await asyncio.gather(*(in_thread(part.stop) for part in parts))
    finally:
        for part in parts:
            part.wanted = False
            await in_thread(part.kill)
        everything: list[KafkaBroker | MinioServer | PostgresServer] = [*cluster.brokers, minio, postgres]
        for server in everything:
            await in_thread(server.kill)
            if not keep():
                await in_thread(server.delete)
        await in_thread(cluster.end_network)


def _small_disk(folder: Path) -> Path:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m,mode=700", "none", folder], check=True)
    return folder


def _settings(folder: Path, cluster: TorturedCluster, minio: MinioServer, postgres: PostgresServer) -> Settings:
    replicas = min(BROKERS, len(cluster.brokers))
    return Settings(
        log_url=f"kafka://{cluster.endpoint}/torture",
        kafka_partitions=PARTITIONS,
        kafka_replication_factor=replicas,
        kafka_min_insync_replicas=max(1, replicas - 1),
        blobs_url=f"s3+http://{minio.endpoint}/torture",
        s3_access_key=minio.access_key,
        s3_secret_key=minio.secret_key,
        s3_region=REGION,
        webhook_allow=("127.0.0.0/8",),
        views_url=postgres.url(),
        state_dir=folder / "state",
        internal_secret=SecretStr(token_hex(16)),  # commands keep a home of their own and with it a secret of their own
    )


def _parts(folder: Path, settings: Settings, cluster: TorturedCluster, number: int) -> tuple[list[Part], list[Part]]:
    ports = free_ports(number + len(PROJECTIONS))
    gateways = []
    for n in range(number):
        home = folder / f"gateway-{n}"
        own: dict[str, Any] = {"state_dir": home / "state"}
        if n == 0:
            own["log_url"] = f"kafka://{cluster.proxied_endpoint}/torture"
        gateways.append(Part(replace(settings, **own), home, "gateway", port=ports[n]))
    projectors = [
        Part(
            replace(settings, metrics_listen=ListenAddress("127.0.0.1", port)),
            *(folder / name, "projector", name),
            listens=False,
            port=port,
        )
        for name, port in zip(PROJECTIONS, ports[number:], strict=True)
    ]
    return gateways, projectors
