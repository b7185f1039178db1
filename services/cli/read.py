"""`packages`, `show`, `manifest`, `usage` and `tail`: reading the registry and its events."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import click

from services.cli.command import (
    answer,
    as_usage,
    common_options,
    find_package,
    invocation,
    package_id,
    remark,
    run,
    say,
    table,
)

if TYPE_CHECKING:
    from artifact_store.events import RecordedEvent
    from artifact_store.models import EventFilter, File, Package, PackageFilter
    from artifact_store.position import Position
    from artifact_store.registry import Order

_TOTALS = ("producer", "retention class", "day", "packages", "files", "bytes")
_COLUMNS = ("package", "status", "retention class", "created", "producer", "subject", "name")


@click.command()
@click.option("--producer", help="Only packages of this producer.")
@click.option("--subject", help="Only packages about this subject.")
@click.option("--status", type=click.Choice(["created", "finalized", "expired", "purged"]), help="Only in this state.")
@click.option("--retention-class", help="Only packages of this retention class.")
@click.option("--limit", type=click.IntRange(1), help="List at most this many.  [default: all]")
@common_options(shown=("url",))
def packages(
    producer: str | None, subject: str | None, status: str | None, retention_class: str | None, limit: int | None
) -> None:
    """List packages, newest first."""
    from artifact_store.models import PackageFilter

    run(_packages(PackageFilter(producer, subject, status, retention_class), limit))


async def _packages(where: PackageFilter, limit: int | None) -> None:
    from artifact_store.documents.shapes import PackageAnswer
    from artifact_store.models import MAX_PAGE, all_pages
    from services.registry import open_registry

    asked = invocation()
    left = limit or sys.maxsize
    async with open_registry(asked.settings()) as registry:
        pages = all_pages(lambda cursor: registry.list_packages(where, limit=min(left, MAX_PAGE), cursor=cursor))
        async for page in pages:
            if asked.as_json:
                for package in page.items:
                    say(PackageAnswer.of(package).model_dump_json())
            elif page.items:
                table(_COLUMNS, [_row(package) for package in page.items])
            left -= len(page.items)
            if not left:
                break


def _row(package: Package) -> tuple[object, ...]:
    from artifact_store.documents.times import to_text

    return (
        package.package_id,
        package.status,
        package.retention_class,
        to_text(package.created_at),
        package.producer,
        package.subject,
        package.name,
    )


@click.command()
@click.option("--producer", help="Only packages of this producer.")
@click.option("--retention-class", help="Only packages of this retention class.")
@common_options(shown=("url",))
def usage(producer: str | None, retention_class: str | None) -> None:
    """Show how many packages, files and bytes were received, by producer, retention class and day (UTC)."""
    run(_usage(producer, retention_class))


async def _usage(producer: str | None, retention_class: str | None) -> None:
    from artifact_store.documents.shapes import UsageAnswer
    from artifact_store.models import MAX_PAGE, all_pages
    from services.registry import open_registry

    asked = invocation()
    async with open_registry(asked.settings()) as registry:
        pages = all_pages(lambda cursor: registry.list_usage(producer, retention_class, limit=MAX_PAGE, cursor=cursor))
        async for page in pages:
            totals = [UsageAnswer.of(total) for total in page.items]
            if asked.as_json:
                for total in totals:
                    say(total.model_dump_json())
            elif totals:
                table(_TOTALS, [[getattr(total, name.replace(" ", "_")) for name in _TOTALS] for total in totals])


@click.command()
@click.argument("package", metavar="PACKAGE_ID|blake3:…")
@common_options(shown=("url",))
def show(package: str) -> None:
    """Show a package and its files."""
    run(_show(package))


async def _show(text: str) -> None:
    from artifact_store.documents.shapes import FileAnswer, PackageAnswer
    from artifact_store.models import MAX_PAGE, all_pages
    from services.registry import open_registry

    asked = invocation()
    async with open_registry(asked.settings()) as registry:
        package_id = await find_package(registry, text)
        package = PackageAnswer.of(await registry.get_package(package_id)).model_dump(mode="json")
        pages = all_pages(lambda cursor: registry.list_files(package_id, limit=MAX_PAGE, cursor=cursor))
        files = [file async for page in pages for file in page.items]
    if asked.as_json:
        answer({**package, "files": [FileAnswer.of(file).model_dump(mode="json") for file in files]})
        return
    answer(package)
    say("")
    table(("file", "bytes", "media type", "path"), [_file_row(file) for file in files])


def _file_row(file: File) -> tuple[object, ...]:
    return file.file_id, file.size_bytes, file.media_type, file.relative_path


@click.command()
@click.argument("package", metavar="PACKAGE_ID|blake3:…")
@click.option(
    "--format",
    "form",
    type=click.Choice(["cbor", "json"]),
    help="The form of the manifest.  [default: cbor; with --json, json]",
)
@common_options(shown=("url",))
def manifest(package: str, form: str | None) -> None:
    """Write a finalized package's manifest to standard output, byte for byte. CBOR is not written to a terminal."""
    form = form or ("json" if invocation().as_json else "cbor")
    if form == "cbor" and sys.stdout.isatty():
        raise click.UsageError(
            "the manifest is binary and this is a terminal: redirect the output, or use --format json"
        )
    run(_manifest(package, form))


async def _manifest(text: str, form: str) -> None:
    from services.registry import open_registry

    async with open_registry(invocation().settings()) as registry:
        package_id = await find_package(registry, text)
        data = await registry.get_manifest_bytes(package_id, "json" if form == "json" else "cbor")
    if sys.stdout.isatty():
        say(data.decode())
    else:
        click.echo(data, nl=False)


@click.command()
@click.option(
    "--since",
    metavar="POSITION|TIME|now",
    help="Begin after this POSITION, at this TIME (RFC 3339), or `now` at the log's end.",
)
@click.option("--package", metavar="PACKAGE_ID", help="Only events of this package.")
@click.option("--producer", multiple=True, help="Only events of packages of this producer; may be repeated.")
@click.option("--subject", multiple=True, help="Only events of packages about this subject; may be repeated.")
@click.option("--retention-class", multiple=True, help="Only events of packages of this class; may be repeated.")
@click.option("--type", "types", multiple=True, help="Only events of this type (v1.file.ingested); may be repeated.")
@click.option(
    "--order",
    type=click.Choice(["log", "time"]),
    default="log",
    help="`log`: as the partitions are read (default). `time`: by the events' times.",
)
@click.option("--follow", "-f", is_flag=True, help="Wait for more, until interrupted.")
@common_options(shown=("url",))
def tail(
    since: str | None,
    package: str | None,
    producer: tuple[str, ...],
    subject: tuple[str, ...],
    retention_class: tuple[str, ...],
    types: tuple[str, ...],
    order: Order,
    *,
    follow: bool,
) -> None:
    """Print events, in order per package. With --json each is one object per line and has its position."""
    from artifact_store.models import EventFilter

    if follow and order == "time":
        raise click.UsageError("--order time is only for events that the log holds now: leave out --follow")
    wanted = EventFilter(
        None if package is None else package_id(package),
        frozenset(producer),
        frozenset(subject),
        frozenset(retention_class),
        frozenset(types),
    )
    try:
        run(_tail(since, wanted, order, follow=follow))
    except KeyboardInterrupt:
        if not follow:  # an interrupt is the normal end of --follow
            raise


async def _tail(since: str | None, wanted: EventFilter, order: Order, *, follow: bool) -> None:
    from artifact_store.documents.event_lines import event_line
    from artifact_store.position import Position
    from artifact_store.registry import start_of
    from services.cli.standard_streams import end_as_interrupted
    from services.registry import open_registry

    asked = invocation()
    with as_usage():
        start = start_of(since)
    position = start if isinstance(start, Position) else None
    if follow:
        end_as_interrupted()
    try:
        async with open_registry(asked.settings()) as registry:
            async for event in registry.read_events(since, where=wanted, follow=follow, order=order):
                position = event.position
                say(event_line(event).decode() if asked.as_json else _event_text(event))
    except asyncio.CancelledError:
        _say_where_to_go_on(position)
        raise
    _say_where_to_go_on(position)


def _say_where_to_go_on(position: Position | None) -> None:
    if position is not None and not invocation().as_json:
        remark(f"to continue from here: --since {position}")


def _event_text(event: RecordedEvent) -> str:
    from artifact_store.documents.times import to_text

    return "  ".join(
        (to_text(event.created_at), str(event.package_id), f"{event.sequence:>6}", event.event_type, _about(event))
    )


def _about(event: RecordedEvent) -> str:
    from artifact_store.events import FileIngested, PackageCreated, PackageFinalized

    match event.payload:
        case PackageCreated(name=name, retention_class=kept):
            return f"{name} ({kept})"
        case FileIngested(relative_path=path, size_bytes=size):
            return f"{path} ({size:,} bytes)"
        case PackageFinalized(file_count=count, total_bytes=total):
            return f"blake3:{event.payload_digest.hex()} ({count:,} files, {total:,} bytes)"
    return ""
