"""File objects as streams: none is truncated where it only has no bytes yet."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import pytest

from artifact_store.byte_streams import from_any, joined
from artifact_store.client.bodies import source_of
from artifact_store.errors import InvalidRequestError
from services.config import Settings
from services.registry import open_registry
from tests.unit.artifact_store.client.failing_gateway import PACKAGE, client_of, failing_gateway, ingested


async def test_a_file_object_that_does_not_block_is_refused(embedded_settings: Settings) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"abc")
    with os.fdopen(reading, "rb", buffering=0) as file, os.fdopen(writing, "wb"):
        with pytest.raises(InvalidRequestError, match="non-blocking"):
            await joined(from_any(file))
        async with open_registry(embedded_settings) as registry:
            package_id = await registry.create_package("n", "p", "s", "scratch")
            with pytest.raises(InvalidRequestError, match="non-blocking"):
                await registry.ingest_file(package_id, "a", "text/plain", file)
            assert (await registry.list_files(package_id)).items == ()
        async with failing_gateway(ingested) as gateway, client_of(gateway) as registry:
            with pytest.raises(InvalidRequestError, match="non-blocking"):
                await registry.ingest_file(PACKAGE, "a", "text/plain", file)


class Gappy(BytesIO):
    """Seekable, and at times without bytes as yet."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(2) or None  # type: ignore[return-value]  # as of any file that does not block


async def test_neither_is_one_that_can_be_set_back() -> None:
    with pytest.raises(InvalidRequestError, match="non-blocking"):
        await joined(source_of(Gappy(b"abc")))


async def test_a_file_object_is_read_to_its_end(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as file:
        assert await joined(from_any(file)) == content
