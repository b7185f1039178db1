"""`artifact-store status` and `/metrics` show every partition's writer, since when, and how it took over."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from artifact_store.documents.times import from_text
from artifact_store.errors import ConfigurationError
from services.blobs.open import bucket_of
from services.config import SecretStr, Settings
from services.log.state.restore import FROM_FILE, FROM_LOG
from services.views.projections import PROJECTIONS
from tests.contract.log_stage import PATIENCE_SECONDS
from tests.integration.kafka_stage import PARTITIONS, kafka_settings
from tests.integration.processes import ProductProcess, metrics_of, output_of, partitions_of, run_command
from tests.services.process import free_ports

TAKEOVERS = "artifact_store_takeovers_total"
PACKAGE = b'{"name":"n","producer":"p","subject":"s","retention_class":"scratch"}'


@pytest.fixture
def kafka(kafka_url: str, s3_bucket: dict[str, Any], tmp_path: Path) -> Settings:
    views = f"sqlite+aiosqlite:///{tmp_path / 'views.db'}"
    return kafka_settings(kafka_url, tmp_path, views_url=views, internal_secret=SecretStr("sesame"), **s3_bucket)


def status_of(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output_of(settings, "status", "--json"))
    return found


def wait_for_all(*gateways: ProductProcess) -> list[dict[str, float]]:
    """Wait until these share all partitions; what each shows at `/metrics`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        owned = [partitions_of(gateway) for gateway in gateways]
        if sum(owned) == PARTITIONS and min(owned) > 0:
            return [metrics_of(gateway) for gateway in gateways]
        assert time.monotonic() < deadline, owned
        time.sleep(0.1)  # an answer over HTTP, which nothing announces


def fill(gateway: ProductProcess) -> None:
    """Packages in every partition, very likely."""
    for _ in range(20):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{gateway.endpoint}/v1/packages", PACKAGE, headers)  # noqa: S310 - as above
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
            assert answer.status == 201


@pytest.mark.services
@pytest.mark.processes
def test_every_partition_is_shown_whichever_process_writes_to_it(kafka: Settings, tmp_path: Path) -> None:
    output_of(kafka, "migrate")
    before = time.time()
    ports = free_ports(2)
    with ProductProcess(kafka, tmp_path / "one", "gateway", port=ports[0]) as one:
        wait_for_all(one)
        fill(one)
        alone = status_of(kafka)["writers"]
        by_stranger = status_of(replace(kafka, internal_secret=SecretStr("guess")))
        stranger = by_stranger["writers"]
        with ProductProcess(kafka, tmp_path / "two", "gateway", port=ports[1]) as two:
            counted = wait_for_all(one, two)
            found = status_of(kafka)
            shared, processes = found["writers"], found["processes"]
            text = output_of(kafka, "status").decode()
    for writer in (*alone, *shared):
        assert before < from_text(writer["since"]) / 1e6 < time.time()
        assert 0 < writer["takeover_seconds"] < PATIENCE_SECONDS
        assert (writer["trouble"], writer["waiting"]) == (None, 0)
    assert {w["restored_from"] for w in alone} == {FROM_LOG}
    (first,) = {w["owner"] for w in alone}
    (second,) = {w["owner"] for w in shared} - {first}
    # It found the files that the first one left; with a disk of its own it would have been the log.
    assert {w["restored_from"] for w in shared if w["owner"] == second} == {FROM_FILE}
    assert text.count(second) == 1 + sum(w["owner"] == second for w in shared)  # once as a process
    assert {p["url"] for p in processes} == {first, second}
    for process in processes:
        assert process["release"] == version("artifact-store")
        assert set(process["components"]) == {"log", "blobs", "writer", "views"}
        assert abs(process["clock_skew_seconds"]) < 5
        assert process["state_free_bytes"] > 0
        assert process["bucket"] == bucket_of(kafka)
    assert ["ARTIFACT_STORE_INTERNAL_SECRET" in p["trouble"] for p in by_stranger["processes"]] == [True]
    totals = [sum(v for k, v in found.items() if k.startswith(TAKEOVERS)) for found in counted]
    assert totals[0] >= PARTITIONS
    assert totals[1] >= 1
    # Who is not trusted sees the owners, for the group says that, and why the rest is missing.
    assert {w["owner"] for w in stranger} == {first}
    assert all(w["since"] is None and "ARTIFACT_STORE_INTERNAL_SECRET" in w["trouble"] for w in stranger)
    assert "sesame" not in text
    # When nobody is left that is said too, and so is how far the views are, which nobody fills here.
    found = status_of(kafka)
    assert {(w["owner"], w["trouble"]) for w in found["writers"]} == {(None, "no process writes to it")}
    assert {p["projection"]: p["behind"] > 0 for p in found["projections"]} == dict.fromkeys(PROJECTIONS, True)


@pytest.mark.services
@pytest.mark.processes
@pytest.mark.parametrize("command", ["gateway", "projector", "serve"])
def test_every_process_ends_alike_when_the_topic_is_missing(kafka: Settings, command: str) -> None:
    refused = run_command(kafka, command)
    assert refused.returncode == ConfigurationError.exit_code
    assert b"artifact-store migrate" in refused.stderr
    assert b"Traceback" not in refused.stderr
