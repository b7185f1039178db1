"""The tables of the views, in SQLAlchemy Core: those that projections fill, and those with the projections' progress.

No column has a database default and no value is read from a server's clock: a view is a pure function of the log.
Identifiers are `Uuid`, times are integer µs since 1970 (UTC), metadata is JCS text, and the two digests of a file are
32 raw bytes each. Manifests and blobs are named by content addresses in text form. Text is ordered by its bytes
everywhere. `created_at` of a package or a file is the time of its event; that of a storage location is when its bytes
were stored.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, MetaData, Table, Text, Uuid
from sqlalchemy.types import TypeEngine

metadata = MetaData()

ONLY_INSERTED = {"only_inserted": True}
"""Marks a table that folds only insert into and never query: a rebuild loads it without any index."""


def _text() -> TypeEngine[str]:
    """Text in binary order: `C` on PostgreSQL; SQLite's default, BINARY, compares the UTF-8 bytes."""
    return Text().with_variant(Text(collation="C"), "postgresql")


artifact_packages = Table(
    "artifact_packages",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", _text(), nullable=False),
    Column("producer", _text(), nullable=False),
    Column("subject", _text(), nullable=False),
    Column("retention_class", _text(), nullable=False),
    Column("status", _text(), nullable=False),
    Column("metadata", _text(), nullable=False),
    Column("manifest_digest", _text()),
    Column("last_event_sequence", BigInteger, nullable=False),
    Column("created_by", _text(), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("finalized_at", BigInteger),
)
Index("artifact_packages_newest", artifact_packages.c.created_at, artifact_packages.c.id)
for _name in ("producer", "subject", "status", "retention_class"):
    Index(
        f"artifact_packages_by_{_name}",
        artifact_packages.c[_name],
        artifact_packages.c.created_at,
        artifact_packages.c.id,
    )
Index("artifact_packages_by_manifest", artifact_packages.c.manifest_digest)

artifact_files = Table(
    "artifact_files",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("package_id", Uuid, nullable=False),
    Column("relative_path", _text(), nullable=False),
    Column("media_type", _text(), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("blake3", LargeBinary(32), nullable=False),
    Column("sha256", LargeBinary(32), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    info=ONLY_INSERTED,
)
Index("artifact_files_by_path", artifact_files.c.package_id, artifact_files.c.relative_path, unique=True)

storage_locations = Table(
    "storage_locations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("artifact_file_id", Uuid, nullable=False),
    Column("backend_id", _text(), nullable=False),
    Column("content_address", _text(), nullable=False),
    Column("key", _text(), nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    info=ONLY_INSERTED,
)
Index("storage_locations_by_file", storage_locations.c.artifact_file_id)

artifact_manifests = Table(
    "artifact_manifests",
    metadata,
    Column("package_id", Uuid, primary_key=True),
    Column("digest", _text(), nullable=False),
    Column("manifest", LargeBinary),
    Column("manifest_key", _text()),
    info=ONLY_INSERTED,
)

retention_state = Table(
    "retention_state",
    metadata,
    Column("package_id", Uuid, primary_key=True),
    Column("retention_class", _text(), nullable=False),
    Column("retention_days", BigInteger),
    Column("counted_from", BigInteger, nullable=False),
    Column("retain_until", BigInteger),
    Column("last_event_sequence", BigInteger, nullable=False),
)
Index("retention_state_by_end", retention_state.c.retain_until)

usage_totals = Table(
    "usage_totals",
    metadata,
    Column("producer", _text(), primary_key=True),
    Column("retention_class", _text(), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("packages", BigInteger, nullable=False),
    Column("files", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)
"""`day` counts from 1970-01-01 (UTC)."""

usage_packages = Table(
    "usage_packages",
    metadata,
    Column("package_id", Uuid, primary_key=True),
    Column("producer", _text(), nullable=False),
    Column("retention_class", _text(), nullable=False),
    Column("last_event_sequence", BigInteger, nullable=False),
)

retention_classes = Table(
    "retention_classes",
    metadata,
    Column("name", _text(), primary_key=True),
    Column("days", BigInteger),
    Column("immutable", Boolean, nullable=False),
    Column("description", _text(), nullable=False),
)
"""Seeded configuration for people who read the tables; no fold reads it and no digest covers it."""

projection_generations = Table(
    "projection_generations",
    metadata,
    Column("projection", _text(), primary_key=True),
    Column("generation", Uuid, nullable=False),
    Column("layout", Integer, nullable=False),
    Column("log", Uuid),
)
"""The live generation of each projection; `log` is the log that it is folded from, null before the first event."""

projection_builds = Table(
    "projection_builds",
    metadata,
    Column("projection", _text(), primary_key=True),
    Column("generation", Uuid, nullable=False),
    Column("layout", Integer, nullable=False),
    Column("log", Uuid, nullable=False),
    Column("builder", _text(), nullable=False),
)
"""The generation that is being built beside a projection's live one; `builder` names who began or resumed it."""

projection_checkpoints = Table(
    "projection_checkpoints",
    metadata,
    Column("generation", Uuid, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("projection", _text(), nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("last_offset", BigInteger),
    Column("last_digest", LargeBinary(32)),
)
"""The checkpoints of each generation, written in one transaction with its rows; a missing partition is at its start.

`last_offset` and `last_digest` are the offset of the last folded record and the BLAKE3 of its bytes. A log that holds
another record there is not the log that the view was folded from, even if it has the same identity.
"""

parked_packages = Table(
    "parked_packages",
    metadata,
    Column("generation", Uuid, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("package", _text(), primary_key=True),
    Column("projection", _text(), nullable=False),
    Column("package_id", Uuid),
    Column("offset", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("cause", _text(), nullable=False),
)
"""Parked packages of each generation: from the record at `offset` on, `events` of the package's events wait in the log.

`package` is the package's id, or a text that stands for the record's key if it is not a package id. No digest covers
this table.
"""
Index("parked_packages_by_id", parked_packages.c.package_id)
