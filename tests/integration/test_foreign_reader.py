"""Any Kafka consumer can follow the log: records are as docs/events.md says, down to the last digest."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID, uuid5

import aiohttp
import cbor2
import pytest
from minio import Minio

from services.config import Settings
from tests.documents import ROOT, blocks
from tests.integration.foreign import (
    ForeignEvent,
    canonical,
    chain_digest,
    digest,
    fingerprint_of,
    murmur2,
    partition_of,
    rabin,
    read_topic,
    rebuilt_manifest,
)
from tests.integration.processes import ProductProcess, output_of

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CLAIM_CHECK_BYTES = 512 * 1024
REPORT_DAYS = 5 * 365
MANY = 900
PARALLEL = 24
LONG_NAME = "a-name-that-makes-the-manifest-larger-" * 4


@dataclass
class Written:
    """What the gateway answered: per package the digest of its last event and its manifest's address."""

    names: dict[str, str] = field(default_factory=dict)
    event_digests: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)


class Producer:
    """Packages through a gateway, by plain requests."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self.written = Written()

    async def publish(self, name: str, paths: list[str], *, finalize: bool = True, **fields: Any) -> str:
        body = {"name": name, "producer": "lab", "subject": "s", "retention_class": "report", **fields}
        created = await self._send("POST", "/v1/packages", json=body)
        package_id: str = created["package_id"]
        self.written.names[package_id] = name
        self.written.event_digests[package_id] = created["event_digest"]
        waiting = iter(paths)

        async def put() -> None:
            for path in waiting:  # shared by all tasks: each path is taken once
                target = f"/v1/packages/{package_id}/files/{quote(path)}"
                done = await self._send("PUT", target, data=path.encode(), headers={"Content-Type": "text/plain"})
                if done["sequence"] == len(paths) + 1:
                    self.written.event_digests[package_id] = done["event_digest"]

        await asyncio.gather(*(put() for _ in range(PARALLEL)))
        if finalize:
            done = await self._send("POST", f"/v1/packages/{package_id}/finalize")
            self.written.event_digests[package_id] = done["event_digest"]
            self.written.addresses[package_id] = done["manifest_digest"]
        return package_id

    async def _send(self, method: str, target: str, **options: Any) -> dict[str, Any]:
        options["headers"] = {"X-Actor": "ada", "traceparent": TRACEPARENT, **options.get("headers", {})}
        async with self._session.request(method, self._url + target, **options) as answer:
            text = await answer.text()
            assert answer.status in (200, 201), text
            found: dict[str, Any] = json.loads(text)
            return found


@pytest.fixture
async def producer(real_settings: Settings, tmp_path: Path) -> AsyncIterator[Producer]:
    """A producer at a gateway of its own; no projector runs, and none is needed."""
    output_of(real_settings, "migrate")
    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            yield Producer(session, gateway.endpoint)


@pytest.mark.services
async def test_a_foreign_consumer_reads_and_proves_every_event(producer: Producer, real_settings: Settings) -> None:
    for number in range(6):
        paths = [f"{number}/häll{i}.txt" for i in range(number)]
        await producer.publish(f"package {number}", paths, metadata={"n": number, "half": 0.5, "list": [True, None]})
    await producer.publish("for ever", ["a"], retention_class="permanent")
    open_id = await producer.publish("open", ["one", "two"], finalize=False)
    large_id = await producer.publish("many", [f"{LONG_NAME}/{i:04}.txt" for i in range(MANY)])
    written = producer.written

    url = urlsplit(real_settings.log_url)
    events = await asyncio.to_thread(read_topic, url.netloc, f"{url.path.strip('/')}.events")
    packages: dict[str, list[ForeignEvent]] = defaultdict(list)
    latest: dict[int, int] = defaultdict(int)
    for event in events:
        record_is_right(event, real_settings.kafka_partitions)
        assert event.value["created_at"] >= latest[event.partition], "time runs backwards in a partition"
        latest[event.partition] = event.value["created_at"]
        packages[event.key].append(event)
    assert {key: found[0].payload["name"] for key, found in packages.items()} == written.names
    assert len({event.value["event_id"] for event in events}) == len(events)

    for package_id, history in packages.items():
        history_is_whole(history)
        assert chain_digest(history[-1].value).hex() == written.event_digests[package_id]
        if package_id == open_id:
            assert history[-1].value["event_type"] == "v1.file.ingested"
            continue
        manifest = rebuilt_manifest(history)
        assert f"blake3:{digest(manifest).hex()}" == written.addresses[package_id]
        assert history[-1].value["payload_digest"] == digest(manifest)
        sizes = [event.payload["size_bytes"] for event in history[1:-1]]
        last = history[-1].payload
        assert (last["file_count"], last["total_bytes"]) == (len(sizes), sum(sizes))
        if package_id == large_id:
            assert len(manifest) > CLAIM_CHECK_BYTES
            assert last["manifest"] is None
            assert await asyncio.to_thread(blob, real_settings, last["manifest_key"]) == manifest
        else:
            assert (last["manifest"], last["manifest_key"]) == (manifest, None)

    assert await printed_addresses(url.netloc, f"{url.path.strip('/')}.events", len(written.addresses)) == {
        (address, package_id) for package_id, address in written.addresses.items()
    }

    periods = {found[0].payload["name"]: found[0].payload["retention_days"] for found in packages.values()}
    assert periods["for ever"] is None
    assert periods["open"] == REPORT_DAYS
    receipt = packages[large_id][1].payload
    assert await asyncio.to_thread(stored, real_settings, receipt) == receipt["relative_path"].encode()


async def printed_addresses(servers: str, topic: str, count: int) -> set[tuple[str, str]]:
    """Addresses and packages that the script of the guide prints first."""
    script = blocks("docs/subscribing.md")["addresses"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, servers, topic, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            lines = [(await process.stdout.readline()).decode().split() for _ in range(count)]
    finally:
        process.kill()
        await process.wait()
    return {(address, package_id) for address, package_id in lines}


def record_is_right(event: ForeignEvent, partitions: int) -> None:
    """Key, partition, timestamp, headers and derived ids of one record."""
    value = event.value
    assert event.key == value["package_id"] == str(UUID(value["package_id"]))
    assert event.partition == partition_of(event.key, partitions)
    assert event.timestamp_ms == value["created_at"] // 1000
    assert value["event_id"] == str(uuid5(UUID(value["package_id"]), str(value["sequence"])))
    assert value["actor"] == "ada"

    event_type = value["event_type"]
    expected = {
        "event_type": event_type,
        "event_version": event_type.partition(".")[0].removeprefix("v"),
        "command_id": value["command_id"],
        "command_index": str(value["command_index"]),
        "command_count": str(value["command_count"]),
        "ce_specversion": "1.0",
        "ce_id": chain_digest(value).hex(),
        "ce_type": event_type,
        "ce_subject": value["package_id"],
        "ce_dataschema": f"urn:artifact-store:schema:{fingerprint_of(event_type)}",
        "producer": "lab",
        "subject": "s",
        "traceparent": TRACEPARENT,
    }
    assert {name: event.headers.get(name) for name in expected} == expected
    assert event.headers["ce_source"].startswith("urn:artifact-store:log:")
    assert event.headers["ce_time"].endswith("Z")
    assert event.headers["content-type"] != ""
    assert (value["command_index"], value["command_count"]) == (0, 1)


def history_is_whole(history: list[ForeignEvent]) -> None:
    """Sequences, digests, the chain and the derived ids of one package."""
    assert [event.value["sequence"] for event in history] == list(range(1, len(history) + 1))
    previous = bytes(32)
    for event in history:
        assert event.value["previous_digest"] == previous
        previous = chain_digest(event.value)
        payload = event.payload
        if event.value["event_type"] != "v1.package.finalized":
            assert event.value["payload_digest"] == digest(canonical(payload))
        if event.value["event_type"] == "v1.file.ingested":
            assert payload["blake3"] == digest(payload["relative_path"].encode())  # the body that was sent
            assert payload["file_id"] == str(uuid5(UUID(event.key), f"file:{payload['relative_path']}"))
            receipt = payload["receipt"]
            place = f"location:{receipt['backend_id']}:{receipt['key']}:{receipt['offset']}:{receipt['length']}"
            assert receipt["location_id"] == str(uuid5(UUID(payload["file_id"]), place))
            assert receipt["length"] == payload["size_bytes"]
            assert receipt["stored_at"] <= event.value["created_at"]


def blob(settings: Settings, key: str, offset: int = 0, length: int = 0) -> bytes:
    """An object of the store, or a part of it, by the store's own client."""
    url = urlsplit(settings.blobs_url)
    client = Minio(
        url.netloc,
        settings.s3_access_key,
        settings.s3_secret_key.get_secret_value(),
        secure=False,
        region=settings.s3_region,
    )
    with client.get_object(url.path.strip("/"), key, offset=offset, length=length) as answer:
        return bytes(answer.read())


def stored(settings: Settings, payload: dict[str, Any]) -> bytes:
    """The bytes of a file, where its receipt says that they lie."""
    receipt = payload["receipt"]
    return blob(settings, receipt["key"], receipt["offset"], receipt["length"])


def test_the_reader_itself_agrees_with_published_values() -> None:
    """Kafka's UtilsTest.testMurmur2, RFC 8949 Appendix A and the Avro specification's fingerprint of "null"."""
    published = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    assert {text: murmur2(text) for text in published} == {text: hash_ % 2**32 for text, hash_ in published.items()}
    assert canonical({"a": 1, "b": [2, 3]}) == bytes.fromhex("a26161016162820203")
    assert canonical([1000000, -100, "水", None]) == cbor2.dumps([1000000, -100, "水", None])
    assert rabin('"null"') == (0x63DD24E7CC258F8A).to_bytes(8, "little")
