"""The main job from beginning to end, and every refusal, through each interface on both sets of adapters.

There is one suite: a driver only hides how an interface is called, and the tests say what must be the result.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import cbor2
import pytest
from blake3 import blake3
from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import create_async_engine

from artifact_store.manifest import decode
from services.config import Settings
from services.views.tables import artifact_files, artifact_packages, retention_state, storage_locations
from tests.integration.conditions import until
from tests.integration.processes import deployed, serving
from tests.integration.scenario.cli import cli_driver
from tests.integration.scenario.driver import REJECTIONS, TAKEN, About, Driver, Product, SourceFile, Stage, a_file
from tests.integration.scenario.http import http_driver
from tests.integration.scenario.python import python_driver

pytestmark = pytest.mark.processes

TABLES = (artifact_packages, artifact_files, storage_locations, retention_state)
PROJECTIONS = ("registry", "retention", "usage")

ABOUT = About(metadata={"instrument": "spectrometer", "run": "7", "Ωnote": "ÅÄÖ 測定"})
FILES = (
    SourceFile("empty.bin", "application/octet-stream", b""),
    SourceFile("notes/läs mig.txt", "text/plain", "håll i hatten\n".encode()),
    SourceFile("scans/large.bin", "application/octet-stream", random.Random(3).randbytes(3 * 1024 * 1024 + 17)),
)
EVENT_TYPES = ["v1.package.created", *["v1.file.ingested"] * 3, "v1.package.finalized"]

DRIVERS: dict[str, Callable[[Product], AbstractAsyncContextManager[Driver]]] = {
    "python": python_driver,
    "http": http_driver,
    "cli": cli_driver,
}


@pytest.fixture(params=list(DRIVERS))
def interface(request: pytest.FixtureRequest) -> str:
    """The interface that a test goes through."""
    name: str = request.param
    return name


@pytest.fixture
def product(interface: str, settings: Settings, tmp_path: Path) -> Iterator[Product]:
    """The product on either set of adapters: embedded, in a process only where HTTP asks for one; else as deployed."""
    if settings.log_url.startswith("kafka:"):
        with deployed(settings, tmp_path) as processes:
            yield Product(settings, processes["gateway"].endpoint)
    elif interface == "http":
        with serving(settings, tmp_path) as process:
            yield Product(settings, process.endpoint)
    else:
        yield Product(settings, None)


@pytest.fixture
async def driver(interface: str, product: Product) -> AsyncIterator[Driver]:
    """The interface, spoken to."""
    async with DRIVERS[interface](product) as opened:
        yield opened


async def test_a_package_is_published_read_followed_and_folded_again(driver: Driver, product: Product) -> None:
    package_id, address = await driver.publish(ABOUT, FILES)
    assert address is not None

    await manifest_is_right(driver, package_id, address)
    assert await driver.contents(package_id) == {file.relative_path: file.content for file in FILES}

    events = await driver.tail(package_id)
    assert [event.event_type for event in events] == EVENT_TYPES
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert {event.package_id for event in events} == {package_id}
    assert [event.event_id for event in events] == [uuid5(package_id, str(number)) for number in range(1, 6)]

    await views_are_complete(product, package_id)
    before = {table.name: await rows(product.settings, table) for table in TABLES}
    digests = {name: await driver.digest(name) for name in PROJECTIONS}
    assert {name: len(found) for name, found in before.items()} == {
        "artifact_packages": 1,
        "artifact_files": 3,
        "storage_locations": 3,
        "retention_state": 1,
    }
    for name in PROJECTIONS:
        await driver.replay(name)
    assert {table.name: await rows(product.settings, table) for table in TABLES} == before
    assert {name: await driver.digest(name) for name in PROJECTIONS} == digests
    await driver.verify()


async def test_what_is_refused_is_said_and_leaves_nothing_behind(driver: Driver, subtests: pytest.Subtests) -> None:
    open_id, _ = await driver.publish(ABOUT, [a_file(TAKEN)], finalize=False)
    finalized_id, _ = await driver.publish(ABOUT, [a_file("a.txt")])
    stage = Stage(open_id, finalized_id)
    recorded = await driver.tail()
    assert len(recorded) == 5

    for rejection in REJECTIONS:
        with subtests.test(rejection.name), driver.expects(rejection):
            await rejection.attempt(driver, stage)
    assert sorted(await driver.tail(), key=str) == sorted(recorded, key=str)


async def manifest_is_right(driver: Driver, package_id: UUID, address: str) -> None:
    """Both forms of the manifest say what was published, and the address is that of the canonical bytes."""
    cbor = await driver.manifest(package_id, "cbor")
    text = await driver.manifest(package_id, "json")
    assert f"blake3:{blake3(cbor).hexdigest()}" == address
    assert text.startswith(b"{")
    assert b'"manifest_version":1' in text
    assert json.loads(text) == cbor2.loads(cbor)
    manifest = decode(cbor)
    assert manifest == decode(text)
    package = manifest.package
    assert (package.id, package.status) == (package_id, "finalized")
    about = About(package.name, package.producer, package.subject, package.retention_class, package.metadata)
    assert about == ABOUT
    assert [
        (file.relative_path, file.media_type, file.size_bytes, file.blake3)  #
        for file in manifest.files
    ] == [
        (file.relative_path, file.media_type, len(file.content), blake3(file.content).hexdigest())  #
        for file in sorted(FILES, key=lambda file: file.relative_path.encode())
    ]
    assert [receipt.file_id for receipt in manifest.storage_receipts] == [file.file_id for file in manifest.files]


async def views_are_complete(product: Product, package_id: UUID) -> None:
    """Wait until both projections hold the package's last event; on the embedded parts every read brings them there."""

    async def complete() -> bool:
        found = [
            row._mapping["last_event_sequence"]
            for table in (artifact_packages, retention_state)
            for row in await rows(product.settings, table)
        ]
        return found == [5, 5]

    await until(complete, 30, f"the views did not hold all of package {package_id}")


async def rows(settings: Settings, table: Table) -> list[Any]:
    """Everything that the table holds, read past the product's own queries."""
    engine = create_async_engine(settings.views_url)
    try:
        async with engine.connect() as connection:
            found = await connection.execute(select(table).order_by(*table.primary_key.columns))
            return list(found.all())
    finally:
        await engine.dispose()
