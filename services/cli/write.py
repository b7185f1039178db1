"""`add` and `finalize`: writing into a package that is open, one step at a time."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from services.cli.output import answer, transfer_progress, unportable
from services.cli.piped import named_pipe, standard_input
from services.cli.root import run
from services.cli.settings import common_options, invocation

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from services.config import Settings
    from services.core.commands import Acknowledgement

_STANDARD_INPUT = Path("-")

_ACTOR = click.option("--actor", default="anonymous", show_default=True, help="Who does it.")


@click.command()
@click.argument("package", metavar="PACKAGE_ID")
@click.argument("file", metavar="FILE|-", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--path", "relative_path", help="Its path in the package; the file's name when it is not given.")
@click.option("--media-type", help="Its media type; guessed from the path when it is not given.")
@_ACTOR
@common_options(shown=("url",))
def add(package: str, file: Path, *, relative_path: str | None, media_type: str | None, actor: str) -> None:
    """Add one file to a package that is open; `-` reads it from standard input, and a pipe is read to its end."""
    from services.cli.addressing import package_id
    from services.core.content_address import ContentAddress

    if relative_path is None:
        if file == _STANDARD_INPUT:
            raise click.UsageError("standard input has no name: --path says where it goes")
        relative_path = file.name
    done = run(_add(invocation().settings(), package_id(package), file, relative_path, media_type, actor))
    stored = done.files[0]
    answer(
        {
            "file_id": str(stored.file_id),
            "content_address": ContentAddress.of_digest(stored.blake3),
            "size_bytes": stored.size_bytes,
            "sequence": done.sequence,
        }
    )


async def _add(
    settings: Settings, package: UUID, file: Path, relative_path: str, media_type: str | None, actor: str
) -> Acknowledgement:
    from artifact_store.client.bodies import CountedSource, FileSource, FileStamp
    from services.blobs.port import Declared
    from services.media_types import guess_media_type
    from services.registry import open_registry

    with transfer_progress("add") as progress:
        body: AsyncIterable[bytes]
        declared = Declared()
        if file == _STANDARD_INPUT:
            body = standard_input()
        else:
            found = await asyncio.to_thread(file.stat)
            if stat.S_ISREG(found.st_mode):
                stamp = FileStamp.of(found)
                progress.expect(1, stamp.size_bytes)
                body = CountedSource(FileSource(await asyncio.to_thread(file.resolve), stamp), progress.advance)
                declared = Declared(size_bytes=stamp.size_bytes)
            else:
                body = named_pipe(file)
        async with open_registry(settings) as registry:
            return await registry.ingest(
                package,
                relative_path,
                media_type or guess_media_type(relative_path),
                body,
                actor,
                declared=declared,
            )


@click.command()
@click.argument("package", metavar="PACKAGE_ID")
@_ACTOR
@common_options(shown=("url",))
def finalize(package: str, *, actor: str) -> None:
    """Freeze a package that is open; prints the content address of its manifest."""
    from services.cli.addressing import package_id
    from services.core.content_address import ContentAddress

    done = run(_finalize(invocation().settings(), package_id(package), actor))
    manifest = None if done.manifest_digest is None else ContentAddress.of_digest(done.manifest_digest)
    answer(
        {
            "package_id": str(done.package_id),
            "manifest_digest": manifest,
            "sequence": done.sequence,
            **unportable(done.unportable_count, done.unportable_paths),
        }
    )


async def _finalize(settings: Settings, package: UUID, actor: str) -> Acknowledgement:
    from services.registry import open_registry

    async with open_registry(settings) as registry:
        return await registry.finalize(package, actor)
