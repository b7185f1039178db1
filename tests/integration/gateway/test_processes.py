"""`gateway --processes` and `serve --processes`: one address, several processes, one supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from artifact_store import Client
from services.config import Settings
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, get, metrics_of, output_of, partitions_of, run_command
from tests.services.process import ServiceError, free_ports

pytestmark = pytest.mark.processes

PROCESSES = 3
SECONDS = 120.0


class Gateway(ProductProcess):
    """Several interpreters start at once, and answer when the first of them does."""

    start_seconds: ClassVar[float] = SECONDS


@pytest.fixture
def kafka(real_settings: Settings, tmp_path: Path) -> Settings:
    """Kafka and MinIO; the views are a file here, as nothing but `serve` reads them."""
    settings = replace(real_settings, views_url=f"sqlite+aiosqlite:///{tmp_path}/views.db")
    output_of(settings, "migrate")
    return settings


@pytest.fixture
def gateway(kafka: Settings, tmp_path: Path) -> Iterator[ProductProcess]:
    process = Gateway(kafka, tmp_path / "gateway", "gateway", "--processes", str(PROCESSES))
    with process:
        yield process


def children(gateway: ProductProcess) -> list[psutil.Process]:
    return psutil.Process(gateway.pid).children()


def up(gateway: ProductProcess) -> set[str]:
    """The numbers of the processes that show their metrics."""
    name = 'artifact_store_process_up{process="'
    found = metrics_of(gateway).items()
    return {key.removeprefix(name).rstrip('"}') for key, value in found if key.startswith(name) and value}


def writing(gateway: ProductProcess) -> set[str]:
    """The numbers of the processes that write to a partition."""
    found = metrics_of(gateway).items()
    owned = [name for name, value in found if name.startswith("artifact_store_partition_owned{") and value]
    return {str(n + 1) for n in range(PROCESSES) for name in owned if f'process="{n + 1}"' in name}


def served(metrics: Mapping[str, float]) -> list[float]:
    """How many requests to write each process has answered."""
    return [
        sum(
            value
            for name, value in metrics.items()
            if name.startswith("artifact_store_http_requests_total{")
            and f'process="{number}"' in name
            and "/v1/packages" in name
        )
        for number in range(1, PROCESSES + 1)
    ]


async def whole(gateway: ProductProcess, partitions: int) -> None:
    """Wait until all partitions are written to, and every process writes to one at least."""

    async def serving() -> bool:
        shown = await asyncio.to_thread(lambda: (up(gateway), writing(gateway), partitions_of(gateway)))
        every = {str(n + 1) for n in range(PROCESSES)}
        return shown == (every, every, partitions)

    await until(serving, SECONDS, "not all processes serve")


async def packages(url: str, count: int) -> None:
    """Create, fill and finalize this many packages, each over its own connection; no error is seen."""

    async def one(n: int) -> None:
        async with Client(url) as registry:
            package = await registry.create_package(f"p {n}", "lab", "s", "scratch", actor="ada")
            await registry.ingest_file(package, "a.txt", "text/plain", f"file {n}".encode(), actor="ada")
            await registry.finalize_package(package, actor="ada")

    await asyncio.gather(*(one(n) for n in range(count)))


@pytest.mark.services
async def test_processes_share_address_partitions_and_load_and_outlive_a_dead_one(
    kafka: Settings, gateway: ProductProcess
) -> None:
    await whole(gateway, kafka.kafka_partitions)
    before = sum(served(await asyncio.to_thread(metrics_of, gateway)))

    async def all_take_part() -> bool:
        await packages(gateway.endpoint, 10)
        return all(served(await asyncio.to_thread(metrics_of, gateway)))

    await until(all_take_part, SECONDS, "a process was left without connections")
    assert sum(served(await asyncio.to_thread(metrics_of, gateway))) >= before + 30

    old = {child.pid for child in children(gateway)}
    os.kill(min(old), signal.SIGKILL)
    await packages(gateway.endpoint, 10)  # the client library comes again where a connection was lost
    await whole(gateway, kafka.kafka_partitions)
    assert len({child.pid for child in children(gateway)} - old) == 1
    assert "died (exit code -9), starting it again" in gateway.log.read_text()

    watched, now = gateway.pid, children(gateway)
    gateway.stop()
    assert not any(child.is_running() for child in now)
    said = gateway.log.read_text()
    assert "Traceback" not in said
    assert said.count("were given up in") >= PROCESSES
    assert not psutil.pid_exists(watched)


@pytest.mark.services
async def test_processes_end_when_the_first_one_is_killed_and_the_port_is_free_again(
    kafka: Settings, gateway: ProductProcess
) -> None:
    await whole(gateway, kafka.kafka_partitions)
    left = children(gateway)
    os.kill(gateway.pid, signal.SIGKILL)
    await asyncio.to_thread(psutil.wait_procs, left, SECONDS)
    assert not any(child.is_running() for child in left)
    assert get(f"{gateway.endpoint}/healthz") is None
    gateway.restart()
    await whole(gateway, kafka.kafka_partitions)


@pytest.mark.services
async def test_told_to_end_together_with_the_first_one_processes_hand_over_all_the_same(
    kafka: Settings, gateway: ProductProcess
) -> None:
    await whole(gateway, kafka.kafka_partitions)
    first, others = psutil.Process(gateway.pid), children(gateway)
    before = len(gateway.log.read_text())
    for process in (*others, first):  # as a service manager does
        process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.wait, SECONDS) == 0
    said = gateway.log.read_text()[before:]
    assert "Traceback" not in said
    handed_over = [line for line in said.splitlines() if "were given up in" in line]
    assert all(any(f" {process.pid} INFO " in line for line in handed_over) for process in others)


@pytest.mark.services
async def test_serve_projects_in_its_processes_too(kafka: Settings, tmp_path: Path) -> None:
    with Gateway(kafka, tmp_path / "serve", "serve", "--processes", "2") as process:
        async with Client(process.endpoint) as registry:
            package = await registry.create_package("p", "lab", "s", "scratch", actor="ada")
            await registry.finalize_package(package, actor="ada")
            assert (await registry.get_package(package, wait_sequence=2)).status == "finalized"


@pytest.mark.services
def test_an_address_that_is_taken_is_said_once_and_nothing_is_tried_again(kafka: Settings, tmp_path: Path) -> None:
    with Gateway(kafka, tmp_path / "gateway", "gateway") as taken:
        listen = f"127.0.0.1:{taken.port}"
        done = run_command(kafka, "gateway", "--processes", "2", "--listen", listen, seconds=SECONDS)
        assert done.returncode == 2
        assert done.stderr.count(b"cannot listen") == 1

        internal = f"127.0.0.1:{taken.port - 1}"  # the second process would have the port that is taken
        wrong = Gateway(
            replace(kafka, internal_listen=internal),
            tmp_path / "wrong",
            *("gateway", "--processes", "2"),
            port=free_ports(1)[0],
        )
        with pytest.raises(ServiceError, match="ARTIFACT_STORE_INTERNAL_LISTEN"):
            wrong.start()


def test_the_embedded_log_has_one_writer_and_refuses_more(embedded_settings: Settings) -> None:
    for command in ("gateway", "serve"):
        done = run_command(embedded_settings, command, "--processes", "2", seconds=SECONDS)
        assert done.returncode == 2
        assert b"--processes needs a Kafka log in ARTIFACT_STORE_LOG_URL" in done.stderr
