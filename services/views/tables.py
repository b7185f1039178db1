"""The tables of the views, in SQLAlchemy Core: what the projections fill, and what keeps account of them.

No column has a database default and no value is read from a server's clock: a view is a pure function of the log.
Identifiers are `Uuid`, times integer µs since 1970 (UTC), metadata its JCS text, the two digests of a file 32 raw bytes
each; what names a document or a blob is a content address, as people write it. Text collates by its bytes everywhere. A
package and a file are created when their event was written, a storage location when its bytes were stored.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, MetaData, Table, Text, Uuid
from sqlalchemy.types import TypeEngine

metadata = MetaData()

ONLY_INSERTED = {"only_inserted": True}
"""Marks a table that folds insert into and never look anything up in: a rebuild loads it without any index."""


def _text() -> TypeEngine[str]:
    """Text in binary order: `C` on PostgreSQL; on SQLite the default, BINARY, compares the bytes of UTF-8."""
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
"""Seeded configuration, for people who read the tables; no fold reads it and no digest covers it."""

projection_generations = Table(
    "projection_generations",
    metadata,
    Column("projection", _text(), primary_key=True),
    Column("generation", Uuid, nullable=False),
    Column("layout", Integer, nullable=False),
    Column("log", Uuid),
)
"""The live build of each projection's tables; `log` is the log that it is folded from, null before the first event."""

projection_builds = Table(
    "projection_builds",
    metadata,
    Column("projection", _text(), primary_key=True),
    Column("generation", Uuid, nullable=False),
    Column("layout", Integer, nullable=False),
    Column("log", Uuid, nullable=False),
    Column("builder", _text(), nullable=False),
)
"""The generation that is built beside a projection's live one, if any; `builder` says who began or resumed it."""

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
"""How far a generation has come, written with its rows in one transaction; an absent partition stands at its start.

`last_offset` and `last_digest` name the last record that was folded and the BLAKE3 of its bytes: a log that holds
another one there is not the one that the view was folded from, whatever it calls itself.
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
"""Packages that a generation could not follow: from the record at `offset` on, `events` of theirs wait in the log.

`package` is the package's id, or stands for a record's key where that names none. No digest covers it.
"""
Index("parked_packages_by_id", parked_packages.c.package_id)
