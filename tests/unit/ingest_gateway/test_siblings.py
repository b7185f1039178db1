"""The metrics of a gateway of several processes, and where each process listens for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from artifact_store.errors import ConfigurationError
from ingest_gateway.http_metrics import Metrics
from ingest_gateway.siblings import Member, Siblings, internal_addresses, merged
from services.config import Settings


def samples(text: bytes) -> dict[tuple[str, str, str], float]:
    """Value by name, process and status, without what the process uses of the machine, which changes at each look."""
    return {
        (sample.name, sample.labels["process"], sample.labels.get("status", "")): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.startswith("process_")
    }


def counted(*statuses: int) -> Metrics:
    metrics = Metrics()
    for status in statuses:
        metrics.answered("/healthz", "GET", status, 0.1, 0, 2)
    return metrics


def test_metrics_of_all_are_one_exposition_with_the_process_as_a_label() -> None:
    text = merged({1: counted(200, 200, 503).exposition(), 2: counted(200).exposition(), 3: None})
    found = samples(text)
    total = "artifact_store_http_requests_total"
    assert {key: value for key, value in found.items() if key[0] == total} == {
        (total, "1", "200"): 2,
        (total, "1", "503"): 1,
        (total, "2", "200"): 1,
    }
    assert [found["artifact_store_process_up", number, ""] for number in "123"] == [1, 1, 0]
    assert text.decode().count("# TYPE artifact_store_http_requests_total counter") == 1
    assert text.decode().count("# TYPE artifact_store_http_request_seconds histogram") == 1


async def test_whoever_is_asked_shows_all_that_answer(tmp_path: Path) -> None:
    one, two = (Member(number, 3, 0, str(tmp_path)) for number in (1, 2))
    first, second = Siblings(one, counted(200).exposition), Siblings(two, counted(503).exposition)
    async with first.telling(), second.telling():
        shown = samples(await first.exposition())
        assert shown == samples(await second.exposition())
    assert [shown["artifact_store_process_up", number, ""] for number in "123"] == [1, 1, 0]
    assert shown["artifact_store_http_requests_total", "2", "503"] == 1


def test_a_member_is_told_on_the_command_line_which_it_is() -> None:
    member = Member(2, 3, 7, "/somewhere else")
    assert Member.parse(member.text()) == member


@pytest.mark.parametrize(
    ("listen", "url", "third"),
    [
        ("127.0.0.1:0", None, {}),
        ("127.0.0.1:8081", None, {"internal_listen": "127.0.0.1:8083"}),
        ("[::1]:8081", None, {"internal_listen": "[::1]:8083"}),
        (
            "0.0.0.0:8081",
            "http://[2001:db8::1]:9000/x",
            {"internal_listen": "0.0.0.0:8083", "internal_url": "http://[2001:db8::1]:9002/x"},
        ),
    ],
)
def test_internal_listeners_take_ports_one_after_the_other(listen: str, url: str | None, third: dict[str, str]) -> None:
    settings = Settings(internal_listen=listen, internal_url=url)
    assert internal_addresses(settings, 3, 3) == third


@pytest.mark.parametrize(
    ("listen", "url"),
    [("127.0.0.1:0", "http://gateway:8081"), ("0.0.0.0:8081", "http://gateway"), ("127.0.0.1:65535", None)],
)
def test_internal_listeners_that_cannot_all_have_an_address_are_refused(listen: str, url: str | None) -> None:
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_INTERNAL_"):
        internal_addresses(Settings(internal_listen=listen, internal_url=url), 1, 2)
