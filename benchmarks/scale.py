"""What a file costs with one gateway process and with more, on three brokers: the check of docs/scale.md.

`python -m benchmarks.scale` starts three brokers, a store and PostgreSQL of its own, and for each number of gateway
processes puts files of 4 KiB one by one, as `ingest-single` does. It prints the processor time that a file takes of the
client, the gateways, the brokers and the store, how many files share a transaction, and the rate beside the one that
the model foresees: all cores, divided by what a file takes of them with one gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import psutil
from yarl import URL

from artifact_store.client.client import Client
from benchmarks.single_puts import CONCURRENCY, FILE_BYTES, FILES, MICROS, PACKAGES, put_all
from services.config import Settings
from tests.buckets import Bucket
from tests.integration.processes import ProductProcess, metrics_of, output_of, partitions_of
from tests.services.kafka import KafkaCluster
from tests.services.minio import MinioServer
from tests.services.postgres import PostgresServer
from tests.services.process import wait_until
from tests.services.s3 import S3Server
from tests.services.seaweed import SeaweedServer
from tests.services.shared import STORES, Store

_PARTITIONS = 12
_OWNED_SECONDS = 60.0
_ROUNDS = 3
_PARTS = ("client", "gateways", "brokers", "store")


@dataclass(frozen=True, slots=True)
class Cost:
    """Files a second, files a transaction, and processor seconds a file by who spent them."""

    rate: float
    shared: float
    spent: dict[str, float]

    @property
    def together(self) -> float:
        """Processor seconds of everybody for one file."""
        return sum(self.spent.values())


@dataclass(frozen=True, slots=True)
class Services:
    """What the gateways stand on."""

    cluster: KafkaCluster
    store: S3Server
    bucket: Bucket
    views: PostgresServer

    def settings(self, folder: Path, name: str) -> Settings:
        """Those of an installation with a topic of this name."""
        return Settings(
            log_url=f"kafka://{self.cluster.endpoint}/{name}",
            kafka_partitions=_PARTITIONS,
            kafka_replication_factor=3,
            kafka_min_insync_replicas=2,
            views_url=self.views.url(),
            state_dir=folder / "state",
            **self.bucket.settings,
        )


async def cost(services: Services, folder: Path, gateways: int) -> Cost:
    """What files cost with this many gateway processes: the median of several runs, after one that does not count."""
    settings = services.settings(folder, f"scale-{gateways}")
    await asyncio.to_thread(output_of, settings, "migrate")
    with ProductProcess(settings, folder, "gateway", "--processes", str(gateways)) as gateway:
        owned = f"{gateways} gateways do not own {_PARTITIONS} partitions"
        await asyncio.to_thread(wait_until, lambda: partitions_of(gateway) == _PARTITIONS, _OWNED_SECONDS, owned)
        runs = [await _run(services, gateway, number) for number in range(_ROUNDS + 1)][1:]
    middle = median(run.rate for run in runs)
    return next(run for run in runs if run.rate == middle)


async def _run(services: Services, gateway: ProductProcess, number: int) -> Cost:
    async with Client(gateway.endpoint) as registry:
        packages = [
            await registry.create_package(f"scale-{each}", "benchmark", "scale", "scratch") for each in range(PACKAGES)
        ]
    draw = Random(number)
    base = f"{gateway.endpoint}/v1/packages"
    puts = [
        (URL(f"{base}/{packages[each % PACKAGES]}/files/frame-{each:05}.bin"), draw.randbytes(FILE_BYTES), 201)
        for each in range(FILES)
    ]
    brokers = [broker.pid for broker in services.cluster.brokers]
    pids = ([os.getpid()], [gateway.pid], brokers, [services.store.pid])
    parts = dict(zip(_PARTS, pids, strict=True))
    before = {name: _processor_seconds(pids, whole=name == "gateways") for name, pids in parts.items()}
    transactions = await asyncio.to_thread(_transactions, gateway)
    seconds, _ = await put_all(puts, CONCURRENCY)
    transactions = await asyncio.to_thread(_transactions, gateway) - transactions
    return Cost(
        FILES / seconds,
        FILES / transactions,
        {
            name: (_processor_seconds(pids, whole=name == "gateways") - before[name]) / FILES
            for name, pids in parts.items()
        },
    )


def _transactions(gateway: ProductProcess) -> float:
    """How many transactions all processes behind the address have committed. Blocks."""
    found = metrics_of(gateway).items()
    return sum(value for name, value in found if name.startswith("artifact_store_transactions_total"))


def _processor_seconds(pids: Iterable[int | None], *, whole: bool) -> float:
    """Of these processes so far; of the `whole` families if that is set."""
    found = [psutil.Process(pid) for pid in pids]
    if whole:
        found += [child for parent in found for child in parent.children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in found))


@contextmanager
def _services(folder: Path, store: Store) -> Iterator[Services]:
    server = (MinioServer if store == "minio" else SeaweedServer)(folder / "store")
    with (
        KafkaCluster(folder / "kafka") as cluster,
        server,
        PostgresServer(folder / "postgres", durable=True) as views,
        Bucket(server.endpoint, server.access_key, server.secret_key, server.region) as bucket,
    ):
        yield Services(cluster, server, bucket, views)


def main(arguments: list[str]) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("gateways", nargs="*", type=int, default=[1, 2, 4], help="how many processes (1 2 4)")
    parser.add_argument("--store", choices=STORES, default=STORES[0])
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    print(f"{began}, {cores} cores, load {os.getloadavg()[0]:.1f}, {options.store}, {_PARTITIONS} partitions\n")
    heads = ("gateway processes", "files/s", "foreseen", "files a transaction", *_PARTS, "together, µs a file")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    foreseen: float | None = None
    with tempfile.TemporaryDirectory(prefix="artifact-store-scale-") as root:
        folder = Path(root)
        with _services(folder, options.store) as services:
            for gateways in options.gateways:
                found = asyncio.run(cost(services, folder / f"gateways-{gateways}", gateways))
                foreseen = foreseen or cores / found.together
                spent = " | ".join(f"{seconds * MICROS:,.0f}" for seconds in found.spent.values())
                rates = f"{found.rate:,.0f} | {foreseen:,.0f} | {found.shared:.1f}"
                print(f"| {gateways} | {rates} | {spent} | {found.together * MICROS:,.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
