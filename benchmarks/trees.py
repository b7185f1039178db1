"""`ingest-tree` and `pull-tree`: a tree of 10,000 files of 4 KiB into the registry and back, in files/s.

Ours is the command line as users run it, the start of Python and all of its hashing, recording and finalizing
included, against one gateway in a process of its own. Ingest needs no view: while a tree goes in, no projector runs, as
`catch-up` measures those; a tree comes out once its view is there. The baseline is the best of three programs that
merely copy the same tree into the same MinIO and back (`benchmarks.copiers`). Files are on disk at both ends; every
push is of bytes that the store has never seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any
from uuid import uuid4

import psutil
from minio.deleteobjects import DeleteObject

from benchmarks.copiers import Bucket, Copier, copiers, seconds_of
from benchmarks.harness import Plan
from benchmarks.kafka_topics import fresh_topic
from benchmarks.views_database import fresh_views
from services.config import Settings
from tests.integration.processes import ProductProcess, deployed, output_of

FILES = 10_000
FILE_BYTES = 4_096
FOLDERS = 100

_ABOUT = ("--name", "tree", "--producer", "benchmark", "--subject", "tree", "--retention-class", "scratch", "--json")


class Trees:
    """One tree by four ways, in one direction; see the module."""

    def __init__(self, bucket: Bucket, gateway: ProductProcess, folder: Path, programs: list[Copier]) -> None:
        self._bucket = bucket
        self._gateway = gateway
        self._folder = folder
        self._programs = programs
        self._draw = Random(7)
        self._rates: defaultdict[str, list[float]] = defaultdict(list)
        self._cpu: list[float] = []

    def details(self) -> Mapping[str, Any]:
        """The medians of all programs, and what our gateway spent."""
        return {
            "files": FILES,
            "file_bytes": FILE_BYTES,
            "files_a_second": {name: round(median(rates)) for name, rates in self._rates.items()},
            "gateway_cpu_micros_a_file": round(median(self._cpu) / FILES * 1_000_000) if self._cpu else None,
        }

    def _fresh_tree(self) -> Path:
        """A tree of bytes that were never seen before. Blocks."""
        tree = self._folder / f"tree-{uuid4().hex}"
        for number in range(FOLDERS):
            (tree / f"{number:03}").mkdir(parents=True)
        for number in range(FILES):
            path = tree / f"{number * FOLDERS // FILES:03}" / f"frame-{number:05}.bin"
            path.write_bytes(self._draw.randbytes(FILE_BYTES))
        return tree

    def _gateway_cpu(self) -> float:
        times = psutil.Process(self._gateway.pid).cpu_times()
        return float(times.user + times.system)

    def _note(self, name: str, seconds: float) -> float:
        rate = FILES / seconds
        self._rates[name].append(rate)
        return rate


class IngestTree(Trees):
    """Into the store."""

    async def ours(self) -> float:
        """`artifact-store push`."""
        tree = await asyncio.to_thread(self._fresh_tree)
        before = self._gateway_cpu()
        seconds = await seconds_of(lambda: self._push(tree))
        self._cpu.append(self._gateway_cpu() - before)
        await asyncio.to_thread(shutil.rmtree, tree)
        return self._note("artifact-store push", seconds)

    async def baseline(self) -> float:
        """The best of the programs."""
        tree = await asyncio.to_thread(self._fresh_tree)
        best = 0.0
        for program in self._programs:
            prefix = f"copies/{uuid4().hex}"
            seconds = await seconds_of(partial(program.upload, tree, prefix))
            await asyncio.to_thread(_clear, self._bucket, prefix, FILES)
            best = max(best, self._note(program.name, seconds))
        await asyncio.to_thread(shutil.rmtree, tree)
        return best

    def _push(self, tree: Path) -> None:
        found = json.loads(output_of(None, "push", tree, *_ABOUT, url=self._gateway.endpoint))
        assert (found["files"], found["bytes"]) == (FILES, FILES * FILE_BYTES)


class PullTree(Trees):
    """Out of the store, onto disk."""

    def __init__(self, bucket: Bucket, gateway: ProductProcess, folder: Path, programs: list[Copier]) -> None:
        super().__init__(bucket, gateway, folder, programs)
        self._tree = self._fresh_tree()
        pushed = output_of(None, "push", self._tree, *_ABOUT, url=gateway.endpoint)
        self._package = str(json.loads(pushed)["package_id"])
        programs[0].upload(self._tree, "copies/pulled")
        # Reading waits for the view: the clock is not to run while the projector catches up.
        output_of(None, "pull", self._package, folder / "first", url=gateway.endpoint)

    async def ours(self) -> float:
        """`artifact-store pull`, every byte verified."""
        target = self._folder / uuid4().hex
        before = self._gateway_cpu()
        seconds = await seconds_of(
            lambda: _discard(output_of(None, "pull", self._package, target, url=self._gateway.endpoint))
        )
        self._cpu.append(self._gateway_cpu() - before)
        await asyncio.to_thread(self._check, target)
        return self._note("artifact-store pull", seconds)

    async def baseline(self) -> float:
        """The best of the programs, none of which verifies."""
        best = 0.0
        for program in self._programs:
            target = self._folder / uuid4().hex
            target.mkdir()
            seconds = await seconds_of(partial(program.download, target, "copies/pulled"))
            await asyncio.to_thread(self._check, target)
            best = max(best, self._note(program.name, seconds))
        return best

    def _check(self, target: Path) -> None:
        """What is there is the tree; then it goes."""
        found = {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        wanted = {path.relative_to(self._tree): path for path in self._tree.rglob("*") if path.is_file()}
        assert found.keys() == wanted.keys()
        assert all(data == wanted[name].read_bytes() for name, data in found.items())
        shutil.rmtree(target)


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


def _discard(_: bytes) -> None:
    """What a command says is not looked at."""


def _clear(bucket: Bucket, prefix: str, expected: int | None = None) -> None:
    client = bucket.client()
    keys = [str(item.object_name) for item in client.list_objects(bucket.name, prefix=prefix, recursive=True)]
    assert expected is None or len(keys) == expected, f"{len(keys)} objects were copied instead of {expected}"
    assert list(client.remove_objects(bucket.name, map(DeleteObject, keys))) == []


def _plan(name: str, target: float, way: type[IngestTree] | type[PullTree]) -> Plan:
    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[IngestTree | PullTree]:
        bucket = Bucket(**{**_fields(Bucket.of(settings)), "name": f"bench-{uuid4().hex[:12]}"})
        url, _, _ = settings.blobs_url.rpartition("/")
        with (
            tempfile.TemporaryDirectory(prefix="artifact-store-trees-") as folder,
            _bytecode_kept(Path(folder) / "bytecode"),
            fresh_topic(settings) as on_topic,
        ):
            async with fresh_views(on_topic) as fresh:
                own = fresh.model_copy(update={"blobs_url": f"{url}/{bucket.name}"})
                try:
                    with _running(own, Path(folder) / "processes", projectors=way is PullTree) as gateway:
                        yield await asyncio.to_thread(way, bucket, gateway, Path(folder), copiers(bucket, print))
                finally:
                    await asyncio.to_thread(_clear, bucket, "")
                    await asyncio.to_thread(bucket.client().remove_bucket, bucket.name)

    return Plan(name, "files/s", target, opened)


def _fields(bucket: Bucket) -> dict[str, str]:
    return {name: getattr(bucket, name) for name in Bucket.__dataclass_fields__}


INGEST = _plan("ingest-tree", 5.0, IngestTree)
PULL = _plan("pull-tree", 2.0, PullTree)
