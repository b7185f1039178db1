"""Traces of the running product: from an HTTP request through blob, queue, commit and read-back to the views."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from services.config import Settings
from services.views.projections import PROJECTIONS
from tests.integration.processes import ProductProcess, output_of
from tests.integration.trace_receiver import FoundSpan, trace_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENDER = "b7ad6b7169203331"
_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
_PUT = "PUT /v1/packages/{package_id}/files/{relative_path}"


class TracedProcess(ProductProcess):
    """A process of the product with `OTEL_*` variables."""

    otel: dict[str, str]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), **self.otel}


async def upload(url: str) -> str:
    """Create a package at this gateway, and put a file into it in a trace of a sender's."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/packages", json=_PACKAGE) as answer:
            assert answer.status == 201, await answer.text()
            package_id: str = (await answer.json())["package_id"]
        headers = {"traceparent": f"00-{TRACE}-{SENDER}-01", "Authorization": "Bearer not-to-be-seen"}
        path = f"/v1/packages/{package_id}/files/0.txt"
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
    assert request.attributes["http.response.status_code"] == 201
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
            package_id = await upload(process.endpoint)
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
