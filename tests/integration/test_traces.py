"""Traces of the running product: from an HTTP request through blob, queue, commit and read-back to the views."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from services.config import SecretStr, Settings
from services.views.projections import PROJECTIONS
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of, partitions_of
from tests.integration.trace_receiver import FoundSpan, spans_of_collector, trace_receiver
from tests.services.collector import TraceCollector

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENDER = "b7ad6b7169203331"
_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
_PUT = "PUT /v1/packages/{package_id}/files/{relative_path}"


class TracedProcess(ProductProcess):
    """A process of the product with `OTEL_*` variables."""

    otel: dict[str, str]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), **self.otel}


async def upload(puts: Mapping[str, str]) -> str:
    """Create a package, and put one file into it through each gateway, in the trace that is named beside its URL."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{next(iter(puts))}/v1/packages", json=_PACKAGE) as answer:
            assert answer.status == 201, await answer.text()
            package_id: str = (await answer.json())["package_id"]
        for n, (url, trace) in enumerate(puts.items()):
            headers = {"traceparent": f"00-{trace}-{SENDER}-01", "Authorization": "Bearer not-to-be-seen"}
            path = f"/v1/packages/{package_id}/files/{n}.txt"
            async with session.put(url + path, data=b"some bytes", headers=headers) as answer:
                assert answer.status == 201, await answer.text()
    return package_id


def one(spans: Sequence[FoundSpan], name: str, **attributes: str) -> FoundSpan:
    """The only span of this name and these attributes (`__` for the dots in their names)."""
    found = [
        span
        for span in spans
        if span.name == name
        and all(span.attributes.get(key.replace("__", ".")) == value for key, value in attributes.items())
    ]
    assert len(found) == 1, f"{len(found)} spans {name}: {[span.name for span in spans]}"
    return found[0]


def way_of_a_file(spans: Sequence[FoundSpan], topic: str, package_id: str) -> None:
    """Assert that the spans are one trace from the request to every view."""
    request = one(spans, _PUT)
    assert (request.parent_id, request.kind) == (SENDER, "server")
    assert int(request.attributes["http.response.status_code"]) == 201
    assert request.attributes["http.request.method"] == "PUT"
    store = one(spans, "store blob")
    assert store.parent_id == request.span_id
    stored = one(spans, "PUT")
    assert (stored.kind, stored.parent_id) == ("client", store.span_id)
    assert "?" not in str(stored.attributes["url.full"])
    send = one(spans, f"send {topic}")
    queue = one(spans, "queue")
    assert send.kind == "producer"
    assert queue.parent_id == send.parent_id
    assert {one(spans, name).parent_id for name in ("commit", "read back")} == {send.span_id}
    assert send.attributes["messaging.kafka.message.key"] == package_id
    for name in PROJECTIONS:
        fold = one(spans, f"process {topic}", artifact_store__projection=name)
        assert (fold.kind, fold.parent_id) == ("consumer", send.span_id)
        assert fold.attributes["messaging.system"] == "kafka"


@pytest.mark.services
@pytest.mark.processes
async def test_a_trace_shows_the_way_of_a_file_from_request_to_views(real_settings: Settings, tmp_path: Path) -> None:
    await asyncio.to_thread(output_of, real_settings, "migrate")
    topic = urlsplit(real_settings.log_url).path[1:] + ".events"
    with trace_receiver() as receiver:
        process = TracedProcess(real_settings, tmp_path / "serve", "serve")
        process.otel = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=lab",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with process:
            package_id = await upload({process.endpoint: TRACE})
            names = [_PUT, *len(PROJECTIONS) * [f"process {topic}"]]
            spans = await asyncio.to_thread(receiver.trace, TRACE, names)
        every = receiver.spans()
    way_of_a_file(spans, topic, package_id)
    assert {span.service for span in every} == {"artifact-store"}
    assert {name.lower(): value for name, value in receiver.headers.items()}["x-tenant"] == "lab"
    assert not [span for span in every if span.attributes.get("http.route") in ("/readyz", "/metrics", "/healthz")]
    said = json.dumps([span.attributes for span in every])
    assert "not-to-be-seen" not in said
    assert real_settings.s3_secret_key.get_secret_value() not in said


@pytest.mark.services
@pytest.mark.processes
@pytest.mark.endurance
async def test_a_collector_shows_the_way_of_a_file_through_two_gateways(
    real_settings: Settings, tmp_path: Path
) -> None:
    await asyncio.to_thread(output_of, real_settings, "migrate")
    topic = urlsplit(real_settings.log_url).path[1:] + ".events"
    with TraceCollector(tmp_path / "collector") as collector, ExitStack() as stack:
        processes = []
        for n, command in enumerate(("gateway", "gateway", "projector")):
            own = replace(
                real_settings, state_dir=tmp_path / f"state-{n}", internal_secret=SecretStr("the same for all")
            )
            process = TracedProcess(own, tmp_path / f"process-{n}", command, listens=command == "gateway")
            process.otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
            processes.append(stack.enter_context(process))
        gateways = processes[:2]

        async def shared() -> bool:
            owned = [await asyncio.to_thread(partitions_of, gateway) for gateway in gateways]
            return min(owned) > 0 and sum(owned) == real_settings.kafka_partitions

        await until(shared, 60, "the gateways do not share the partitions")
        urls = [gateway.endpoint for gateway in gateways]
        traces = [TRACE, TRACE[::-1]]
        package_id = await upload(dict(zip(urls, traces, strict=True)))

        def way_of(trace: str) -> list[FoundSpan]:
            return [span for span in spans_of_collector(collector.log.read_text()) if span.trace_id == trace]

        async def all_folded() -> bool:
            return all(sum(s.name == f"process {topic}" for s in way_of(trace)) == len(PROJECTIONS) for trace in traces)

        async def all_there() -> bool:
            return await all_folded() and all(any(s.name == _PUT for s in way_of(trace)) for trace in traces)

        await until(all_there, 60, "the collector does not get all spans")
        ways = [way_of(trace) for trace in traces]
    for spans in ways:
        way_of_a_file(spans, topic, package_id)
        assert {span.service for span in spans} == {"artifact-store-gateway", "artifact-store-projector"}
    # One of the gateways does not own the partition: its question and its command are forwarded.
    (forwarded,) = [spans for spans in ways if any(span.name == "POST" for span in spans)]
    (taken,) = [span for span in forwarded if span.kind == "server" and span.name.endswith("/commands")]
    (sent,) = [span for span in forwarded if span.span_id == taken.parent_id]
    assert (sent.name, sent.kind, sent.parent_id) == ("POST", "client", one(forwarded, _PUT).span_id)
    assert one(forwarded, f"send {topic}").parent_id == taken.span_id
