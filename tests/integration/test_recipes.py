"""The recipes of docs/subscribing.md, run exactly as printed: other people's tools on the topic and the feed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import asyncpg
import pytest
import pytest_asyncio
from confluent_kafka.admin import AdminClient

from services.config import Settings
from services.log.kafka import KafkaLog
from tests.conftest import Endpoints
from tests.documents import ROOT, blocks
from tests.integration.conditions import until
from tests.integration.kafka_stage import kafka_settings
from tests.integration.processes import ProductProcess, output_of
from tests.integration.test_foreign_reader import Producer
from tests.services.apicurio import ApicurioServer
from tests.services.install import (
    EVENTSOURCE_PACKAGE,
    connect_jars,
    connect_plugins,
    java,
    java_client_jars,
    java_registry_jars,
    kafka_tool_jars,
    kcat,
    node,
    node_folder,
)

pytestmark = [pytest.mark.services, pytest.mark.endurance, pytest.mark.asyncio(loop_scope="module")]

RECIPES = blocks("docs/subscribing.md")
PACKAGES = 7
FILES = 3
_SECONDS = 240.0
"""How long a program may take: each starts slowly, and some restart a gateway meanwhile."""


@dataclass(frozen=True)
class Scene:
    """A gateway and what was published through it: manifest addresses by package."""

    settings: Settings
    gateway: ProductProcess
    producer: Producer

    @property
    def brokers(self) -> str:
        return urlsplit(self.settings.log_url).netloc

    @property
    def topic(self) -> str:
        return f"{urlsplit(self.settings.log_url).path.strip('/')}.events"

    @property
    def addresses(self) -> set[str]:
        """As the recipes print them."""
        return {f"{address} {package_id}" for package_id, address in self.producer.written.addresses.items()}

    @property
    def events(self) -> int:
        return len(self.producer.written.names) * (FILES + 1) + len(self.producer.written.addresses)

    async def publish(self, name: str) -> None:
        await self.producer.publish(name, [f"{name}/{n}" for n in range(FILES)])


@asynccontextmanager
async def scene(settings: Settings, folder: Path) -> AsyncIterator[Scene]:
    """Some finalized packages and an open one."""
    output_of(settings, "migrate")
    with ProductProcess(settings, folder / "gateway", "gateway") as gateway:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            found = Scene(settings, gateway, Producer(session, gateway.endpoint))
            for number in range(PACKAGES):
                await found.publish(f"package {number}")
            await found.producer.publish("open", ["a", "b", "c"], finalize=False)
            yield found


@contextmanager
def topic_settings(endpoints: Endpoints, folder: Path, **changes: Any) -> Iterator[Settings]:
    """A topic of its own, which is deleted afterwards; blobs and views on this machine, which no recipe reads."""
    prefix = f"test-{uuid4().hex[:12]}"
    yield kafka_settings(
        f"kafka://{endpoints.kafka}/{prefix}",
        folder,
        blobs_url=f"file:{folder}/blobs",
        views_url=f"sqlite+aiosqlite:///{folder}/views.db",
        listen="127.0.0.1:0",
        **changes,
    )
    admin = AdminClient({"bootstrap.servers": endpoints.kafka})  # must outlive its futures
    admin.delete_topics([f"{prefix}.events"])[f"{prefix}.events"].result(30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def published(endpoints: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """On a topic in single-object encoding."""
    folder = tmp_path_factory.mktemp("recipes")
    with topic_settings(endpoints, folder) as settings:
        async with scene(settings, folder) as found:
            yield found


async def first_lines(count: int, *command: str | Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """What a program that never ends prints first; it is ended then."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=ROOT, stdout=asyncio.subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_SECONDS):
            return [(await process.stdout.readline()).decode().rstrip("\n") for _ in range(count)]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def on_path(folder: Path, script: str, jars: Path, main: str) -> str:
    """A PATH that begins with a folder in which `script` runs this class, as Kafka's own distribution has it."""
    program = folder / "bin" / script
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh\nexec {java()} -cp '{jars}/*' {main} "$@"\n""", encoding="utf-8")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


async def whole_output(recipe: str, found: Scene, path: str = os.environ["PATH"]) -> str:
    """What a recipe for the shell prints until it ends, with this PATH."""
    environment = {"BROKERS": found.brokers, "TOPIC": found.topic, "URL": found.gateway.endpoint, "PATH": path}
    process = await asyncio.create_subprocess_exec(
        "sh", "-ec", RECIPES[recipe], stdout=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )
    async with asyncio.timeout(_SECONDS):
        printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


def finalized(lines: list[str]) -> set[str]:
    """The packages whose finalization these lines name, with all headers of each record."""
    return {
        match[0] for line in lines if "v1.package.finalized" in line and (match := re.search(r"[0-9a-f-]{36}", line))
    }


async def test_kcat_lists_what_happened_from_headers(published: Scene) -> None:
    kcat()
    lines = (await whole_output("kcat", published)).splitlines()
    assert len(lines) == published.events
    assert finalized(lines) == published.producer.written.addresses.keys()


async def test_kafkas_console_consumer_lists_what_happened(published: Scene, tmp_path: Path) -> None:
    main = "org.apache.kafka.tools.consumer.ConsoleConsumer"
    path = on_path(tmp_path, "kafka-console-consumer.sh", kafka_tool_jars(), main)
    printed = (await whole_output("console", published, path)).splitlines()
    lines = [line for line in printed if line.startswith("event_type:")]  # our script leaves log lines among them
    assert len(lines) == published.events
    assert {line.split()[-1] for line in lines if "v1.package.finalized" in line} == (
        published.producer.written.addresses.keys()
    )


async def test_a_java_consumer_prints_every_manifest_address(published: Scene, tmp_path: Path) -> None:
    program = tmp_path / "Addresses.java"
    program.write_text(RECIPES["java"], encoding="utf-8")
    command: list[str | Path] = [
        java(),
        "-cp",
        f"{java_client_jars()}/*",
        program,
        published.brokers,
        published.topic,
        "schemas",
    ]
    assert set(await first_lines(len(published.addresses), *command)) == published.addresses


async def test_curl_reads_the_feed_as_server_sent_events(published: Scene) -> None:
    events = [block for block in (await whole_output("curl", published)).split("\n\n") if "data:" in block]
    assert len(events) == published.events
    fields = [dict(line.split(": ", 1) for line in event.splitlines()) for event in events]
    said = [json.loads(event["data"]) for event in fields]
    assert [event["id"] for event in fields] == [event["position"] for event in said]
    addresses = {
        f"blake3:{event['payload_digest']} {event['package_id']}"
        for event in said
        if event["type"] == "v1.package.finalized"
    }
    assert addresses == published.addresses


async def test_an_event_source_goes_on_after_a_gateway_restarts(published: Scene, tmp_path: Path) -> None:
    program = node_folder(EVENTSOURCE_PACKAGE) / f"follow-{os.getpid()}.mjs"
    program.write_text(RECIPES["node"], encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        node(), program, published.gateway.endpoint, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_SECONDS):
            lines = [(await process.stdout.readline()).decode().strip() for _ in published.addresses]
            for number in range(2):
                await asyncio.to_thread(published.gateway.restart)
                await published.publish(f"later {number}")
                lines.append((await process.stdout.readline()).decode().strip())
    finally:
        process.kill()
        await process.wait()
        program.unlink()
    assert sorted(lines) == sorted(published.addresses)


@pytest.mark.parametrize("straight", [False, True], ids=["over HTTP", "straight from Kafka"])
async def test_a_durable_consumer_that_is_killed_counts_each_package_once(
    published: Scene, tmp_path: Path, straight: bool
) -> None:
    program, path = RECIPES["consumer"], tmp_path / "own.db"
    if straight:  # as the guide says
        imports = "from services.config import Settings\nfrom services.registry import open_events\n"
        program = imports + program.replace("Client(url)", "open_events(Settings.from_env())")
    environment = {**os.environ, **published.settings.environment()}

    async def more_than(count: int) -> bool:
        return len(counted(path)) > count

    for run in range(3):
        # The first two are killed somewhere on their way, the last when it has come to the end.
        before = len(counted(path)) if run < 2 else len(published.addresses)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, published.gateway.endpoint, path, env=environment
        )
        try:
            await published.publish(f"while it runs {run} {straight}")
            await until(partial(more_than, before), _SECONDS, "the program went no further")
        finally:
            process.kill()
            await process.wait()
        assert set(counted(path)) <= published.addresses
    assert set(counted(path)) == published.addresses


def counted(path: Path) -> list[str]:
    """What the program has written down; it may not have made its table yet. A package has one row."""
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'finalized'").fetchall():
            return []
        return [f"{address} {package}" for package, address in database.execute("SELECT * FROM finalized")]


async def test_the_cloudevents_sdk_reads_records_as_events(published: Scene) -> None:
    command = [sys.executable, "-c", RECIPES["cloudevents"], published.brokers, published.topic]
    lines = [line.split() for line in await first_lines(published.events, *command)]
    assert len({event_id for event_id, *_ in lines}) == published.events
    assert {subject for _, kind, subject, _ in lines if kind == "v1.package.finalized"} == (
        published.producer.written.addresses.keys()
    )
    assert set(published.producer.written.event_digests.values()) <= {event_id for event_id, *_ in lines}


async def test_confluents_deserializer_prints_every_manifest_address(endpoints: Endpoints, tmp_path: Path) -> None:
    with (
        ApicurioServer(tmp_path / "registry") as registry,
        topic_settings(endpoints, tmp_path, schema_registry_url=registry.endpoint) as settings,
    ):
        async with scene(settings, tmp_path) as found:
            command = [sys.executable, "-c", RECIPES["registry"], found.brokers, found.topic, registry.endpoint]
            assert set(await first_lines(PACKAGES, *command)) == found.addresses
            log = KafkaLog(settings)
            await log.check()  # what `doctor` and every gateway look at
            await log.close()
            await asyncio.to_thread(registry.stop)
            await found.publish("without the registry")  # running processes do not need it


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registered(
    endpoints: Endpoints, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Scene, str]]:
    """On a topic with a schema registry, and the registry's own URL."""
    folder = tmp_path_factory.mktemp("registered")
    with (
        ApicurioServer(folder / "registry") as registry,
        topic_settings(endpoints, folder, schema_registry_url=registry.endpoint) as settings,
    ):
        async with scene(settings, folder) as found:
            yield found, f"http://127.0.0.1:{registry.port}"


async def test_a_java_consumer_with_the_registrys_deserializer_prints_every_manifest_address(
    registered: tuple[Scene, str], tmp_path: Path
) -> None:
    found, registry = registered
    program = tmp_path / "Registered.java"
    program.write_text(RECIPES["javaregistry"], encoding="utf-8")
    command: list[str | Path] = [java(), "-cp", f"{java_registry_jars()}/*", program, found.brokers, found.topic]
    printed = await first_lines(len(found.addresses), *command, f"{registry}/apis/registry/v3")
    assert set(printed) == found.addresses


async def test_kafka_connect_puts_each_event_into_one_row(
    registered: tuple[Scene, str], postgres_url: str, tmp_path: Path
) -> None:
    found, registry = registered
    database = urlsplit(postgres_url)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for folder in connect_plugins():
        (plugins / folder.name).symlink_to(folder)
    environment = {
        "BROKERS": found.brokers,
        "TOPIC": found.topic,
        "REGISTRY": registry,
        "PLUGINS": str(plugins),
        "DATABASE": f"{database.hostname}:{database.port}{database.path}",
        "PGUSER": database.username or "",
        "PGPASSWORD": database.password or "",
        "PATH": on_path(
            tmp_path, "connect-standalone.sh", connect_jars(), "org.apache.kafka.connect.cli.ConnectStandalone"
        ),
    }
    connection = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))

    async def all_there() -> bool:
        if await connection.fetchval("SELECT to_regclass('package_events')") is None:
            return False
        return bool(await connection.fetchval("SELECT count(*) FROM package_events") >= found.events)

    try:
        for run in range(2):  # the second goes on where the first one was killed
            await found.publish(f"for Connect {run}")
            process = await asyncio.create_subprocess_exec(
                "sh", "-ec", RECIPES["connect"], cwd=tmp_path, env={**os.environ, **environment}, process_group=0
            )
            try:
                await until(all_there, _SECONDS, "Connect did not store all events")
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        rows = await connection.fetch("SELECT * FROM package_events")
    finally:
        await connection.close()
    log = KafkaLog(found.settings)
    wanted = [
        {
            "event_id": str(event.event_id),
            "event_type": event.event_type,
            "package_id": str(event.package_id),
            "sequence": event.sequence,
            "created_at": event.created_at,
            "actor": event.actor,
            "command_id": str(event.command_id),
            "payload_digest": event.payload_digest,
        }
        async for event in log.read()
    ]
    await log.close()
    assert sorted(map(dict, rows), key=itemgetter("event_id")) == sorted(wanted, key=itemgetter("event_id"))
