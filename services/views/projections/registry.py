"""The registry: packages, files, where their bytes lie, and manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Table, bindparam, update
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.events import Event, FileIngested, PackageCreated, PackageFinalized
from services.core.content_address import ContentAddress
from services.core.state import CREATED, FINALIZED
from services.errors import CorruptError
from services.views.bulk import Row, insert_rows
from services.views.projections.order import check_follows, known_packages
from services.views.projections.port import Tables
from services.views.tables import artifact_files, artifact_manifests, artifact_packages, storage_locations


@dataclass(slots=True)
class _Change:
    """What a batch makes of one package. `created` is set for a package that the batch itself begins."""

    last_sequence: int
    status: str
    created: Event | None = None
    manifest_digest: str | None = None
    finalized_at: int | None = None


class RegistryProjection:
    """`artifact_packages`, `artifact_files`, `storage_locations`, `artifact_manifests`."""

    name = "registry"
    layout = 1
    tables: Sequence[Table] = (artifact_packages, artifact_files, storage_locations, artifact_manifests)

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Event]) -> None:
        """As `Projection.fold`: a few statements a batch, however many events there are."""
        packages = tables["artifact_packages"]
        columns = (packages.c.last_event_sequence, packages.c.status)
        known = await known_packages(connection, packages.c.id, columns, events)
        changes = {package_id: _Change(*found) for package_id, found in known.items()}
        files: list[Row] = []
        locations: list[Row] = []
        manifests: list[Row] = []
        for event in events:
            change = _follow(changes, event)
            match event.payload:
                case FileIngested():
                    files.append(_file(event, event.payload))
                    locations.append(_location(event.payload))
                case PackageFinalized():
                    digest = ContentAddress.of_digest(event.payload_digest)
                    change.status, change.manifest_digest, change.finalized_at = FINALIZED, digest, event.created_at
                    manifests.append((event.package_id, digest, event.payload.manifest, event.payload.manifest_key))
        await insert_rows(connection, packages, [_package(c.created, c) for c in changes.values() if c.created])
        await insert_rows(connection, tables["artifact_files"], files)
        await insert_rows(connection, tables["storage_locations"], locations)
        await insert_rows(connection, tables["artifact_manifests"], manifests)
        known_before = {package_id: change for package_id, change in changes.items() if not change.created}
        await _update(connection, packages, known_before)


def _follow(changes: dict[UUID, _Change], event: Event) -> _Change:
    change = changes.get(event.package_id)
    check_follows(event, change.last_sequence if change else 0)
    if change is None:
        change = changes[event.package_id] = _Change(0, CREATED, event)
    if change.status != CREATED:
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} ({event.event_type}) follows its finalization"
        )
    change.last_sequence = event.sequence
    return change


def _package(event: Event, change: _Change) -> Row:
    created = event.payload
    if not isinstance(created, PackageCreated):  # `check_follows` has seen to it
        raise CorruptError(f"package {event.package_id} begins with {event.event_type}")
    return (
        event.package_id,
        created.name,
        created.producer,
        created.subject,
        created.retention_class,
        change.status,
        created.metadata,
        change.manifest_digest,
        change.last_sequence,
        event.actor,
        event.created_at,
        change.finalized_at,
    )


def _file(event: Event, file: FileIngested) -> Row:
    return (
        file.file_id,
        event.package_id,
        file.relative_path,
        file.media_type,
        file.size_bytes,
        file.blake3,
        file.sha256,
        event.created_at,
    )


def _location(file: FileIngested) -> Row:
    receipt = file.receipt
    return (
        receipt.location_id,
        file.file_id,
        receipt.backend_id,
        ContentAddress.of_digest(file.blake3),
        receipt.key,
        receipt.offset,
        receipt.length,
        receipt.stored_at,
    )


async def _update(connection: AsyncConnection, packages: Table, changes: dict[UUID, _Change]) -> None:
    """Bring the packages that earlier batches began up to date: one prepared statement for each kind of change."""
    row = update(packages).where(packages.c.id == bindparam("package"))
    advanced = [
        {"package": package_id, "last_event_sequence": change.last_sequence}
        for package_id, change in changes.items()
        if change.status == CREATED
    ]
    if advanced:
        await connection.execute(row.values(last_event_sequence=bindparam("last_event_sequence")), advanced)
    finalized = [
        {
            "package": package_id,
            "last_event_sequence": change.last_sequence,
            "status": change.status,
            "manifest_digest": change.manifest_digest,
            "finalized_at": change.finalized_at,
        }
        for package_id, change in changes.items()
        if change.status != CREATED
    ]
    if finalized:
        await connection.execute(
            row.values({name: bindparam(name) for name in finalized[0] if name != "package"}), finalized
        )
