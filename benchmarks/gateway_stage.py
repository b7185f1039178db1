"""The stage of a gateway benchmark: its own bucket, topic, views and folder, and one gateway process."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import psutil
from minio.deleteobjects import DeleteObject

from benchmarks.copiers import Bucket
from benchmarks.kafka_topics import fresh_topic
from benchmarks.views_database import fresh_views
from services.config import Settings
from tests.buckets import direct_settings
from tests.integration.processes import ProductProcess, deployed, output_of


@dataclass(frozen=True, slots=True)
class Stage:
    """One gateway with its settings, and a folder for files."""

    settings: Settings
    bucket: Bucket
    gateway: ProductProcess
    folder: Path

    def gateway_cpu(self) -> float:
        """Processor seconds that the gateway has spent so far."""
        times = psutil.Process(self.gateway.pid).cpu_times()
        return float(times.user + times.system)

    def count(self, prefix: str) -> int:
        """How many objects there are below a prefix. Blocks."""
        return sum(1 for _ in self.bucket.client().list_objects(self.bucket.name, prefix=prefix, recursive=True))

    def clear(self, prefix: str, expected: int | None = None) -> None:
        """Remove the objects below a prefix; with `expected`, only if this is their number. Blocks."""
        clear(self.bucket, prefix, expected)


@asynccontextmanager
async def gateway_stage(settings: Settings, *, projectors: bool, direct: bool = False) -> AsyncIterator[Stage]:
    """The stage, everything on it fresh; all of it goes at the end.

    If `direct` is set, clients send parts of large files straight to the store.
    """
    bucket = replace(Bucket.of(settings), name=f"bench-{uuid4().hex[:12]}")
    url, _, _ = settings.blobs_url.rpartition("/")
    with (
        tempfile.TemporaryDirectory(prefix="artifact-store-bench-") as folder,
        _bytecode_kept(Path(folder) / "bytecode"),
        fresh_topic(settings) as on_topic,
    ):
        async with fresh_views(on_topic) as fresh:
            own = replace(fresh, blobs_url=f"{url}/{bucket.name}")
            try:
                with (
                    _public(own) if direct else nullcontext(own) as reachable,
                    _running(reachable, Path(folder) / "processes", projectors=projectors) as gateway,
                ):
                    yield Stage(own, bucket, gateway, Path(folder))
            finally:
                await asyncio.to_thread(clear, bucket, "")
                await asyncio.to_thread(bucket.client().remove_bucket, bucket.name)


@contextmanager
def _public(settings: Settings) -> Iterator[Settings]:
    """The settings with a store that clients can reach."""
    bucket = {**vars(settings), "s3_secret_key": settings.s3_secret_key.get_secret_value()}
    with direct_settings(bucket) as public:
        yield replace(settings, **public)


@contextmanager
def _running(settings: Settings, folder: Path, *, projectors: bool) -> Iterator[ProductProcess]:
    if projectors:
        with deployed(settings, folder) as processes:
            yield processes["gateway"]
        return
    output_of(settings, "migrate")
    with ProductProcess(settings, folder / "gateway", "gateway") as gateway:
        yield gateway


@contextmanager
def _bytecode_kept(folder: Path) -> Iterator[None]:
    """Keep compiled modules, as every installation does, in an environment that may forbid it: processes inherit this.

    The uncounted first round compiles them.
    """
    before = {name: os.environ.pop(name, None) for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    try:
        yield
    finally:
        del os.environ["PYTHONPYCACHEPREFIX"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def clear(bucket: Bucket, prefix: str, expected: int | None = None) -> None:
    """As `Stage.clear`."""
    client = bucket.client()
    keys = [str(item.object_name) for item in client.list_objects(bucket.name, prefix=prefix, recursive=True)]
    assert expected is None or len(keys) == expected, f"{len(keys)} objects are there instead of {expected}"
    assert list(client.remove_objects(bucket.name, map(DeleteObject, keys))) == []
