"""Only OTEL_* decides whether a process makes spans, and their failures are no more than a line in the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.config import Settings
from services.runtime import tracing
from services.runtime.tracing import TRACEPARENT, exporting, traced
from tests.integration.http_gateway import running_gateway
from tests.integration.trace_receiver import trace_receiver
from tests.services.process import free_ports

SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (_ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    before = {name: logging.getLogger(name).filters[:] for name in tracing.EXPORTERS}
    yield
    for name, filters in before.items():
        logging.getLogger(name).filters = filters


async def test_without_a_destination_there_is_nothing_between_a_step_and_its_caller() -> None:
    async def work() -> int:
        return 7

    with exporting("a-service"):
        assert tracing.tracer is None
        step = work()
        assert traced("a step", step) is step
        assert await step == 7


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({_ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, None),
        ({_ENDPOINT: "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin is not supported"),
        ({_ENDPOINT: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "set it to http/protobuf"),
    ],
)
def test_what_the_variables_turn_off_or_ask_for_in_vain_makes_no_spans(
    variables: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with exporting("a-service"):
        assert tracing.tracer is None
    messages = [record.getMessage() for record in caplog.records]
    assert (said is None and not messages) or (said is not None and said in messages[0])


def test_without_the_extra_the_log_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(_ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with exporting("a-service"):
        assert tracing.tracer is None
    assert "pip install 'artifact-store[traces]'" in caplog.text


def test_a_collector_that_is_away_costs_warnings_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv(_ENDPOINT, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    with exporting("a-service"):
        assert tracing.tracer is not None
        tracing.tracer.begin("a step", "internal", SENDER).end()
    failed = [record for record in caplog.records if record.levelno > logging.INFO]
    assert failed
    assert {record.levelname for record in failed} == {"WARNING"}
    assert all(record.getMessage().startswith("traces are incomplete: ") for record in failed)
    assert not any(record.exc_info for record in failed)


async def test_steps_are_below_each_other_and_name_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with trace_receiver() as receiver:
        monkeypatch.setenv(_ENDPOINT, receiver.url)
        with exporting("a-service"):
            assert tracing.tracer is not None
            with tracing.tracer.step("outside of a trace"):
                assert TRACEPARENT.get() is None
            token = TRACEPARENT.set(SENDER)
            with (
                pytest.raises(ValueError, match="no number"),
                tracing.tracer.step("outer"),
                tracing.tracer.step("inner"),
            ):
                raise ValueError("no number")
            TRACEPARENT.reset(token)
        spans = {span.name: span for span in receiver.spans()}
    assert set(spans) == {"outer", "inner"}
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert spans["outer"].parent_id == SENDER.split("-")[2]
    assert spans["inner"].attributes["error.type"] == "ValueError"
    assert spans["inner"].service == "a-service"


async def test_an_embedded_gateway_traces_requests_that_are_sampled(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
    with trace_receiver() as receiver:
        monkeypatch.setenv(_ENDPOINT, receiver.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "store")
        with exporting("artifact-store"):
            async with running_gateway(embedded_settings) as gateway:
                for context in (SENDER, SENDER[:-1] + "0"):
                    answer = await gateway.session.post("/v1/packages", json=fields, headers={"traceparent": context})
                    assert answer.status == 201
                await gateway.session.get("/healthz")
                await gateway.session.get("/v1/packages?subject=not-to-be-seen", headers={"Authorization": "Bearer no"})
        spans = receiver.spans()
    assert sorted(span.name for span in spans) == ["GET /v1/packages", "POST /v1/packages", "append", "commit", "queue"]
    assert {span.service for span in spans} == {"store"}
    listing = next(span for span in spans if span.kind == "server" and span.name.startswith("GET"))
    assert listing.parent_id == ""
    assert "not-to-be-seen" not in str(listing.attributes)
