"""What is asked of the Kafka cluster: the topic's identity and shape, offsets, groups. Every question blocks."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from threading import Lock
from typing import Any
from uuid import UUID

import confluent_kafka.admin
from confluent_kafka import (
    ConsumerGroupState,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from services.log.kafka.connection import (
    KafkaSettings,
    OutsideError,
    explaining,
    kafka_error,
    make_admin,
    make_consumer,
)

# The package's types neither cover all that its documentation names nor mark it as exported.
_admin: Any = confluent_kafka.admin

ANSWER_SECONDS = 10.0
"""How long a question waits for its answer."""

_CLIENT_SECONDS = 3.0
"""How long one client may be silent before another is asked."""

_CONFIRMATIONS = 3
"""How many clients are asked, at least, before an offset is said to lie outside the log."""

_AGAIN_SECONDS = 0.05
_SPENT = frozenset(
    {
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._DESTROY,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_COORDINATOR,
    }
)
"""Another client is to be asked: this one is silent, or goes on to ask a coordinator that is none any more."""

_LED_BY_OTHERS = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError._NOENT,  # the client's own word for a partition whose leader is not known yet
    }
)
_MOVING = frozenset(
    {
        *_LED_BY_OTHERS,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_CONTROLLER,
    }
)

_HAS_MEMBERS = frozenset({KafkaError.NON_EMPTY_GROUP, KafkaError.UNKNOWN_MEMBER_ID})


@dataclass(frozen=True, slots=True)
class Topic:
    """The topic as the cluster has it: Kafka's topic id (KIP-516), and `replicas`, the fewest of any partition."""

    identity: UUID
    partitions: int
    replicas: int

    def difference(self, now: Topic) -> str | None:
        """What makes it another log by now, if anything does."""
        if now.identity != self.identity:
            return f"the topic was made anew: it was log {self.identity}, it is log {now.identity}"
        if now.partitions != self.partitions:
            return (
                f"the topic has {now.partitions} partitions by now, it had {self.partitions}: most packages would go "
                "on in others than their events are in. Restore it with as many as it had"
            )
        return None


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a consumer group and the partitions of our topic that are assigned to it."""

    member_id: str
    client_id: str
    partitions: frozenset[int]


class Cluster:
    """Questions to the cluster, from any thread; each blocks for ANSWER_SECONDS at most.

    All raise UnavailableError, and ConfigurationError when the topic or the right to see it is missing.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        """Connects to nothing yet."""
        self._kafka = kafka
        self._lock = Lock()
        self._made: AdminClient | None = None
        self._identity: UUID | None = None
        self._epochs: dict[int, int] = {}
        """The newest leader epoch that has answered for a partition of the topic of `_identity`."""
        self._confirming = Lock()
        self._confirmed: dict[int, tuple[int, int]] = {}
        self._confirmed_from = -math.inf

    def topic(self) -> Topic:
        """Describe the topic. Raises ConfigurationError: the brokers are too old."""
        name = self._kafka.topic
        found = self._ask("describing the topic", lambda admin: admin.describe_topics(TopicCollection([name])))[name]
        identity = UUID(bytes=base64.urlsafe_b64decode(f"{found.topic_id}=="))
        if not identity.int:
            raise ConfigurationError(
                "the brokers give topics no identity (KIP-516), which tells logs apart: upgrade them"
            )
        with self._lock:
            if self._identity not in (None, identity):
                self._epochs = {}
            self._identity = identity
        return Topic(identity, len(found.partitions), min(len(p.replicas) for p in found.partitions))

    def topic_settings(self) -> Mapping[str, str]:
        """The topic's settings in effect, whatever level they come from."""
        resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, self._kafka.topic)
        found = self._ask("reading the topic's settings", lambda admin: admin.describe_configs([resource]))
        return {name: entry.value for name, entry in found[resource].items()}

    def set_on_topic(self, settings: Mapping[str, str]) -> None:
        """Change these of the topic's settings. Raises ConfigurationError when the cluster refuses it."""
        entries = [
            _admin.ConfigEntry(name, value, incremental_operation=_admin.AlterConfigOpType.SET)
            for name, value in settings.items()
        ]
        resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, self._kafka.topic, incremental_configs=entries)
        self._ask("changing the topic's settings", lambda admin: admin.incremental_alter_configs([resource]))

    def create_topic(self, settings: Mapping[str, str]) -> bool:
        """Create the topic; False when it was there already. Raises ConfigurationError when the cluster refuses it."""
        kafka = self._kafka
        topic = _admin.NewTopic(kafka.topic, kafka.partitions, kafka.replication_factor, config=dict(settings))
        try:
            self._answers(lambda admin: admin.create_topics([topic]))
        except KafkaException as error:
            found = kafka_error(error)
            if found is not None and found.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return False
            with explaining("creating the topic"):
                raise
        except TimeoutError:
            with explaining("creating the topic"):
                raise
        self._await_topic()
        return True

    def _await_topic(self) -> None:
        """Brokers learn of a new topic one after another; wait until its partitions answer."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                self.high_watermark(range(self._kafka.partitions))
                return
            except ConfigurationError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_AGAIN_SECONDS)

    def earliest(self, partitions: Iterable[int]) -> dict[int, int]:
        """Per partition, the first offset that is still there."""
        return self._offsets(partitions, _admin.OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED)

    def latest_times(self, partitions: Iterable[int]) -> dict[int, int]:
        """Per partition, the latest time of a record (ms since 1970); a partition without records is absent."""
        spec = _admin.OffsetSpec.max_timestamp()
        request = {TopicPartition(self._kafka.topic, p): spec for p in partitions}
        found = self._ask("asking for times", lambda admin: admin.list_offsets(request), or_nothing=True)
        return {p.partition: result.timestamp for p, result in found.items() if result.timestamp >= 0}

    def at_time(self, partition: int, time_ms: int) -> int:
        """The first offset with a record of this time (ms since 1970) or later; 0 when there is none."""
        place = TopicPartition(self._kafka.topic, partition)
        request = {place: _admin.OffsetSpec.for_timestamp(time_ms)}
        found = self._ask("asking for an offset", lambda admin: admin.list_offsets(request), or_nothing=True)
        offset: int = found[place].offset
        return max(0, offset)

    def last_stable(self, partitions: Iterable[int]) -> dict[int, int]:
        """Per partition, the offset up to which every transaction is decided; committed readers get this far.

        A leader that was deposed may answer, with an older end: see `outside`.
        """
        return self._latest(partitions, IsolationLevel.READ_COMMITTED)

    def high_watermark(self, partitions: Iterable[int]) -> dict[int, int]:
        """Per partition, the offset behind the last replicated record, open transactions included."""
        return self._latest(partitions, IsolationLevel.READ_UNCOMMITTED)

    def outside(self, offsets: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Those of the offsets, by partition, that lie outside the log; with its first offset and its last stable one.

        For whoever would otherwise stop for good. A leader that was deposed and does not know it answers with an older
        end, so new clients ask through each bootstrap server in turn, and the newest leader that any of them knows of
        is believed. Callers that wait at the same time share the answers.
        """
        came = time.monotonic()
        with self._confirming:
            if self._confirmed_from < came:
                began = time.monotonic()
                self._confirmed = self._confirm()
                self._confirmed_from = began
            bounds = self._confirmed
        return {p: bounds[p] for p, offset in offsets.items() if not bounds[p][0] <= offset <= bounds[p][1]}

    def judged(self, error: OutsideError, offsets: Mapping[int, int]) -> ArtifactStoreError:
        """What it means that a broker does not hold one of these offsets: `error`, unless the newest leader holds them.

        Raises UnavailableError when nobody can be asked.
        """
        if self.outside(offsets):
            return error
        return UnavailableError("a broker that is cut off from the others does not hold what was to be read")

    def _confirm(self) -> dict[int, tuple[int, int]]:
        partitions = range(self._kafka.partitions)
        spec, uncommitted, committed = _admin.OffsetSpec, IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED
        doors = self._kafka.bootstrap.split(",")
        best: dict[int, tuple[int, int, int]] = {}
        for door in islice(cycle(doors), max(_CONFIRMATIONS, len(doors))):
            admin = make_admin({**self._kafka.admin(), "bootstrap.servers": door})
            # A server that is down, or leads nowhere, says nothing.
            with suppress(KafkaException, TimeoutError):
                earliest = _answered(self._listed(admin, partitions, spec.earliest(), uncommitted), _CLIENT_SECONDS)
                latest = _answered(self._listed(admin, partitions, spec.latest(), committed), _CLIENT_SECONDS)
                for place, last in latest.items():
                    p, first = place.partition, earliest[place]
                    best[p] = max(best.get(p, (-1, -1, -1)), (_epoch(last), last.offset, first.offset))
        if len(best) < len(partitions):
            raise UnavailableError("no bootstrap server says where the log begins and ends")
        self._note_epochs({p: epoch for p, (epoch, _, _) in best.items()})
        return {p: (first, last) for p, (_, last, first) in best.items()}

    def committed(self, group: str) -> dict[int, tuple[int, str]]:
        """What the group has committed, by partition: offset and metadata; a partition without a commit is absent.

        A consumer that never joins the group asks, not an admin client, which would end the process: librdkafka 2.16.0
        follows a null pointer when OffsetFetch is answered NOT_COORDINATOR and the client is no consumer
        (confluentinc/librdkafka#5318).
        """
        partitions = [TopicPartition(self._kafka.topic, p) for p in range(self.topic().partitions)]
        consumer = make_consumer({**self._kafka.reader(), "group.id": group})
        try:
            with explaining("reading a group's offsets"):
                found = consumer.committed(partitions, ANSWER_SECONDS)
                for place in found:
                    if place.error is not None:
                        raise KafkaException(place.error)
        finally:
            consumer.close()
        return {p.partition: (p.offset, p.metadata or "") for p in found if p.offset >= 0}

    def commit(self, group: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        """Commit offsets for a group that has no members; False, and nothing is committed, when it has some."""
        parts = [TopicPartition(self._kafka.topic, p, offset, metadata) for p, offset in next_offsets.items()]
        request = ConsumerGroupTopicPartitions(group, parts)
        with explaining("committing a group's offsets"):
            try:
                found = self._answers(lambda admin: admin.alter_consumer_group_offsets([request]))[group]
                errors = [part.error for part in found.topic_partitions if part.error is not None]
                if errors:
                    raise KafkaException(errors[0])
            except KafkaException as error:
                refused = kafka_error(error)
                if refused is not None and refused.code() in _HAS_MEMBERS:
                    return False
                raise
        return True

    def groups(self, prefix: str) -> list[str]:
        """The consumer groups whose names begin with this."""
        listed = self._ask("listing consumer groups", lambda admin: {"groups": admin.list_consumer_groups()})["groups"]
        return sorted(found.group_id for found in listed.valid if found.group_id.startswith(prefix))

    def members(self, group: str) -> list[Member] | None:
        """The group's members; None while it is between two assignments."""
        found = self._ask("describing a group", lambda admin: admin.describe_consumer_groups([group]))[group]
        if found.state not in (ConsumerGroupState.STABLE, ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD):
            return None
        return [Member(m.member_id, m.client_id, self._assigned(m)) for m in found.members]

    def _assigned(self, member: Any) -> frozenset[int]:
        parts = member.assignment.topic_partitions if member.assignment is not None else []
        return frozenset(p.partition for p in parts if p.topic == self._kafka.topic)

    def _latest(self, partitions: Iterable[int], isolation: IsolationLevel) -> dict[int, int]:
        """Refuses what a leader says that is older than one that has answered before."""
        partitions, deadline = list(partitions), time.monotonic() + ANSWER_SECONDS
        while True:
            found = self._results(partitions, _admin.OffsetSpec.latest(), isolation)
            if self._note_epochs({p: _epoch(result) for p, result in found.items()}):
                return {p: result.offset for p, result in found.items()}
            if time.monotonic() > deadline:
                raise UnavailableError("a broker that leads a partition no more says where it ends")
            self._discard(self._admin())
            self.topic()  # one that was made anew begins with the first epoch again
            time.sleep(_AGAIN_SECONDS)

    def _note_epochs(self, epochs: Mapping[int, int]) -> bool:
        """Whether none of these leaders is older than one that has answered before."""
        with self._lock:
            if any(epoch < self._epochs.get(p, epoch) for p, epoch in epochs.items() if epoch >= 0):
                return False
            self._epochs.update({p: epoch for p, epoch in epochs.items() if epoch >= 0})
            return True

    def _offsets(self, partitions: Iterable[int], spec: Any, isolation: IsolationLevel) -> dict[int, int]:
        return {p: result.offset for p, result in self._results(partitions, spec, isolation).items()}

    def _results(self, partitions: Iterable[int], spec: Any, isolation: IsolationLevel) -> dict[int, Any]:
        found = self._ask("asking for offsets", lambda admin: self._listed(admin, partitions, spec, isolation))
        return {p.partition: result for p, result in found.items()}

    def _listed(
        self, admin: AdminClient, partitions: Iterable[int], spec: Any, isolation: IsolationLevel
    ) -> dict[Any, Future[Any]]:
        request = {TopicPartition(self._kafka.topic, p): spec for p in partitions}
        return admin.list_offsets(request, isolation_level=isolation) if request else {}

    def _ask(
        self, doing: str, question: Callable[[AdminClient], dict[Any, Future[Any]]], *, or_nothing: bool = False
    ) -> dict[Any, Any]:
        with explaining(doing):
            return self._answers(question, or_nothing=or_nothing)

    def _answers(
        self, question: Callable[[AdminClient], dict[Any, Future[Any]]], *, or_nothing: bool = False
    ) -> dict[Any, Any]:
        """Ask, and again while leaders or coordinators move, until ANSWER_SECONDS are over.

        With `or_nothing`, that there is no such offset is an answer.

        A client whose broker was restarted may never get an answer about groups again, or keeps to the coordinator that
        it was; another one does not.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            admin = self._admin()
            admin.poll(0)  # hands over what the client has to log
            try:
                left = max(_AGAIN_SECONDS, min(_CLIENT_SECONDS, deadline - time.monotonic()))
                return _answered(question(admin), left, or_nothing=or_nothing)
            except TimeoutError:
                self._discard(admin)
                if time.monotonic() > deadline:
                    raise
            except KafkaException as error:
                found = kafka_error(error)
                code = found.code() if found is not None else KafkaError.UNKNOWN
                if code in _SPENT:
                    self._discard(admin)
                elif code not in _MOVING:
                    raise
                elif code in _LED_BY_OTHERS:
                    self._look_for_leaders(admin)
                if time.monotonic() > deadline:
                    raise
            time.sleep(_AGAIN_SECONDS)

    def _look_for_leaders(self, admin: AdminClient) -> None:
        """A client asks the leaders that it knows again and again, and learns of others only when told to look."""
        # Asking for metadata of a topic that was deleted could make it anew; describing it does not.
        for described in admin.describe_topics(TopicCollection([self._kafka.topic])).values():
            with suppress(KafkaException, TimeoutError):
                described.result(_CLIENT_SECONDS)

    def _discard(self, admin: AdminClient) -> None:
        with self._lock:
            if self._made is admin:
                self._made = None

    def _admin(self) -> AdminClient:
        with self._lock:
            if self._made is None:
                self._made = make_admin(self._kafka.admin())
            return self._made

    def close(self) -> None:
        """Release the connections."""
        with self._lock:
            self._made = None


_NO_OFFSET = -1  # of ListOffsets, as Kafka answers it


def _answered(futures: Mapping[Any, Future[Any]], seconds: float, *, or_nothing: bool = False) -> dict[Any, Any]:
    return {key: _answer(future, seconds, or_nothing=or_nothing) for key, future in futures.items()}


def _epoch(result: Any) -> int:
    """The epoch of the leader that has answered; -1 when it does not say."""
    return -1 if result.leader_epoch is None else int(result.leader_epoch)


def _answer(future: Future[Any], seconds: float, *, or_nothing: bool) -> Any:
    """The answer, unless it is none: of a leader whose answer was lost librdkafka gives offset -1001 and no error.

    Taken for the end of the log, it would let a writer serve from an empty state.
    """
    answer = future.result(seconds)
    if isinstance(answer, _admin.ListOffsetsResultInfo) and answer.offset < (_NO_OFFSET if or_nothing else 0):
        raise KafkaException(KafkaError(KafkaError.OFFSET_NOT_AVAILABLE))
    return answer
