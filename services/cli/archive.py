"""`log export`, `import`, `check`, `position`, `copy` and `compare`: archives and copies of logs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from services.cli.command import ProgressLine, answer, common_options, invocation, package_id, run, say
from services.cli.repair import log
from services.cli.standard_streams import end_as_interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from artifact_store.position import Position
    from services.archive.export import Progress, Tell
    from services.blobs.port import BlobStore
    from services.config import Settings
    from services.log.port import Log

__all__ = ["log"]

_FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_PLACE = re.compile(r"(\d{1,9}):(\d{1,18})")


@log.command("export")
@_FILE
@click.option("--package", "packages", metavar="ID", multiple=True, help="Only this package; may be repeated.")
@click.option("--blobs", is_flag=True, help="Include the bytes that the events name.")
@common_options(shown=("log_url", "blobs_url"))
def export(file: Path, packages: Sequence[str], *, blobs: bool) -> None:
    """Write the log, as it is now, to the new archive FILE.

    The export checks each package's chain of events. Gateways may run meanwhile. An interrupted export leaves FILE.part
    and no FILE; the next one starts from the beginning.
    """
    found = run(_export(file, [package_id(package) for package in packages], blobs=blobs))
    answer({"file": str(file), "bytes": file.stat().st_size, **found})


@log.command("import")
@_FILE
@click.option("--blobs", is_flag=True, help="Put the archive's bytes into the blob store as well.")
@common_options(shown=("log_url", "blobs_url", "kafka_partitions"))
def import_(file: Path, *, blobs: bool) -> None:
    """Fill an empty log with the archive FILE.

    The log and the blob store are created if they are missing. The log may be of another kind than the exported one, or
    have another number of partitions; its views get the same digests. A damaged archive, or a log that holds anything
    else, is refused before anything is written. Run an interrupted import again to continue it.
    """
    answer({"file": str(file), **run(_import(file, blobs=blobs))})


@log.command("check")
@_FILE
@common_options()
def check(file: Path) -> None:
    """Check an archive: every byte, every event, and the chain of every package."""
    answer({"file": str(file), **run(_check(file))})


@log.command("position")
@_FILE
@click.argument("positions", metavar="POSITION...", nargs=-1, required=True)
@common_options(shown=("log_url",))
def position(file: Path, positions: Sequence[str]) -> None:
    """Translate positions of the exported log into positions of the log that FILE was imported into.

    A reader that continues there misses nothing. POSITION is the position of an event, or a Kafka consumer's offsets by
    partition: 0:120,1:77,2:98.
    """
    for before, found in zip(positions, run(_translate(file, positions)), strict=True):
        offsets = ",".join(f"{p}:{offset}" for p, offset in sorted(found.offsets.items()))
        answer({"before": before, "position": str(found), "offsets": offsets}, f"{found}\t{offsets}")


@log.command("copy")
@click.argument("source")
@click.argument("target")
@click.option("--skip", "skips", metavar="PARTITION:OFFSET", multiple=True, help="Leave out this record of SOURCE.")
@common_options(shown=("log_url", "kafka_partitions", "kafka_options"))
def copy(source: str, target: str, skips: Sequence[str]) -> None:
    """Copy the records of one topic to another, with their partitions, keys, values, headers, times and order.

    SOURCE and TARGET are log URLs (kafka://HOST:PORT/PREFIX), or just a PREFIX on the brokers of
    ARTIFACT_STORE_LOG_URL. The target is created if it is missing. It must be empty, or hold the beginning of the same
    copy. Run the command again to continue a copy that was interrupted, or whose source has grown.
    """
    answer(run(_copy(source, target, [_place(skip, "--skip") for skip in skips])))


@log.command("compare")
@click.argument("source")
@click.argument("target")
@click.option("--skip", "skips", metavar="PARTITION:OFFSET", multiple=True, help="`log copy` left out this record.")
@common_options(shown=("log_url", "kafka_options"))
def compare(source: str, target: str, skips: Sequence[str]) -> None:
    """Check that every partition of TARGET is a copy of the beginning of SOURCE. Exit code 1 if one is not.

    Events that a mirror has repeated are skipped and counted. SOURCE and TARGET are named as for `log copy`.
    """
    found = run(_compare(source, target, [_place(skip, "--skip") for skip in skips]))
    if invocation().as_json:
        answer(found)
    else:
        say(
            f"the target holds the first {found['records'] - found['missing']:,} of {found['records']:,} records "
            f"of the source; {found['missing']:,} are missing at the end, {found['repeated']:,} are repeated"
        )


async def _export(file: Path, packages: Sequence[UUID], *, blobs: bool) -> dict[str, Any]:
    end_as_interrupted()
    from artifact_store.position import Position
    from services.archive import export_log

    async with _log_and_blobs(blobs=blobs) as (opened, store):
        with _progress() as tell:
            done = await export_log(opened, file, packages=packages or None, blobs=store, progress=tell)
    end = Position(done.log, done.end)
    return {**done.as_json(), "position": str(end)}


async def _import(file: Path, *, blobs: bool) -> dict[str, Any]:
    end_as_interrupted()
    from services.archive import Archive, import_archive
    from services.wiring import open_filler

    async with _log_and_blobs(blobs=blobs) as (opened, store):
        filler = open_filler(invocation().settings(), opened)
        try:
            with Archive(file) as archive, _progress() as tell:
                done = await import_archive(archive, opened, filler, blobs=store, progress=tell)
        finally:
            await filler.close()
    return {
        "log": str(done.log),
        "partitions": done.partitions,
        "events": done.events,
        "resumed": done.resumed,
        "blobs": done.blobs if blobs else None,
        "position": str(done.end),
        "digest": archive.contents.digest.hex(),
    }


async def _check(file: Path) -> dict[str, Any]:
    end_as_interrupted()
    from services.archive import Archive, check_archive

    with Archive(file) as archive, _progress() as tell:
        await check_archive(archive, tell)
    return archive.contents.as_json()


async def _translate(file: Path, positions: Sequence[str]) -> list[Position]:
    from services.archive import Archive, translate

    async with _log_and_blobs(blobs=False) as (opened, _):
        with Archive(file) as archive:
            wanted = [_position(text, archive.contents.log) for text in positions]
            return await translate(archive, opened, wanted)


def _place(text: str, hint: str) -> tuple[int, int]:
    """Partition and offset. Raises click.BadParameter."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text[:80]!r} is not of the form PARTITION:OFFSET", param_hint=hint)
    return int(found[1]), int(found[2])


def _position(text: str, log: UUID) -> Position:
    from artifact_store.position import Position

    if ":" in text:
        return Position(log, dict(_place(part, "POSITION") for part in text.split(",")))
    return Position.parse(text)


async def _copy(source: str, target: str, skips: Sequence[tuple[int, int]]) -> dict[str, Any]:
    end_as_interrupted()
    from services.archive import copy_log
    from services.wiring import open_filler

    async with _pair(source, target) as (original, copied, settings):
        filler = open_filler(settings, copied)
        try:
            with _progress() as tell:
                done = await copy_log(original, copied, filler, skip=frozenset(skips), progress=tell)
        finally:
            await filler.close()
    return {"log": str(done.log), "records": done.records, "resumed": done.resumed, "skipped": done.skipped}


async def _compare(source: str, target: str, skips: Sequence[tuple[int, int]]) -> dict[str, Any]:
    from services.archive import compare_logs

    async with _pair(source, target) as (original, copied, _):
        found = await compare_logs(original, copied, skip=frozenset(skips))
    return {"records": found.records, "missing": found.missing, "repeated": found.repeated}


@asynccontextmanager
async def _log_and_blobs(*, blobs: bool) -> AsyncIterator[tuple[Log, BlobStore | None]]:
    from services.wiring import open_blobs, open_log

    settings = invocation().settings()
    async with AsyncExitStack() as stack:
        opened = open_log(settings)
        stack.push_async_callback(opened.close)
        store = open_blobs(settings) if blobs else None
        if store is not None:
            stack.push_async_callback(store.close)
        yield opened, store


@asynccontextmanager
async def _pair(source: str, target: str) -> AsyncIterator[tuple[Log, Log, Settings]]:
    """Both logs, and the settings of the second."""
    from services.wiring import open_log

    settings = invocation().settings()
    first, second = (replace(settings, log_url=_log_url(name, settings)) for name in (source, target))
    async with AsyncExitStack() as stack:
        logs = []
        for each in (first, second):
            logs.append(open_log(each))
            stack.push_async_callback(logs[-1].close)
        yield logs[0], logs[1], second


def _log_url(name: str, settings: Settings) -> str:
    found = name if "://" in name else f"{settings.log_url.rpartition('/')[0]}/{name}"
    if not found.startswith("kafka://"):
        raise click.UsageError(
            "only topics are copied, and ARTIFACT_STORE_LOG_URL does not name one: for a log in a file, use "
            "`log export` and `log import`"
        )
    return found


@contextmanager
def _progress() -> Iterator[Tell]:
    """Show progress on standard error."""
    doing = ""
    with closing(ProgressLine()) as line:

        def tell(seen: Progress) -> None:
            nonlocal doing
            before, doing = doing, seen.doing
            of = "" if seen.total is None else f" of {seen.total:,}"
            line.tell(lambda: f"{seen.doing}: {seen.done:,}{of}", at_once=doing != before)

        yield tell
