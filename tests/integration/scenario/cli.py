"""The scenario through the command line: every operation is a separate process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest

from tests.integration.processes import run_command
from tests.integration.scenario.driver import About, Driver, Product, Rejection, SourceFile, TailedEvent


class CommandFailedError(Exception):
    """A command ended with another exit code than 0; the text is what it said on standard error."""

    def __init__(self, exit_code: int, said: str) -> None:
        super().__init__(said)
        self.exit_code = exit_code


class CliDriver:
    """`Driver` over processes; with a gateway they know its URL and nothing else, but for an operator's commands."""

    def __init__(self, product: Product, folder: Path) -> None:
        self._product = product
        self._folder = folder

    async def publish(
        self, about: About, files: Sequence[SourceFile], *, finalize: bool = True
    ) -> tuple[UUID, str | None]:
        tree = self._folder / str(uuid4())
        for file in files:
            path = tree / file.relative_path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.content)
        options = [
            *("--name", about.name),
            *("--producer", about.producer),
            *("--subject", about.subject),
            *("--retention-class", about.retention_class),
            *(part for key, value in about.metadata.items() for part in ("--metadata", f"{key}={value}")),
            *([] if finalize else ["--no-finalize"]),
        ]
        pushed = json.loads(await self._run("push", tree, *options, "--json"))
        assert pushed["files"] == len(files)
        assert pushed["bytes"] == sum(len(file.content) for file in files)
        assert pushed["sequence"] == 1 + len(files) + finalize
        return UUID(pushed["package_id"]), pushed["manifest_digest"]

    async def add_file(self, package_id: UUID, file: SourceFile) -> None:
        source = self._folder / str(uuid4())
        source.write_bytes(file.content)
        await self._run("add", str(package_id), source, "--path", file.relative_path, "--media-type", file.media_type)

    async def finalize(self, package_id: UUID) -> None:
        await self._run("finalize", str(package_id))

    async def manifest(self, package_id: UUID, form: Literal["cbor", "json"]) -> bytes:
        return await self._run("manifest", str(package_id), "--format", form)

    async def contents(self, package_id: UUID) -> dict[str, bytes]:
        destination = self._folder / str(uuid4())
        await self._run("pull", str(package_id), destination)
        return {
            path.relative_to(destination).as_posix(): path.read_bytes()
            for path in destination.rglob("*")
            if path.is_file()
        }

    async def tail(self, package_id: UUID | None = None) -> list[TailedEvent]:
        of_package = [] if package_id is None else ["--package", str(package_id)]
        events = [json.loads(line) for line in (await self._run("tail", *of_package, "--json")).splitlines()]
        return [
            TailedEvent(event["type"], UUID(event["id"]), UUID(event["package_id"]), event["sequence"])
            for event in events
        ]

    async def replay(self, projection: str) -> None:
        await self._operate("replay", projection)

    async def digest(self, projection: str) -> str:
        answer = json.loads(await self._operate("digest", projection, "--json"))
        assert answer["projection"] == projection
        return str(answer["digest"])

    async def verify(self) -> None:
        await self._operate("verify")

    def expects(self, rejection: Rejection) -> AbstractContextManager[Any]:
        return pytest.raises(CommandFailedError, match=rejection.words, check=lambda found: found.exit_code == 1)

    async def _operate(self, *arguments: str) -> bytes:
        """Standard output of an operator's command, which opens the parts themselves. Raises CommandFailedError."""
        return await asyncio.to_thread(lambda: _checked(run_command(self._product.settings, *arguments)))

    async def _run(self, *arguments: str | Path) -> bytes:
        """Standard output of a client's command. Raises CommandFailedError."""
        settings = self._product.settings if self._product.url is None else None
        return await asyncio.to_thread(lambda: _checked(run_command(settings, *arguments, url=self._product.url)))


@asynccontextmanager
async def cli_driver(product: Product) -> AsyncIterator[Driver]:
    """A driver for this product; its trees lie in a folder that goes when it is closed."""
    with tempfile.TemporaryDirectory(prefix="artifact-store-scenario-") as folder:
        yield CliDriver(product, Path(folder))


def _checked(done: subprocess.CompletedProcess[bytes]) -> bytes:
    if done.returncode != 0:
        raise CommandFailedError(done.returncode, done.stderr.decode())
    return done.stdout
