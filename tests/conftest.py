"""Fixtures that give a test its own topic, bucket and database on the shared services, or embedded parts in a folder.

Only tests with the marker `services` use the real services. `ARTIFACT_STORE_*` variables of the environment are removed
for every test, so that a shell that has sourced `var/services.env` sees the same results as another.
"""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import settings as property_tests

from services.config import PREFIX, Settings
from services.log.kafka import KafkaLog
from services.views.database import Views
from tests.buckets import Bucket
from tests.integration.kafka_stage import kafka_settings, open_kafka_log
from tests.services.seaweed import SeaweedServer
from tests.services.shared import read_environment

_ADMIN_SECONDS = 30.0

# A shell that starts this in the background has SIGINT ignored, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long one example takes says more about what else the machine does than about the code.
property_tests.register_profile("without-deadline", deadline=None)
property_tests.load_profile("without-deadline")

for _name in [name for name in os.environ if name.startswith(PREFIX)]:
    del os.environ[_name]
# What the product keeps for this user, it keeps here.
os.environ["XDG_STATE_HOME"] = str(Path(__file__).parents[1] / "var" / "state-home")


@dataclass(frozen=True)
class Endpoints:
    """Where the shared services are. `kafka` and `s3` are `host:port`, `postgres` is an SQLAlchemy URL for asyncpg."""

    kafka: str
    s3: str
    s3_access_key: str
    s3_secret_key: str
    s3_region: str
    postgres: str


@pytest.fixture(scope="session")
def endpoints() -> Endpoints:
    """The services of `make services`; fails, never skips, when one of them is not there."""
    found = read_environment()
    if not found:
        pytest.fail("the services do not run: run `make services` first", pytrace=False)
    log, blobs, views = (urlsplit(found[f"{PREFIX}{name}_URL"]) for name in ("LOG", "BLOBS", "VIEWS"))
    for url in (log, blobs, views):
        try:
            socket.create_connection((url.hostname or "", url.port or 0), timeout=5).close()
        except OSError as error:
            pytest.fail(
                f"nothing answers at {url.hostname}:{url.port} ({error}): run `make services` first", pytrace=False
            )
    return Endpoints(
        kafka=log.netloc,
        s3=blobs.netloc,
        s3_access_key=found[f"{PREFIX}S3_ACCESS_KEY"],
        s3_secret_key=found[f"{PREFIX}S3_SECRET_KEY"],
        s3_region=found[f"{PREFIX}S3_REGION"],
        postgres=found[f"{PREFIX}VIEWS_URL"],
    )


@pytest.fixture
def kafka_url(endpoints: Endpoints) -> Iterator[str]:
    """A log URL with a unique prefix. Its topic is not created here, and is deleted afterwards."""
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield f"kafka://{endpoints.kafka}/{prefix}"
    admin = AdminClient({"bootstrap.servers": endpoints.kafka})
    deleted = admin.delete_topics([f"{prefix}.events"], operation_timeout=_ADMIN_SECONDS)
    for future in deleted.values():
        try:
            future.result(timeout=_ADMIN_SECONDS)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise


@pytest.fixture
def kafka(kafka_url: str, tmp_path: Path) -> Settings:
    """A Kafka log of the test's own, whose topic is not made yet."""
    return kafka_settings(kafka_url, tmp_path)


@pytest.fixture
async def log(kafka: Settings) -> AsyncIterator[KafkaLog]:
    """That log, with its topic."""
    async with open_kafka_log(kafka) as found:
        yield found


@pytest.fixture
def s3_bucket(endpoints: Endpoints) -> Iterator[dict[str, Any]]:
    """Settings that name a separate empty bucket, which is emptied and removed afterwards."""
    keys = (endpoints.s3_access_key, endpoints.s3_secret_key, endpoints.s3_region)
    with Bucket(endpoints.s3, *keys) as bucket:
        yield bucket.settings


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket on another S3 than MinIO, which runs for this session alone; a new bucket takes it seconds."""
    with (
        SeaweedServer(tmp_path_factory.mktemp("seaweedfs")) as server,
        Bucket(server.endpoint, server.access_key, server.secret_key, server.region) as bucket,
    ):
        yield bucket


@pytest.fixture
def seaweed_bucket(seaweedfs: Bucket) -> Iterator[dict[str, Any]]:
    """As `s3_bucket`, on SeaweedFS: emptied afterwards."""
    yield seaweedfs.settings
    seaweedfs.empty()


@pytest.fixture(params=["s3_bucket", "seaweed_bucket"], ids=["minio", "seaweedfs"])
def any_s3_bucket(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A bucket on each S3, one after the other."""
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def postgres_url(endpoints: Endpoints) -> AsyncIterator[str]:
    """The SQLAlchemy URL of a separate empty database, which is dropped afterwards, whoever is still connected."""
    database = f"test_{uuid.uuid4().hex[:12]}"
    server, _, _ = endpoints.postgres.rpartition("/")
    await _execute(endpoints.postgres, f"create database {database}")
    yield f"{server}/{database}"
    await _execute(endpoints.postgres, f"drop database if exists {database} with (force)")


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=_ADMIN_SECONDS)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
def embedded_settings(tmp_path: Path) -> Settings:
    """The embedded parts in a folder of the test's own."""
    return Settings(
        log_url=f"sqlite:///{tmp_path}/log.db",
        blobs_url=f"file:{tmp_path}/blobs",
        views_url=f"sqlite+aiosqlite:///{tmp_path}/views.db",
        state_dir=tmp_path / "state",
        listen="127.0.0.1:0",
    )


@pytest.fixture
def real_settings(tmp_path: Path, kafka_url: str, s3_bucket: dict[str, Any], postgres_url: str) -> Settings:
    """Kafka, MinIO and PostgreSQL with a topic prefix, bucket and database of the test's own."""
    return Settings(
        log_url=kafka_url,
        kafka_partitions=3,
        kafka_replication_factor=1,
        kafka_min_insync_replicas=1,
        **s3_bucket,
        views_url=postgres_url,
        state_dir=tmp_path / "state",
        listen="127.0.0.1:0",
    )


@pytest.fixture(params=["embedded", pytest.param("real", marks=pytest.mark.services)])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Both sets of parts, one after the other."""
    found: Settings = request.getfixturevalue(f"{request.param}_settings")
    return found


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def views_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty views database, on SQLite and on PostgreSQL, one after the other."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/views.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
async def views(views_url: str) -> AsyncIterator[Views]:
    """Views on it, migrated."""
    opened = Views(views_url)
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.fixture
async def reference(tmp_path: Path) -> AsyncIterator[Views]:
    """A SQLite view beside the one under test, to compare with."""
    opened = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
    await opened.migrate()
    yield opened
    await opened.close()
