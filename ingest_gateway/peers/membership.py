"""Joining the gateways that share a Kafka log: the writer, its internal listener and its forwarder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from prometheus_client import CollectorRegistry

from artifact_store.errors import ConfigurationError
from ingest_gateway.health import Check, Checks, readiness
from ingest_gateway.peers.authentication import PeerCredentials
from ingest_gateway.peers.forwarding import HttpForwarder, ProcessStatus
from ingest_gateway.peers.internal_listener import InternalListener
from services.blobs.open import bucket_of
from services.config import Settings
from services.core.decide import Limits
from services.identity.audit import Audit
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.group_process import GroupProcess
from services.log.kafka.writer_metrics import WriterCollector
from services.log.port import Log, PutManifest, SnapshotStore, TimedStore
from services.runtime import tls
from services.runtime.clock import Clock
from services.runtime.metrics import release


@asynccontextmanager
async def kafka_writer(
    settings: Settings,
    log: Log,
    *,
    limits: Limits,
    put_manifest: PutManifest,
    clock: Clock,
    snapshots: SnapshotStore | None = None,
    times: TimedStore | None = None,
    metrics: CollectorRegistry | None = None,
    audit: Audit | None = None,
    checks: Mapping[str, Check] | None = None,
) -> AsyncIterator[KafkaWriter]:
    """A started member of the group of writers. It hands its partitions over at the end of the block.

    It writes nothing while its clock differs much from that of `times`. Its metrics are added to `metrics`. `audit`
    records what its internal listener refuses, and what operators confirm there. It runs `checks`, of `blobs` and
    `views`, to report the health of the whole process to operators.

    Raises ConfigurationError: the topic could lose events, or the internal listener cannot open; UnavailableError.
    """
    if not isinstance(log, KafkaLog):
        raise ConfigurationError("only a Kafka log has writers that share its partitions")
    async with AsyncExitStack() as stack:
        credentials = await asyncio.to_thread(PeerCredentials.of, settings)
        listener = await InternalListener.open(settings, credentials, audit)
        # Closed last, so that other gateways still learn that partitions move while the writer finishes.
        stack.push_async_callback(listener.close)
        groups = GroupProcess(log.kafka)
        stack.callback(groups.close)
        forwarder = await stack.enter_async_context(HttpForwarder(credentials))
        writer = KafkaWriter(
            settings,
            log,
            limits=limits,
            put_manifest=put_manifest,
            clock=clock,
            forwarder=forwarder,
            internal_url=listener.url,
            snapshots=snapshots,
            times=times,
            describe_group=groups.members,
        )
        stack.push_async_callback(writer.close)
        if checks is None:
            listener.serve(writer)
        else:
            listener.serve(writer, partial(_about, settings, writer, Checks(log.check, writer=writer.ready, **checks)))
        if metrics is not None:
            collector = WriterCollector(writer)
            metrics.register(collector)
            stack.callback(metrics.unregister, collector)
        await writer.start()
        yield writer


async def _about(settings: Settings, writer: KafkaWriter, checks: Checks) -> ProcessStatus:
    """The health of this process, for operators."""
    found = await readiness(checks)
    ends = await asyncio.to_thread(tls.all_ends, settings.certificates())
    return ProcessStatus(
        release(),
        {name: part.cause for name, part in found.parts.items()},
        writer.clock_skew_seconds,
        writer.state_free_bytes,
        ends,
        bucket_of(settings),
    )
