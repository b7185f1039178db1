"""`push` and `pull` transfer whole trees; `add` and `finalize` fill and freeze an open package."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from services.cli.command import (
    ACTOR,
    answer,
    common_options,
    invocation,
    metadata_of,
    package_id,
    package_or_address,
    remark,
    run,
    transfer_progress,
    unportable,
)
from services.cli.standard_streams import end_as_interrupted, named_pipe, standard_input

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from artifact_store import Pulled, Pushed
    from artifact_store.models import Acknowledgement
    from artifact_store.transfers.push import PushState
    from services.config import Settings


_CONCURRENCY = click.option(
    "--concurrency",
    type=click.IntRange(1, 128),
    default=16,
    show_default=True,
    help="How many files to transfer at the same time.",
)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What the package is called.")
@click.option("--producer", required=True, help="Who makes it.")
@click.option("--subject", required=True, help="What it is about.")
@click.option(
    "--retention-class", required=True, help="Which rule says how long it is kept: report, raw-evidence, scratch …"
)
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Metadata, as text; may be repeated.")
@click.option("--metadata-json", metavar="JSON|FILE", help="Metadata as a JSON object, or a file that holds one.")
@ACTOR
@click.option("--no-finalize", is_flag=True, help="Leave the package open, for `add` and `finalize`.")
@click.option("--new", "fresh", is_flag=True, help="Start a new package, even if an equal push was interrupted.")
@_CONCURRENCY
@common_options(shown=("url",))
def push(
    path: Path,
    metadata: tuple[str, ...],
    metadata_json: str | None,
    *,
    no_finalize: bool,
    fresh: bool,
    concurrency: int,
    actor: str | None,
    **about: str,
) -> None:
    """Create a package, stream the file or tree at PATH into it, and finalize it.

    Paths in the package are relative to PATH. Links to files inside the tree are followed, others are refused. Empty
    folders, owners and modes are not kept. Run an interrupted push again, and it continues where it stopped.
    """
    from services.identity.actors import actor_here

    settings = invocation().settings()
    described = {**about, "actor": actor_here(settings, actor), "metadata": metadata_of(metadata, metadata_json)}
    done = run(
        _push(settings, path.absolute(), described, finalize=not no_finalize, fresh=fresh, concurrency=concurrency),
        many_bytes=True,
    )
    answer(
        {
            "package_id": str(done.package_id),
            "manifest_digest": done.manifest_digest,
            "sequence": done.sequence,
            "files": done.files,
            "bytes": done.size_bytes,
            **unportable(done.unportable_count, done.unportable_paths),
        }
    )


async def _push(
    settings: Settings, path: Path, about: dict[str, Any], *, finalize: bool, fresh: bool, concurrency: int
) -> Pushed:
    from artifact_store import push as push_tree
    from artifact_store.errors import ArtifactStoreError
    from artifact_store.transfers.push import default_folder, push_state
    from artifact_store.transfers.tree import walk
    from services.registry import open_registry
    from services.runtime.processes import collect_rarely

    end_as_interrupted()
    collect_rarely()
    identity = {
        **about,
        "to": settings.url or settings.log_url,
        "in": "" if settings.url else os.fsencode(os.getcwd()).hex(),  # noqa: PTH109 - as bytes: a name may be no text
        "path": os.fsencode(path).hex(),
        "finalize": finalize,
    }
    with push_state(default_folder(), identity, fresh=fresh) as state, ThreadPoolExecutor(1) as beside:
        if state.resumed:
            remark("an equal push was interrupted: continuing with its package (--new starts a new one)")
        walking = beside.submit(walk, path)  # while the client loads
        try:
            async with open_registry(settings) as registry:
                files = await asyncio.wrap_future(walking)
                with transfer_progress("push") as progress:
                    return await push_tree(
                        registry,
                        path,
                        **about,
                        files=files,
                        finalize=finalize,
                        concurrency=concurrency,
                        state=state,
                        progress=progress,
                    )
        except (ArtifactStoreError, OSError, asyncio.CancelledError):  # cancelled: by Ctrl-C
            _say_how_to_go_on(state)
            raise


def _say_how_to_go_on(state: PushState) -> None:
    if not state.began:
        return
    if state.kept:
        remark("the package stays open; run the same command again to continue (--new starts a new one)")
    else:
        remark("the package stays open; the push cannot be resumed, because its state could not be saved")


@click.command()
@click.argument("package", metavar="PACKAGE_ID|blake3:…")
@click.argument("destination", metavar="DEST", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace existing files that differ.")
@click.option("--rename", is_flag=True, help="If a file's PATH is also a folder of other files, write it as PATH.file.")
@_CONCURRENCY
@common_options(shown=("url",))
def pull(package: str, destination: Path, *, force: bool, rename: bool, concurrency: int) -> None:
    """Download a package into the folder DEST and verify every byte against its manifest.

    Files that exist already with the same bytes are kept, so an interrupted pull can be run again.
    """
    from artifact_store.rules import MAX_PAIRS

    settings = invocation().settings()
    done = run(_pull(settings, package, destination, force=force, rename=rename, concurrency=concurrency))
    if read := done.read_by_programs:
        shown = ", ".join(map(repr, read[:MAX_PAIRS])) + (
            f" and {len(read) - MAX_PAIRS:,} more" if read[MAX_PAIRS:] else ""
        )
        remark(
            f"warning: programs that run in {str(destination)!r} read files from the package and may run commands "
            f"that these contain: {shown}"
        )
    answer(
        {
            "package_id": str(done.package_id),
            "manifest_digest": done.manifest_digest,
            "files": done.files,
            "bytes": done.size_bytes,
            "kept": done.kept,
            **({"renamed": dict(done.renamed)} if done.renamed else {}),
            **({"read_by_programs": list(read)} if read else {}),
        }
    )


async def _pull(
    settings: Settings, package: str, destination: Path, *, force: bool, rename: bool, concurrency: int
) -> Pulled:
    from artifact_store import pull as pull_package
    from services.registry import open_registry
    from services.runtime.processes import collect_rarely

    end_as_interrupted()
    collect_rarely()
    which = package_or_address(package)
    async with open_registry(settings) as registry:
        with transfer_progress("pull") as progress:
            return await pull_package(
                registry,
                which,
                destination,
                force=force,
                rename=rename,
                concurrency=concurrency,
                progress=progress,
            )


_STANDARD_INPUT = Path("-")


@click.command()
@click.argument("package", metavar="PACKAGE_ID")
@click.argument("file", metavar="FILE|-", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--path", "relative_path", help="Its path in the package.  [default: the file's name]")
@click.option("--media-type", help="Its media type.  [default: guessed from the path]")
@ACTOR
@common_options(shown=("url",))
def add(package: str, file: Path, *, relative_path: str | None, media_type: str | None, actor: str | None) -> None:
    """Add one file to an open package. `-` reads standard input, and a named pipe is read to its end."""
    from artifact_store.manifest import ContentAddress

    if relative_path is None:
        if file == _STANDARD_INPUT:
            raise click.UsageError("standard input has no name: give its path in the package with --path")
        relative_path = file.name
    from services.identity.actors import actor_here

    settings = invocation().settings()
    acting = actor_here(settings, actor)
    done = run(_add(settings, package_id(package), file, relative_path, media_type, acting))
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
    from artifact_store.media_types import guess_media_type
    from artifact_store.models import Declared
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
@ACTOR
@common_options(shown=("url",))
def finalize(package: str, *, actor: str | None) -> None:
    """Freeze an open package, and print the content address of its manifest."""
    from artifact_store.manifest import ContentAddress
    from services.identity.actors import actor_here

    settings = invocation().settings()
    done = run(_finalize(settings, package_id(package), actor_here(settings, actor)))
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
