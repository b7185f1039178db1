"""`ingest-tree`, `pull-tree`, `ingest-large`, `ingest-large-direct`: files on disk into the registry and back, against
plain copies.

The trees have 10,000 files of 4 KiB and count in files/s; `ingest-large` has four files of 256 MiB and counts in MiB/s.
With `ingest-large-direct` their bytes go straight to the store, and the gateway reads them back.
Ours is the command line as users run it, the start of Python and all of its hashing, recording and finalizing
included, against one gateway in a process of its own. Ingest needs no view: while files go in, no projector runs, as
`catch-up` measures those; a tree comes out once its view is there. The baseline is the best of three programs that
merely copy the same files into the same store and back (`benchmarks.copiers`). Files are on disk at both ends; every
push is of bytes that the store has never seen.

Small files and their objects are removed at the end of all rounds: where many were removed a moment ago, a file system
is slow to make new ones (docs/benchmarks.md), and nobody is to pay for what another round has left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any
from uuid import uuid4

from benchmarks.copiers import Copier, copiers, seconds_of
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from services.config import Settings
from tests.integration.processes import output_of

_MIB = 1 << 20
_ABOUT = ("--name", "tree", "--producer", "benchmark", "--subject", "tree", "--retention-class", "scratch", "--json")


@dataclass(frozen=True, slots=True)
class Load:
    """So many files of so many bytes in so many folders, counted in `unit`: so many of them are in the whole."""

    files: int
    file_bytes: int
    folders: int
    unit: str
    units: float


TREE = Load(files=10_000, file_bytes=4_096, folders=100, unit="files/s", units=10_000)
LARGE = Load(files=4, file_bytes=256 * _MIB, folders=1, unit="MiB/s", units=4 * 256)


class Copies:
    """One load by four ways, in one direction; see the module."""

    def __init__(self, stage: Stage, load: Load, programs: list[Copier]) -> None:
        self._stage = stage
        self._load = load
        self._programs = programs
        self._draw = Random(7)
        self._rates: defaultdict[str, list[float]] = defaultdict(list)
        self._gateway_cpu: list[float] = []
        self._client_cpu: list[float] = []

    def details(self) -> Mapping[str, Any]:
        """The medians of all programs, and what our gateway and our client spent."""
        return {
            "files": self._load.files,
            "file_bytes": self._load.file_bytes,
            self._load.unit: {name: round(median(rates)) for name, rates in self._rates.items()},
            "gateway_cpu_seconds": round(median(self._gateway_cpu), 2) if self._gateway_cpu else None,
            "client_cpu_seconds": round(median(self._client_cpu), 2) if self._client_cpu else None,
        }

    def _fresh_files(self) -> Path:
        """Files of bytes that were never seen before. Blocks."""
        tree = self._stage.folder / f"tree-{uuid4().hex}"
        for number in range(self._load.folders):
            (tree / f"{number:03}").mkdir(parents=True)
        for number in range(self._load.files):
            path = tree / f"{number * self._load.folders // self._load.files:03}" / f"frame-{number:05}.bin"
            with path.open("wb") as file:
                for start in range(0, self._load.file_bytes, _MIB):
                    file.write(self._draw.randbytes(min(_MIB, self._load.file_bytes - start)))
                if self._load.file_bytes > _MIB:  # written down while the clock runs, they would slow all down
                    os.fsync(file.fileno())
        return tree

    async def _measured(self, name: str, command: Callable[[], object]) -> float:
        """The rate of one of our commands, and what it cost."""
        gateway, client = self._stage.gateway_cpu(), _children_cpu()
        seconds = await seconds_of(command)
        self._gateway_cpu.append(self._stage.gateway_cpu() - gateway)
        self._client_cpu.append(_children_cpu() - client)
        return self._note(name, seconds)

    def _make_room(self, tree: Path | None, prefix: str | None) -> None:
        """Remove large files, which the disk may not hold for all rounds; see the module for small ones. Blocks."""
        if self._load.file_bytes <= _MIB:
            return
        if prefix is not None:
            self._stage.clear(prefix, self._load.files)
        if tree is not None:
            shutil.rmtree(tree)

    def _push(self, tree: Path) -> str:
        """The package that the files went to. Blocks."""
        found = json.loads(output_of(None, "push", tree, *_ABOUT, url=self._stage.gateway.endpoint))
        load = self._load
        assert (found["files"], found["bytes"]) == (load.files, load.files * load.file_bytes)
        return str(found["package_id"])

    def _note(self, name: str, seconds: float) -> float:
        rate = self._load.units / seconds
        self._rates[name].append(rate)
        return rate


class Ingest(Copies):
    """Into the store."""

    async def ours(self) -> float:
        """`artifact-store push`."""
        tree = await asyncio.to_thread(self._fresh_files)
        rate = await self._measured("artifact-store push", lambda: self._push(tree))
        await asyncio.to_thread(self._make_room, tree, "uploads/")
        return rate

    async def baseline(self) -> float:
        """The best of the programs."""
        tree = await asyncio.to_thread(self._fresh_files)
        best = 0.0
        for program in self._programs:
            prefix = f"copies/{uuid4().hex}"
            seconds = await seconds_of(partial(program.upload, tree, prefix))
            assert await asyncio.to_thread(self._stage.count, prefix) == self._load.files
            await asyncio.to_thread(self._make_room, None, prefix)
            best = max(best, self._note(program.name, seconds))
        await asyncio.to_thread(self._make_room, tree, None)
        return best


class Pull(Copies):
    """Out of the store, onto disk."""

    def __init__(self, stage: Stage, load: Load, programs: list[Copier]) -> None:
        super().__init__(stage, load, programs)
        self._tree = self._fresh_files()
        self._package = self._push(self._tree)
        programs[0].upload(self._tree, "copies/pulled")
        # Reading waits for the view: the clock is not to run while the projector catches up.
        self._pull(stage.folder / "first")

    async def ours(self) -> float:
        """`artifact-store pull`, every byte verified."""
        target = self._stage.folder / uuid4().hex
        rate = await self._measured("artifact-store pull", lambda: self._pull(target))
        await asyncio.to_thread(self._check, target)
        return rate

    async def baseline(self) -> float:
        """The best of the programs, none of which verifies."""
        best = 0.0
        for program in self._programs:
            target = self._stage.folder / uuid4().hex
            target.mkdir()
            seconds = await seconds_of(partial(program.download, target, "copies/pulled"))
            await asyncio.to_thread(self._check, target)
            best = max(best, self._note(program.name, seconds))
        return best

    def _pull(self, target: Path) -> None:
        output_of(None, "pull", self._package, target, url=self._stage.gateway.endpoint)

    def _check(self, target: Path) -> None:
        """What is there is the tree."""
        found = {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        wanted = {path.relative_to(self._tree): path for path in self._tree.rglob("*") if path.is_file()}
        assert found.keys() == wanted.keys()
        assert all(data == wanted[name].read_bytes() for name, data in found.items())
        self._make_room(target, None)


def _children_cpu() -> float:
    """Processor seconds of the processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


def _plan(
    name: str,
    target: float,
    load: Load,
    way: type[Ingest] | type[Pull],
    *,
    direct: bool = False,
    on_seaweedfs: float | None = None,
) -> Plan:
    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[Ingest | Pull]:
        async with gateway_stage(settings, projectors=way is Pull, direct=direct) as stage:
            yield await asyncio.to_thread(way, stage, load, copiers(stage.bucket, print))

    return Plan(name, load.unit, target, opened, targets={"seaweedfs": on_seaweedfs or target})


INGEST = _plan("ingest-tree", 10.0, TREE, Ingest, on_seaweedfs=2.5)
PULL = _plan("pull-tree", 5.0, TREE, Pull, on_seaweedfs=2.0)
INGEST_LARGE = _plan("ingest-large", 0.8, LARGE, Ingest)
INGEST_LARGE_DIRECT = _plan("ingest-large-direct", 1.0, LARGE, Ingest, direct=True)
