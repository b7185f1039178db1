"""The group's thread: a process without resources for a client or a thread becomes a member again later."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from artifact_store.errors import ConfigurationError, ConflictError, PushBackError, UnavailableError
from services.config import Settings
from services.log.kafka import connection as clients
from services.log.kafka import ownership as group_module
from services.log.kafka.cluster import Member
from services.log.kafka.connection import INTERFACE, READS_ADMINISTRATIVE, READS_PRINCIPALS, KafkaSettings
from services.log.kafka.ownership import NO_URL, WriterGroup


class Quiet:
    """A consumer to which nothing happens."""

    def __init__(self, joined: Event) -> None:
        self._joined = joined

    def subscribe(self, _topics: list[str], **_callbacks: Any) -> None:
        self._joined.set()

    def poll(self, _seconds: float) -> None:
        return None

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), UnavailableError("no room"), KafkaException(KafkaError(KafkaError._FAIL))],
    ids=lambda error: type(error).__name__,
)
def test_the_group_is_joined_again_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    joined = Event()
    failures = iter([error])

    def make(_config: dict[str, Any]) -> Quiet:
        for failure in failures:
            raise failure
        return Quiet(joined)

    monkeypatch.setattr(group_module, "make_consumer", make)
    monkeypatch.setattr(group_module, "_REJOIN_SECONDS", 0.0)
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    group = WriterGroup(
        kafka, cast("Any", None), "gateway", lambda _: None, lambda *_: None, lambda: None, lambda _: None
    )
    group.start()
    assert joined.wait(30)
    assert group.trouble is not None
    group.close()


@pytest.mark.parametrize(
    ("members", "joins_again"),
    [
        ([Member("own", NO_URL, frozenset())], True),
        ([Member("own", NO_URL, frozenset()), Member("other", NO_URL, frozenset({0}))], True),
        ([Member("own", NO_URL, frozenset()), Member("other", NO_URL, frozenset({0, 1}))], False),
        (None, False),
    ],
    ids=["nobody has one", "one is left", "others have all", "between two assignments"],
)
def test_who_was_assigned_nothing_joins_again_if_partitions_have_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[Member] | None, joins_again: bool
) -> None:
    joined, asked = [], Event()

    class Asking(Quiet):
        def __init__(self) -> None:
            super().__init__(Event())
            joined.append(self)

    def describe(_: str) -> list[Member] | None:
        if len(looks) == 3:
            asked.set()
        looks.append(len(joined))
        return members

    looks: list[int] = []
    monkeypatch.setattr(group_module, "make_consumer", lambda _: Asking())
    monkeypatch.setattr(group_module, "_ASSIGNED_SECONDS", 0.0)
    monkeypatch.setattr(group_module, "_REJOIN_SECONDS", 0.0)
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    cluster = SimpleNamespace(topic=lambda: SimpleNamespace(partitions=2))
    group = WriterGroup(kafka, cast("Any", cluster), "gateway", lambda _: None, lambda *_: None, lambda: None, describe)
    group.start()
    assert asked.wait(30)
    group.close()
    assert looks[:4] == ([1, 2, 3, 4] if joins_again else [1, 1, 1, 1])


def test_a_process_whose_writers_cannot_write_leaves_the_group_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several writers complain at the same time: this is one absence."""
    closed = Event()

    class Leaving(Quiet):
        def close(self) -> None:
            closed.set()

    monkeypatch.setattr(group_module, "make_consumer", lambda _: Leaving(Event()))
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    others = [Member("other", "http://127.0.0.1:1", frozenset())]
    complaints = iter(["partition 0 cannot be written to", "partition 1 cannot be written to"])
    group = WriterGroup(
        kafka,
        cast("Any", None),
        "gateway",
        lambda _: None,
        lambda *_: None,
        lambda: next(complaints, None),
        lambda _: others,
    )
    began = time.monotonic()
    group.start()
    assert closed.wait(30)
    assert 0 < group._away_until - began <= group_module.AWAY_SECONDS[0] + time.monotonic() - began
    assert group._away_seconds == 2 * group_module.AWAY_SECONDS[0]
    assert "partition 0 cannot be written to" in (group.trouble or "")
    group.close()


@pytest.mark.parametrize(
    "members",
    [[], [Member("lone", NO_URL, frozenset({0}))], None],
    ids=["nobody", "who cannot be forwarded to", "between two assignments"],
)
def test_who_has_nobody_to_leave_its_partitions_to_does_not_give_way(
    tmp_path: Path, members: list[Member] | None
) -> None:
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    group = WriterGroup(
        kafka, cast("Any", None), "gateway", lambda _: None, lambda *_: None, lambda: None, lambda _: members
    )
    group._give_way("it cannot be written to")
    assert not group._rejoin.is_set()
    assert group._away_until < time.monotonic()


def test_a_member_that_could_not_read_a_record_keeps_it_from_being_written(tmp_path: Path) -> None:
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    own = Member("own", f"http://127.0.0.1:1{INTERFACE}", frozenset())
    groups: dict[str, list[Member] | None] = {
        kafka.writers_group: [own],
        kafka.projector_group("registry"): [Member("fold", f"artifact-store-projector{INTERFACE}", frozenset())],
    }
    cluster = SimpleNamespace(groups=lambda prefix: [group for group in groups if prefix in group])
    group = WriterGroup(
        kafka, cast("Any", cluster), "gateway", lambda _: None, lambda *_: None, lambda: None, groups.__getitem__
    )
    for reads in (READS_ADMINISTRATIVE, READS_PRINCIPALS):
        group.require_readers(reads)
    for name, refused in (("http://old:1", {2, 3}), ("http://new:2/v2", {3}), ("artifact-store-projector/v2", {3})):
        for joined in (kafka.writers_group, kafka.aside_group, kafka.projector_group("registry")):
            before = groups.get(joined, [])
            groups[joined] = [own, Member("other", name, frozenset())]
            for reads in (READS_ADMINISTRATIVE, READS_PRINCIPALS):
                if reads not in refused:
                    group.require_readers(reads)
                    continue
                with pytest.raises(ConflictError, match=f"{name} .*upgrade it or end it"):
                    group.require_readers(reads)
            groups[joined] = before
    groups[kafka.projector_group("registry")] = None
    with pytest.raises(PushBackError, match="between two assignments"):
        group.require_readers(READS_PRINCIPALS)


def test_a_group_that_may_not_be_asked_is_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives way asks the group whether others are there; so does the writer that makes it give way.

    It is a member of another group meanwhile.
    """
    joined, groups = Event(), []

    def make(config: dict[str, Any]) -> Quiet:
        groups.append(config["group.id"])
        return Quiet(joined if config["group.id"] == kafka.writers_group else Event())

    monkeypatch.setattr(group_module, "make_consumer", make)
    monkeypatch.setattr(group_module, "_REJOIN_SECONDS", 0.0)
    monkeypatch.setattr(group_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(group_module, "AWAY_SECONDS", (0.2, 0.4))
    asked = []

    def members(_group: str) -> list[Member]:
        asked.append(joined.is_set())
        if len(asked) == 1:
            return [Member("other", "http://127.0.0.1:1", frozenset())]
        raise ConfigurationError("no right to describe the group")

    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    group = WriterGroup(kafka, cast("Any", None), "gateway", lambda _: None, lambda *_: None, lambda: None, members)
    group._give_way("it cannot be written to")
    group.start()
    assert joined.wait(30)
    assert len(asked) > 1, "it stayed away for a while, and asked"
    assert groups == [kafka.aside_group, kafka.writers_group]
    group._give_way("it cannot be written to")
    group.close()


def test_a_process_that_lost_its_partitions_says_why_until_it_gets_some(tmp_path: Path) -> None:
    lost: list[tuple[Sequence[int], bool]] = []
    kafka = KafkaSettings.of(Settings(log_url="kafka://127.0.0.1:1/x", state_dir=tmp_path))
    group = WriterGroup(
        kafka,
        cast("Any", None),
        "gateway",
        lambda _: None,
        lambda *given: lost.append(given),
        lambda: None,
        lambda _: None,
    )
    group._on_lost(cast("Any", None), [TopicPartition("x.events", number) for number in (2, 0)])
    assert lost == [([0, 2], True)]
    assert "partitions [0, 2] were lost" in (group.trouble or "")
    member = SimpleNamespace(incremental_assign=lambda _: None, pause=lambda _: None, memberid=lambda: "me")
    group._on_assign(cast("Any", member), [])
    assert group.trouble is None


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("Consumer", clients.make_consumer),
        ("Producer", clients.make_producer),
        ("AdminClient", clients.make_admin),
    ],
)
def test_a_system_without_room_for_a_client_is_no_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, kind: str, make: Callable[[dict[str, Any]], object]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE))

    monkeypatch.setattr(clients, kind, full)
    with pytest.raises(UnavailableError, match="_CRIT_SYS_RESOURCE"):
        make({"bootstrap.servers": "127.0.0.1:1"})
