"""The schemas in a registry, and the framing with its ids."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifact_store.errors import ConfigurationError, CorruptError, UnavailableError
from schemas.codec import EVENT_TYPES, UndecodableEventError, decode
from services.log.kafka.schema_registry import COMPATIBILITY, ConfluentFraming, SchemaRegistry
from tests.schema_registry import FakeRegistry, fake_registry
from tests.services.process import free_ports

GOLDEN = sorted((Path(__file__).parents[2] / "schemas" / "golden").glob("*.avro"))
IDS = {event_type: 70_000 + number for number, event_type in enumerate(EVENT_TYPES)}


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    """A registry without any schema."""
    with fake_registry() as registry:
        yield registry


@pytest.fixture
def registry(fake: FakeRegistry) -> SchemaRegistry:
    """The schemas of a topic in it, none of them registered."""
    return SchemaRegistry(fake.url, "p.events")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_value_gets_the_id_of_its_schema_and_comes_back_as_it_was(path: Path) -> None:
    framing, value = ConfluentFraming(IDS), path.read_bytes()
    sent = framing.sent(value)
    assert sent == b"\0" + IDS[decode(value).event_type].to_bytes(4, "big") + value[10:]
    assert framing.received(sent) == value


@pytest.mark.parametrize("value", [GOLDEN[0].read_bytes(), b"\0\0\0\0\1" + bytes(20), b"", b"\xc3", b"{}"])
def test_a_value_in_another_framing_or_with_an_unknown_id_is_not_read(value: bytes) -> None:
    with pytest.raises(UndecodableEventError):
        decode(ConfluentFraming(IDS).received(value))


@pytest.mark.parametrize("value", [b"", b"{}", b"\0\0\0\0\1" + bytes(20), b"\0" + GOLDEN[0].read_bytes()])
def test_what_is_no_event_is_copied_so_that_it_reads_as_the_same(value: bytes) -> None:
    framing = ConfluentFraming(IDS)
    assert framing.received(framing.sent(value)) == value


@pytest.mark.parametrize(
    "value",
    [b"\xc3\1" + bytes(30), ConfluentFraming(IDS).sent(GOLDEN[0].read_bytes())],
    ids=["unknown", "an event here"],
)
def test_what_would_read_as_something_else_is_not_copied(value: bytes) -> None:
    with pytest.raises(CorruptError, match="ambiguous"):
        ConfluentFraming(IDS).sent(value)


def test_every_schema_gets_a_subject_of_its_own_that_the_registry_guards(
    fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    registry.register()
    assert fake.schemas.keys() == {registry.subject(event_type) for event_type in EVENT_TYPES}
    assert "p.events-artifact_store.events.v2.FileIngested" in fake.schemas
    assert set(fake.levels.values()) == {COMPATIBILITY}
    assert fake.levels.keys() == fake.schemas.keys()
    assert registry.ids() == {t: fake.id_of(registry.subject(t)) for t in EVENT_TYPES}
    assert registry.trouble() is None


def test_what_is_registered_is_not_registered_again(fake: FakeRegistry, registry: SchemaRegistry) -> None:
    registry.register()
    fake.requests.clear()
    registry.register()
    assert {(method, path.rpartition("/")[2] == "versions") for method, path, _ in fake.requests} == {
        ("GET", False),
        ("POST", False),
    }


def test_a_schema_that_is_missing_is_refused_with_what_registers_it(
    fake: FakeRegistry, registry: SchemaRegistry
) -> None:
    registry.register()
    lost = registry.subject("v1.file.ingested")
    del fake.schemas[lost]
    with pytest.raises(ConfigurationError, match=f"lacks the schemas of {lost}: run `artifact-store migrate`"):
        registry.ids()


@pytest.mark.parametrize("level", ["NONE", None])
def test_a_subject_that_takes_any_schema_is_named(
    fake: FakeRegistry, registry: SchemaRegistry, level: str | None
) -> None:
    registry.register()
    subject = registry.subject("v1.package.created")
    del fake.levels[subject]
    if level is not None:
        fake.levels[subject] = level
    trouble = registry.trouble() or ""
    assert f"{subject} ({level or 'the default'})" in trouble
    assert "artifact-store migrate" in trouble
    registry.register()
    assert registry.trouble() is None


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, UnavailableError), (429, UnavailableError), (401, ConfigurationError), (409, ConfigurationError)],
)
def test_a_refusal_says_what_the_registry_said(
    fake: FakeRegistry, registry: SchemaRegistry, status: int, error: type[Exception]
) -> None:
    fake.status = status
    with pytest.raises(error, match=f"with {status}: it was told to"):
        registry.register()


def test_a_registry_that_is_away_is_unavailable() -> None:
    (port,) = free_ports(1)
    with pytest.raises(UnavailableError, match="ARTIFACT_STORE_SCHEMA_REGISTRY_URL"):
        SchemaRegistry(f"http://127.0.0.1:{port}", "p.events").ids()


def test_credentials_in_the_url_are_sent_and_not_shown(fake: FakeRegistry) -> None:
    url = fake.url.replace("://", "://me:p%40ss@")
    fake.status = 403
    with pytest.raises(ConfigurationError) as refused:
        SchemaRegistry(f"{url}/below", "p.events").register()
    assert "p%40ss" not in refused.value.detail
    (_, path, sent), *_ = fake.requests
    assert path.startswith("/below/subjects/")
    assert sent == f"Basic {base64.b64encode(b'me:p@ss').decode()}"


@pytest.mark.parametrize(
    "url", ["registry:8081", "ftp://registry", "http://", "http://a:b", "http://r/?x=1", "http://[x"]
)
def test_a_url_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SCHEMA_REGISTRY_URL"):
        SchemaRegistry(url, "p.events")
