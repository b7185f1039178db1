"""A process with only the writers of a log: `python -m tests.integration.kafka.state_process`.

It takes over, takes some packages through their life, and prints one JSON object: how long the take-over took, what the
state was restored from, and its resident memory in bytes. Settings come from the environment.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from uuid import uuid4

import psutil

from schemas import identifiers
from services.blobs.port import BlobStore
from services.config import Settings
from services.core.decide import CreatePackage, FinalizePackage, Limits
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka import writer as writers
from services.wiring import open_blobs
from tests.contract.log_stage import no_manifest

_PACKAGES = 2_000


# What is measured is how soon a snapshot is restored, not whether a busy machine makes one in time.
writers.SNAPSHOT_SECONDS = 600.0


async def main() -> None:
    settings = Settings.from_env()
    log = KafkaLog(settings)
    blobs: BlobStore = open_blobs(settings)
    writer = KafkaWriter(settings, log, limits=Limits(), put_manifest=no_manifest, snapshots=blobs)
    await writer.start()
    while await writer.ready() is not None:  # noqa: ASYNC110 - the port gives the state, not an event
        await asyncio.sleep(0.02)
    [status] = await writer.status()
    await asyncio.gather(*(_live(writer) for _ in range(_PACKAGES)))
    memory = psutil.Process().memory_info().rss
    began = time.monotonic()
    await writer.close()
    await blobs.close()
    await log.close()
    json.dump(
        {
            "seconds": status.takeover_seconds,
            "restored_from": status.restored_from,
            "memory": memory,
            "close_seconds": time.monotonic() - began,
        },
        sys.stdout,
    )


async def _live(writer: KafkaWriter) -> None:
    """One package's life."""
    command_id = uuid4()
    package = identifiers.package_id("ada", command_id)
    await writer.submit(CreatePackage(package, command_id, "ada", "run", "lab", "s", "report", "{}"))
    await writer.submit(FinalizePackage(package, uuid4(), "ada"))


if __name__ == "__main__":
    asyncio.run(main())
