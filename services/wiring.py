"""Wiring: the only place that chooses adapters, by the URLs in the settings."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from artifact_store.registry import Registry
from artifact_store.rules import is_loopback
from services.config import Settings
from services.core.decide import Limits
from services.log.port import CommandWriter, Log, LogFiller, PutManifest, SnapshotStore, TimedStore
from services.runtime.clock import Clock, system_clock

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from services.blobs.port import BlobStore
    from services.identity.audit import Audit
    from services.registry.direct import DirectRegistry
    from services.views.database import Views

# Adapters are imported where they are chosen: loading all of them takes longer than most commands run.

__all__ = [
    "Parts",
    "limits_of",
    "open_blobs",
    "open_filler",
    "open_log",
    "open_views",
    "open_writer",
    "parts",
    "registry",
]

_log = logging.getLogger(__name__)

_SQLITE = "sqlite:///"
_FORMS = "sqlite:///PATH or kafka://host:port[,host:port]/PREFIX"


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a gateway works with. `parts` opens and closes it."""

    settings: Settings
    log: Log
    writer: CommandWriter
    blobs: BlobStore
    views: Views
    registry: DirectRegistry
    metrics: CollectorRegistry
    """The registry in which the parts show their metrics."""
    audit: Audit


def limits_of(settings: Settings) -> Limits:
    """The limits that `decide` enforces."""
    return Limits(
        max_file_bytes=settings.max_file_bytes,
        max_files_per_package=settings.max_files_per_package,
        max_metadata_bytes=settings.max_metadata_bytes,
    )


def is_embedded(settings: Settings) -> bool:
    """Whether the log is a file on this machine. Raises ConfigurationError if the log URL has no known form."""
    scheme = settings.log_url.partition("://")[0]  # URL libraries cannot parse a list of brokers
    if scheme not in ("sqlite", "kafka"):
        raise ConfigurationError(f"ARTIFACT_STORE_LOG_URL has no known form; accepted are {_FORMS}")
    return scheme == "sqlite"


def open_log(settings: Settings) -> Log:
    """The log that `settings.log_url` names. Does not connect yet. Raises ConfigurationError."""
    if is_embedded(settings):
        from services.log.sqlite import SqliteLog

        return SqliteLog(_sqlite_path(settings))
    from services.log.kafka import KafkaLog

    _require_tls(
        settings, "kafka", _kafka_is_private(settings), "set security.protocol in ARTIFACT_STORE_KAFKA_OPTIONS"
    )
    if settings.schema_registry_url is not None:
        private = _is_private(settings.schema_registry_url)
        _require_tls(settings, "schema-registry", private, "begin ARTIFACT_STORE_SCHEMA_REGISTRY_URL with https://")
    return KafkaLog(settings)


def open_filler(settings: Settings, log: Log) -> LogFiller:
    """The filler that copies records from elsewhere into `log`, which `open_log` opened with the same settings."""
    if is_embedded(settings):
        from services.log.sqlite import SqliteFiller

        return SqliteFiller(_sqlite_path(settings))
    from services.log.kafka import KafkaFiller, KafkaLog

    if not isinstance(log, KafkaLog):
        raise TypeError("the log is not that of the settings")
    return KafkaFiller(log)


def open_blobs(settings: Settings, clock: Clock = system_clock) -> BlobStore:
    """The blob store that `settings.blobs_url` names; its clock is compared with `clock`.

    Does not connect yet. Raises ConfigurationError.
    """
    from services.blobs import open as blobs

    private = _is_private(settings.blobs_url, "s3+http:")
    _require_tls(settings, "s3", private, "begin ARTIFACT_STORE_BLOBS_URL with s3://")
    private = _is_private(settings.s3_public_url or "")
    _require_tls(settings, "s3", private, "begin ARTIFACT_STORE_S3_PUBLIC_URL with https:")
    return blobs.open_blobs(settings, clock)


def open_views(settings: Settings) -> Views:
    """The views that `settings.views_url` names. Does not connect yet. Raises ConfigurationError.

    It is also raised if the URL names the log's file: the views would write to it without the log's lock (see
    `write_lock`).
    """
    from services.views.database import Views

    views = Views(settings.views_url)
    _require_tls(
        settings, "postgresql", views.is_private, "end ARTIFACT_STORE_VIEWS_URL in ?ssl=require, or in nothing"
    )
    if views.dialect == "sqlite" and settings.log_url.startswith(_SQLITE):
        path = Path(str(views.engine.url.database))
        if path.resolve() == Path(settings.log_url.removeprefix(_SQLITE)).resolve():
            raise ConfigurationError(
                f"ARTIFACT_STORE_LOG_URL and ARTIFACT_STORE_VIEWS_URL name one file, {path}; "
                "give the views a file of their own"
            )
    return views


@asynccontextmanager
async def open_writer(
    settings: Settings,
    log: Log,
    put_manifest: PutManifest,
    *,
    clock: Clock = system_clock,
    snapshots: SnapshotStore | None = None,
    times: TimedStore | None = None,
    metrics: CollectorRegistry | None = None,
    audit: Audit | None = None,
    checks: Mapping[str, Callable[[], Awaitable[None]]] | None = None,
) -> AsyncIterator[CommandWriter]:
    """The log's writer, started. With Kafka, it is a member of the group of writers, with its internal listener.

    A Kafka writer stores snapshots of its state in `snapshots`, and restores from them if it has no state. It writes
    nothing while its clock differs much from that of `times`. It shows its metrics in `metrics`, and records in `audit`
    what the internal listener refused and what operators confirmed. It runs `checks`, of `blobs` and `views`, to report
    the state of its process to operators.
    """
    if is_embedded(settings):
        from services.log.sqlite import SqliteWriter

        writer: CommandWriter = SqliteWriter(
            _sqlite_path(settings), limits=limits_of(settings), put_manifest=put_manifest, clock=clock
        )
        await writer.start()
        try:
            yield writer
        finally:
            await writer.close()
        return
    from ingest_gateway.peers.membership import kafka_writer  # in the gateway, because commands are forwarded over HTTP

    async with kafka_writer(
        settings,
        log,
        limits=limits_of(settings),
        put_manifest=put_manifest,
        clock=clock,
        snapshots=snapshots,
        times=times,
        metrics=metrics,
        audit=audit,
        checks=checks,
    ) as owned:
        yield owned


@asynccontextmanager
async def parts(
    settings: Settings, *, clock: Clock = system_clock, metrics: CollectorRegistry | None = None
) -> AsyncIterator[Parts]:
    """Open every part and the registry on them. Creates the embedded parts if they are missing.

    They show their metrics in `metrics`, by default a new registry.

    Raises:
        ConfigurationError: settings that cannot work. UnavailableError: an embedded part cannot be opened.
    """
    from artifact_store.byte_streams import from_any
    from artifact_store.manifest import manifest_digest
    from artifact_store.models import Declared
    from services.identity.audit import Audit
    from services.registry.direct import DirectRegistry
    from services.runtime.metrics import new_registry
    from services.views.engine.apply import catch_up
    from services.views.projections import PROJECTIONS
    from services.views.queries import Queries

    async with AsyncExitStack() as stack:
        blobs = open_blobs(settings, clock)
        stack.push_async_callback(blobs.close)
        views = open_views(settings)
        stack.push_async_callback(views.close)
        log = open_log(settings)
        stack.push_async_callback(log.close)
        embedded = is_embedded(settings)
        if embedded:
            await log.migrate()
            await blobs.migrate()
            try:
                await views.migrate()
            except UnavailableError as error:
                if views.dialect == "sqlite":
                    raise
                # A separate database may be down: writes do not need it, and reads report the error.
                _log.warning("the views cannot be reached: %s", error.detail)

        # Slow clients hold memory and connections of the other blob store client: manifests must not wait for them.
        manifests = open_blobs(settings)
        stack.push_async_callback(manifests.close)

        async def put_manifest(manifest: bytes) -> None:
            digest = await asyncio.to_thread(manifest_digest, manifest)
            declared = Declared(size_bytes=len(manifest), blake3=digest)
            await manifests.store(from_any(manifest), declared=declared, max_bytes=len(manifest))

        async def freshen(view: str) -> None:
            """Bring this view up to the log's end. If that folds any event, bring up the other views too."""
            if await catch_up(views, log, PROJECTIONS[view]):
                await catch_up_all()

        async def catch_up_all() -> None:
            for projection in PROJECTIONS.values():
                await catch_up(views, log, projection)

        metrics = metrics or new_registry(settings.certificates())
        audit = await stack.enter_async_context(Audit(settings.audit_file, metrics, clock=clock))
        writer = await stack.enter_async_context(
            open_writer(
                settings,
                log,
                put_manifest,
                clock=clock,
                snapshots=blobs,
                times=blobs,
                metrics=metrics,
                audit=audit,
                checks={"blobs": blobs.check, "views": views.check},
            )
        )
        opened = DirectRegistry(
            log,
            writer,
            blobs,
            Queries(views),
            limits=limits_of(settings),
            upload_key=_upload_key(settings),
            freshen=freshen if embedded else None,
        )
        stack.push_async_callback(opened.close)
        yield Parts(settings, log, writer, blobs, views, opened, metrics, audit)
        if embedded:
            try:
                await catch_up_all()
            except ArtifactStoreError as error:
                # The written events are durable in the log. If a view cannot follow, its next read reports that.
                _log.warning("the views were not brought up to the log: %s", error.detail)


@asynccontextmanager
async def registry(settings: Settings) -> AsyncIterator[Registry]:
    """The registry on the embedded parts. Raises ConfigurationError for a Kafka log."""
    if not is_embedded(settings):
        raise ConfigurationError(
            "a Kafka log is written through a gateway: start `artifact-store gateway` and set ARTIFACT_STORE_URL"
        )
    async with parts(settings) as opened:
        yield opened.registry


def _sqlite_path(settings: Settings) -> Path:
    path = settings.log_url.removeprefix(_SQLITE)
    if not settings.log_url.startswith(_SQLITE) or not path or "?" in path:
        raise ConfigurationError(f"ARTIFACT_STORE_LOG_URL has no known form; accepted are {_FORMS}")
    return Path(os.path.realpath(path))  # locks lie beside the file itself, even if it is reached by a link


def _upload_key(settings: Settings) -> bytes | None:
    """The key that signs the states of resumable uploads; None if the settings have none."""
    if settings.state_key is None:
        return None
    from blake3 import blake3

    secret = settings.state_key.get_secret_value().encode()
    return blake3(secret, derive_key_context="artifact-store 2026-11 resumable uploads").digest()


def _require_tls(settings: Settings, service: str, is_private: bool, mend: str) -> None:
    if not is_private and service not in settings.plaintext:
        raise ConfigurationError(
            f"{service} is on another machine and would be asked without TLS, or without checking who answers: {mend}, "
            f"or set ARTIFACT_STORE_PLAINTEXT={','.join((*settings.plaintext, service))} where the network is trusted"
        )


def _kafka_is_private(settings: Settings) -> bool:
    brokers = settings.log_url.partition("://")[2].partition("/")[0].split(",")
    if all(_is_near(f"//{broker}") for broker in brokers):
        return True
    chosen = {name: str(value).lower() for name, value in settings.kafka_options.items()}
    return (
        chosen.get("security.protocol", "plaintext").endswith("ssl")
        and chosen.get("enable.ssl.certificate.verification", "true") == "true"
        and chosen.get("ssl.endpoint.identification.algorithm", "https") == "https"
    )


def _is_private(url: str, plain: str = "http:") -> bool:
    """Whether traffic to the URL cannot be read on the way: it names this machine, or does not begin with `plain`."""
    return not url.startswith(plain) or _is_near(url)


def _is_near(url: str) -> bool:
    """Whether the URL names this machine. True for a URL that cannot be parsed, which is refused elsewhere."""
    try:
        return is_loopback(urlsplit(url).hostname or "localhost")
    except ValueError:
        return True
