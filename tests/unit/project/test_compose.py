"""`compose.yaml` opens nothing to the network, has no secret, and sets every variable that it leaves open."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from services.blobs.port import IDLE_SECONDS
from tests.services.docker import COMPOSE_FILE, environment
from tests.services.install import KAFKA_VERSION, MINIO_RELEASE, SEAWEED_PACKAGE
from tests.services.shared import STORES, Store

TEXT = COMPOSE_FILE.read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]


def a_state(*, durable: bool = False, store: Store = "minio") -> dict[str, Any]:
    """What `make services` draws for a set."""
    return {
        "kafka": {"port": 1},
        "store": store,
        store: {"port": 2, "access_key": "a", "secret_key": "b"},
        "postgres": {"port": 3, "password": "c", "durable": durable},
    }


def test_it_has_the_services_and_each_says_when_it_is_ready() -> None:
    assert sorted(SERVICES) == ["kafka", "minio", "postgres", "seaweedfs"]
    assert all("healthcheck" in service for service in SERVICES.values())


def test_every_port_is_on_the_loopback_interface() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_every_open_variable_is_set_and_no_other() -> None:
    assert {"COMPOSE_PROFILES", *re.findall(r"\$\{(\w+)", TEXT)} == set(environment(a_state()))


@pytest.mark.parametrize("store", STORES)
def test_of_the_stores_the_one_that_was_asked_for_runs(store: Store) -> None:
    chosen = environment(a_state(store=store))["COMPOSE_PROFILES"]
    assert [name for name in STORES if chosen in SERVICES[name]["profiles"]] == [store]


def test_a_set_that_is_measured_on_syncs_to_disk_and_waits_for_the_members_of_a_group() -> None:
    names = ("POSTGRES_DURABLE", "KAFKA_MEMBERS_AWAITED_MS")
    assert [environment(a_state(durable=True))[name] for name in names] == ["on", "3000"]
    assert [environment(a_state(durable=False))[name] for name in names] == ["off", "0"]


def test_secrets_have_no_default() -> None:
    for name, places in (("S3_ACCESS_KEY", 2), ("S3_SECRET_KEY", 2), ("POSTGRES_PASSWORD", 1)):
        assert re.findall(rf"\$\{{{name}(..)", TEXT) == [":?"] * places


def test_its_broker_and_its_object_stores_are_the_releases_that_are_taken_elsewhere() -> None:
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"
    assert SERVICES["minio"]["image"].endswith(f":{MINIO_RELEASE}")
    assert SERVICES["seaweedfs"]["image"] == f"chrislusf/seaweedfs:{SEAWEED_PACKAGE.partition('==')[2]}"


def test_its_object_store_keeps_unfinished_uploads_for_longer_than_gateways_do() -> None:
    hours = SERVICES["minio"]["environment"]["MINIO_API_STALE_UPLOADS_EXPIRY"].removesuffix("h")
    assert int(hours) * 3600 > 7 * IDLE_SECONDS, "MinIO counts from the beginning of an upload, not from its last part"
