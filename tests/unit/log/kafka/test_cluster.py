"""Which broker is believed about a partition's end: the one with the newest leader that any broker knows of."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import confluent_kafka.admin
import pytest
from confluent_kafka import KafkaError, KafkaException

from artifact_store.errors import UnavailableError
from services.config import Settings
from services.log.kafka import cluster as cluster_module
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import KafkaSettings

# The package's types do not mark what its documentation names as exported.
_admin: Any = confluent_kafka.admin


class Door:
    """A client that knows the brokers as one bootstrap server does: an epoch and an end, or that the server is down."""

    def __init__(self, epoch: int, end: int, identity: int = 1, *, down: bool = False) -> None:
        self.epoch = epoch
        self.end = end
        self.identity = identity
        self.down = down

    def poll(self, _: float) -> None:
        pass

    def list_offsets(self, request: Mapping[Any, Any], **_: Any) -> dict[Any, Future[Any]]:
        earliest = "EarliestSpec" in {type(spec).__name__ for spec in request.values()}
        return self._told(request, _admin.ListOffsetsResultInfo(0 if earliest else self.end, -1, self.epoch))

    def describe_topics(self, topics: Any) -> dict[Any, Future[Any]]:
        text = base64.urlsafe_b64encode(UUID(int=self.identity).bytes).decode().rstrip("=")
        partition = SimpleNamespace(id=0, replicas=[1, 2, 3], isr=[1, 3])
        return self._told(["t.events"], SimpleNamespace(topic_id=text, partitions=[partition]))

    def _told(self, keys: Iterable[Any], answer: object) -> dict[Any, Future[Any]]:
        futures: dict[Any, Future[Any]] = {key: Future() for key in keys}
        for future in futures.values():
            if self.down:
                future.set_exception(KafkaException(KafkaError(KafkaError._TRANSPORT)))
            else:
                future.set_result(answer)
        return futures


class Cast:
    """Which client comes next: those of single doors by their address, others in turn."""

    def __init__(self, doors: Mapping[str, Door], others: Iterable[Door]) -> None:
        self.doors = doors
        self.others = list(others)
        self.asked: list[str] = []

    def make(self, config: Mapping[str, Any]) -> Door:
        servers = config["bootstrap.servers"]
        if servers in self.doors:
            self.asked.append(servers)
            return self.doors[servers]
        return self.others.pop(0) if len(self.others) > 1 else self.others[0]


def brokers(monkeypatch: pytest.MonkeyPatch, doors: Mapping[str, Door], *others: Door) -> tuple[Cluster, Cast]:
    cast = Cast(doors, others)
    monkeypatch.setattr(cluster_module, "make_admin", cast.make)
    settings = Settings(log_url=f"kafka://{','.join(doors)}/t", kafka_partitions=1)
    return Cluster(KafkaSettings.of(settings)), cast


def test_an_offset_beyond_what_a_deposed_leader_holds_is_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    deposed, leader = Door(5, 10), Door(6, 20)
    cluster, cast = brokers(monkeypatch, {"a:1": deposed, "b:1": leader, "c:1": Door(6, 20, down=True)}, deposed)
    assert cluster.last_stable([0]) == {0: 10}
    assert cluster.outside({0: 15}) == {}
    assert cluster.outside({0: 21}) == {0: (0, 20)}
    assert cast.asked == ["a:1", "b:1", "c:1"] * 2


def test_the_newest_leader_is_believed_although_it_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = brokers(monkeypatch, {"a:1": Door(5, 30), "b:1": Door(6, 20)}, Door(6, 20))
    assert cluster.outside({0: 25}) == {0: (0, 20)}


def test_a_leader_older_than_one_that_has_answered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, cast = brokers(monkeypatch, {"a:1": Door(6, 20), "b:1": Door(6, 20)}, Door(6, 20))
    assert cluster.last_stable([0]) == {0: 20}
    cluster.close()
    cast.others = [Door(5, 10), Door(5, 10), Door(7, 30)]
    assert cluster.last_stable([0]) == {0: 30}


def test_nobody_s_word_is_taken_when_no_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = brokers(monkeypatch, dict.fromkeys(("a:1", "b:1"), Door(6, 20, down=True)), Door(6, 20))
    with pytest.raises(UnavailableError):
        cluster.outside({0: 1})


def test_a_partition_of_which_a_replica_is_not_in_sync_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = brokers(monkeypatch, {"a:1": Door(6, 20)}, Door(6, 20))
    assert cluster.topic().under_replicated == (0,)


def test_a_topic_that_was_made_anew_is_not_taken_for_an_old_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, cast = brokers(monkeypatch, {"a:1": Door(6, 20), "b:1": Door(6, 20)}, Door(6, 20))
    cluster.topic()
    assert cluster.last_stable([0]) == {0: 20}
    cluster.close()
    cast.others = [Door(0, 3, identity=2)]
    assert cluster.last_stable([0]) == {0: 3}
