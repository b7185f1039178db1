"""The scenario through the Python façade: on the embedded parts in this process, or through a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Literal
from uuid import UUID

import pytest

from artifact_store.events import RecordedEvent
from artifact_store.registry import Registry
from projector import replay
from services.config import Settings
from services.registry import open_registry
from services.verify import verify
from services.views.digest import digest_view
from services.views.projections import PROJECTIONS
from services.wiring import open_blobs, open_log, open_views
from tests.integration.scenario.driver import About, Driver, Product, Rejection, SourceFile, TailedEvent

_TAIL_SECONDS = 30


class PythonDriver:
    """`Driver` over `services.registry`."""

    def __init__(self, product: Product, registry: Registry) -> None:
        self._product = product
        self._registry = registry

    async def publish(
        self, about: About, files: Sequence[SourceFile], *, finalize: bool = True
    ) -> tuple[UUID, str | None]:
        package_id = await self._registry.create_package(
            about.name, about.producer, about.subject, about.retention_class, "ada", dict(about.metadata)
        )
        for file in files:
            await self.add_file(package_id, file)
        return package_id, str(await self._registry.finalize_package(package_id, "ada")) if finalize else None

    async def add_file(self, package_id: UUID, file: SourceFile) -> None:
        file_id = await self._registry.ingest_file(
            package_id, file.relative_path, file.media_type, _chunks(file.content), "ada"
        )
        assert isinstance(file_id, UUID)

    async def finalize(self, package_id: UUID) -> None:
        await self._registry.finalize_package(package_id, "ada")

    async def manifest(self, package_id: UUID, form: Literal["cbor", "json"]) -> bytes:
        return await self._registry.get_manifest_bytes(package_id, form)

    async def contents(self, package_id: UUID) -> dict[str, bytes]:
        page = await self._registry.list_files(package_id)
        assert page.next is None
        return {
            file.relative_path: b"".join([chunk async for chunk in await self._registry.get_file(file.file_id)])
            for file in page.items
        }

    async def tail(self, package_id: UUID | None = None) -> list[TailedEvent]:
        """What there is, and the same again by following, which never ends by itself."""
        there = [_shown(event) async for event in self._registry.read_events(package_id=package_id)]
        followed: list[TailedEvent] = []
        if there:
            events = self._registry.tail_events(0, 0.05, package_id)
            async with asyncio.timeout(_TAIL_SECONDS):
                async for event in events:
                    followed.append(_shown(event))
                    if len(followed) == len(there):
                        break
        assert sorted(followed, key=str) == sorted(there, key=str)
        return there

    async def replay(self, projection: str) -> None:
        await replay(self._product.settings, projection)

    async def digest(self, projection: str) -> str:
        return await view_digest(self._product.settings, projection)

    async def verify(self) -> None:
        await nothing_is_broken(self._product.settings)

    def expects(self, rejection: Rejection) -> AbstractContextManager[Any]:
        error = ValueError if rejection.problem == "unknown-retention-class" else rejection.error
        return pytest.raises(error, match=rejection.words, check=lambda found: isinstance(found, rejection.error))


@asynccontextmanager
async def python_driver(product: Product) -> AsyncIterator[Driver]:
    """A driver for this product, as long as it is open."""
    settings = product.settings if product.url is None else Settings(url=product.url)
    async with open_registry(settings) as registry:
        yield PythonDriver(product, registry)


async def view_digest(settings: Settings, projection: str) -> str:
    """The digest of a projection's view, by the code that is behind the command `digest`."""
    views = open_views(settings)
    try:
        return (await digest_view(views, PROJECTIONS[projection])).digest
    finally:
        await views.close()


async def nothing_is_broken(settings: Settings) -> None:
    """Raise AssertionError when `verify` finds something."""
    async with AsyncExitStack() as stack:
        log, blobs, views = open_log(settings), open_blobs(settings), open_views(settings)
        for part in (log, blobs, views):
            stack.push_async_callback(part.close)
        report = await verify(log, blobs, views, check_bytes=True)
    assert report.violations == []


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    """A stream that can be read only once, in chunks of odd sizes."""
    for start in range(0, len(content), 100_003):
        yield content[start : start + 100_003]


def _shown(event: RecordedEvent) -> TailedEvent:
    assert isinstance(event.package_id, UUID)
    return TailedEvent(event.event_type, event.event_id, event.package_id, event.sequence)
