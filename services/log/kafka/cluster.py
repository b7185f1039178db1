"""Requests to the Kafka cluster about the topic, its offsets and consumer groups. All of them block."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from threading import Lock
from typing import Any, Generic, TypeVar
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
from services.log.kafka.schema_registry import ConfluentFraming, SchemaRegistry
from services.runtime.metrics import OPERATION_FAILURES, OPERATION_SECONDS

_Answer = TypeVar("_Answer")

_SECONDS = OPERATION_SECONDS.labels("log", "question")
_FAILURES = OPERATION_FAILURES.labels("log", "question")

# The package's types do not cover everything that its documentation names, and do not mark it as exported.
_admin: Any = confluent_kafka.admin

ANSWER_SECONDS = 10.0
"""How long a question waits for its answer."""

_CLIENT_SECONDS = 3.0
"""How long one client may take to answer before another one is asked."""

_CONFIRMATIONS = 3
"""At least this many clients are asked before an offset is reported to lie outside the log."""

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
"""Errors after which another client asks: this one gets no answer, or keeps asking a former coordinator."""

_LED_BY_OTHERS = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError._NOENT,  # how the client reports a partition whose leader it does not know yet
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

FRAMING = "delete.retention.ms"
"""The topic's setting that says which framing its values have. Kafka has no place for metadata about a topic. This
setting has no effect on a topic that is not compacted, and is set in the step that creates the topic.
"""

CONFLUENT = "5"
"""The value of FRAMING for Confluent's framing, whose header has five bytes. Every other value means single-object
encoding."""

_HAS_MEMBERS = frozenset({KafkaError.NON_EMPTY_GROUP, KafkaError.UNKNOWN_MEMBER_ID})


@dataclass(frozen=True, slots=True)
class Topic:
    """The topic as described: `identity` is its topic id (KIP-516), `replicas` the lowest number of any partition.

    `under_replicated` are the partitions of which a replica is not in sync, as when a broker is away.
    """

    identity: UUID
    partitions: int
    replicas: int
    under_replicated: tuple[int, ...] = ()

    def difference(self, now: Topic) -> str | None:
        """Why the topic, as described `now`, is no longer the same log; None if it is."""
        if now.identity != self.identity:
            return (
                f"the topic was deleted and created again: it was log {self.identity}, it is log {now.identity}. "
                "Restart the gateways: they then say what is lost"
            )
        if now.partitions != self.partitions:
            return (
                f"the topic now has {now.partitions} partitions instead of {self.partitions}, so most packages would "
                "continue in another partition than their events are in. Restore it with its former number"
            )
        return None


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a consumer group and the partitions of our topic that are assigned to it."""

    member_id: str
    client_id: str
    partitions: frozenset[int]


class Shared(Generic[_Answer]):
    """A request whose answer is shared by all callers that wait at the same time. For any thread."""

    def __init__(self, ask: Callable[[], _Answer]) -> None:
        self._ask = ask
        self._asking = Lock()
        self._last: tuple[float, _Answer] | None = None
        """When the question was last asked, on the monotonic clock (s), and the answer."""

    def answer(self) -> _Answer:
        """The answer to a request that was sent after this call began. Blocks. Raises as the request does."""
        came = time.monotonic()
        with self._asking:
            if self._last is None or self._last[0] < came:
                asked = time.monotonic()
                self._last = asked, self._ask()
            return self._last[1]


class Cluster:
    """Asks the cluster, from any thread. Every request blocks for ANSWER_SECONDS at most.

    All raise UnavailableError, and ConfigurationError if the topic or the right to see it is missing.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        """Connects to nothing yet. Raises ConfigurationError for an invalid URL of the schema registry."""
        self._kafka = kafka
        url = kafka.schema_registry_url
        self.registry = None if url is None else SchemaRegistry(url, kafka.topic)
        self._lock = Lock()
        self._made: AdminClient | None = None
        self._identity: UUID | None = None
        self._epochs: dict[int, int] = {}
        """By partition, the newest leader epoch in any answer so far about the topic with `_identity`."""
        self._bounds = Shared(self._confirm)
        self._framing_lock = Lock()
        self._framing: ConfluentFraming | None = None
        self._framing_known = False

    def topic(self) -> Topic:
        """Describe the topic. Raises ConfigurationError: the brokers are too old."""
        name = self._kafka.topic
        asked = TopicCollection([name])
        found = self._ask(f"describing topic {name}", lambda admin: admin.describe_topics(asked))[name]
        identity = UUID(bytes=base64.urlsafe_b64decode(f"{found.topic_id}=="))
        if not identity.int:
            raise ConfigurationError(
                "the brokers do not give topics an id (KIP-516), which is needed to tell logs apart: upgrade them"
            )
        with self._lock:
            if self._identity not in (None, identity):
                self._epochs = {}
            self._identity = identity
        return Topic(
            identity,
            len(found.partitions),
            min(len(p.replicas) for p in found.partitions),
            tuple(sorted(p.id for p in found.partitions if len(p.isr) < len(p.replicas))),
        )

    def topic_settings(self) -> Mapping[str, str]:
        """The settings in effect for the topic, including the cluster's defaults."""
        resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, self._kafka.topic)
        found = self._ask("reading the topic's settings", lambda admin: admin.describe_configs([resource]))
        return {name: entry.value for name, entry in found[resource].items()}

    def framing(self) -> ConfluentFraming | None:
        """The framing of the topic's values; None for single-object encoding. Asked once, then cached.

        Also raises ConfigurationError if the registry with which the topic was created is not in the settings.
        """
        with self._framing_lock:
            if not self._framing_known:
                if self.topic_settings().get(FRAMING) == CONFLUENT:
                    if self.registry is None:
                        raise ConfigurationError(
                            f"the values of topic {self._kafka.topic} carry ids of a schema registry: set "
                            "ARTIFACT_STORE_SCHEMA_REGISTRY_URL to the one with which the topic was created"
                        )
                    self._framing = ConfluentFraming(self.registry.ids())
                self._framing_known = True
            return self._framing

    def set_on_topic(self, settings: Mapping[str, str]) -> None:
        """Change these settings of the topic. Raises ConfigurationError when the cluster refuses."""
        entries = [
            _admin.ConfigEntry(name, value, incremental_operation=_admin.AlterConfigOpType.SET)
            for name, value in settings.items()
        ]
        resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, self._kafka.topic, incremental_configs=entries)
        self._ask("changing the topic's settings", lambda admin: admin.incremental_alter_configs([resource]))

    def create_topic(self, settings: Mapping[str, str]) -> bool:
        """Create the topic; False if it exists already. Raises ConfigurationError when the cluster refuses."""
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
        """Wait until all partitions of a new topic answer: brokers learn of it one after another."""
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
        """The first offset that each partition still holds."""
        return self._offsets(partitions, _admin.OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED)

    def latest_times(self, partitions: Iterable[int]) -> dict[int, int]:
        """The latest timestamp in each partition (ms since 1970). A partition without records is absent."""
        spec = _admin.OffsetSpec.max_timestamp()
        request = {TopicPartition(self._kafka.topic, p): spec for p in partitions}
        found = self._ask("asking for times", lambda admin: admin.list_offsets(request), or_nothing=True)
        return {p.partition: result.timestamp for p, result in found.items() if result.timestamp >= 0}

    def at_time(self, partitions: Iterable[int], time_ms: int) -> dict[int, int]:
        """The first offset of each partition whose record has this timestamp (ms since 1970) or a later one.

        A partition without such a record is absent.
        """
        request = {TopicPartition(self._kafka.topic, p): _admin.OffsetSpec.for_timestamp(time_ms) for p in partitions}
        found = self._ask("asking for an offset", lambda admin: admin.list_offsets(request), or_nothing=True)
        return {place.partition: answer.offset for place, answer in found.items() if answer.offset >= 0}

    def last_stable(self, partitions: Iterable[int]) -> dict[int, int]:
        """The last stable offset of each partition: read_committed consumers can read up to there.

        A deposed leader may answer with an older offset: see `outside`.
        """
        return self._latest(partitions, IsolationLevel.READ_COMMITTED)

    def high_watermark(self, partitions: Iterable[int]) -> dict[int, int]:
        """The high watermark of each partition: the offset after its last replicated record, committed or not."""
        return self._latest(partitions, IsolationLevel.READ_UNCOMMITTED)

    def outside(self, offsets: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """The partitions whose offset lies outside the log, each with its first offset and its last stable offset.

        Call this before stopping permanently. A deposed leader that does not know it yet answers with an older end. So
        new clients ask through each bootstrap server in turn, and the answer of the newest leader counts. Callers that
        wait at the same time share the answers.
        """
        bounds = self._bounds.answer()
        return {p: bounds[p] for p, offset in offsets.items() if not bounds[p][0] <= offset <= bounds[p][1]}

    def judged(self, error: OutsideError, offsets: Mapping[int, int]) -> ArtifactStoreError:
        """The error to raise when a broker does not hold one of these offsets: `error` if the newest leader agrees.

        Otherwise an UnavailableError: another broker may answer. Raises UnavailableError if no broker can be asked.
        """
        if self.outside(offsets):
            return error
        return UnavailableError("a broker that is cut off from the others does not hold the requested records")

    def _confirm(self) -> dict[int, tuple[int, int]]:
        partitions = range(self._kafka.partitions)
        spec, uncommitted, committed = _admin.OffsetSpec, IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED
        doors = self._kafka.bootstrap.split(",")
        best: dict[int, tuple[int, int, int]] = {}
        for door in islice(cycle(doors), max(_CONFIRMATIONS, len(doors))):
            admin = make_admin({**self._kafka.admin(), "bootstrap.servers": door})
            # A server that is down or cut off does not count.
            with suppress(KafkaException, TimeoutError):
                earliest = _answered(self._listed(admin, partitions, spec.earliest(), uncommitted), _CLIENT_SECONDS)
                latest = _answered(self._listed(admin, partitions, spec.latest(), committed), _CLIENT_SECONDS)
                for place, last in latest.items():
                    p, first = place.partition, earliest[place]
                    best[p] = max(best.get(p, (-1, -1, -1)), (_epoch(last), last.offset, first.offset))
        if len(best) < len(partitions):
            raise UnavailableError("no bootstrap server could tell where the log begins and ends")
        self._note_epochs({p: epoch for p, (epoch, _, _) in best.items()})
        return {p: (first, last) for p, (_, last, first) in best.items()}

    def committed(self, group: str) -> dict[int, tuple[int, str]]:
        """The group's committed offset and metadata, by partition. A partition without a commit is absent.

        A consumer asks, without joining the group, because an admin client can crash the process: librdkafka 2.16.0
        follows a null pointer when OffsetFetch is answered NOT_COORDINATOR and the client is not a consumer
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
        """Commit offsets for a group without members; False if it has members, and then nothing is committed."""
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
        """The consumer groups whose names begin with `prefix`."""
        listed = self._ask("listing consumer groups", lambda admin: {"groups": admin.list_consumer_groups()})["groups"]
        return sorted(found.group_id for found in listed.valid if found.group_id.startswith(prefix))

    def members(self, group: str) -> list[Member] | None:
        """The group's members; None while it rebalances."""
        found = self._ask("describing a group", lambda admin: admin.describe_consumer_groups([group]))[group]
        if found.state not in (ConsumerGroupState.STABLE, ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD):
            return None
        return [Member(m.member_id, m.client_id, self._assigned(m)) for m in found.members]

    def _assigned(self, member: Any) -> frozenset[int]:
        parts = member.assignment.topic_partitions if member.assignment is not None else []
        return frozenset(p.partition for p in parts if p.topic == self._kafka.topic)

    def _latest(self, partitions: Iterable[int], isolation: IsolationLevel) -> dict[int, int]:
        """Asks again while the answer comes from a leader that is older than one that has answered before."""
        partitions, deadline = list(partitions), time.monotonic() + ANSWER_SECONDS
        while True:
            found = self._results(partitions, _admin.OffsetSpec.latest(), isolation)
            if self._note_epochs({p: _epoch(result) for p, result in found.items()}):
                return {p: result.offset for p, result in found.items()}
            if time.monotonic() > deadline:
                raise UnavailableError("only a former leader answers where a partition ends")
            self._discard(self._admin())
            self.topic()  # a topic that was created again starts with the first epoch
            time.sleep(_AGAIN_SECONDS)

    def _note_epochs(self, epochs: Mapping[int, int]) -> bool:
        """Remember the leaders' epochs; False if one of them is older than an earlier answer's."""
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
        with explaining(doing), _SECONDS.time(), _FAILURES.count_exceptions():
            return self._answers(question, or_nothing=or_nothing)

    def _answers(
        self, question: Callable[[AdminClient], dict[Any, Future[Any]]], *, or_nothing: bool = False
    ) -> dict[Any, Any]:
        """Ask, and repeat while leaders or coordinators move, for ANSWER_SECONDS at most.

        With `or_nothing`, "there is no such offset" counts as an answer.

        After a restart of its broker, a client may never again get an answer about groups, or keep asking the former
        coordinator. So a new client is used.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            admin = self._admin()
            admin.poll(0)  # lets the client write its log messages
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
        """Make the client look up the leaders: by itself it keeps asking the ones that it knows."""
        # Asking for the metadata of a deleted topic could create it again; describing it does not.
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


_NO_OFFSET = -1  # what Kafka's ListOffsets returns if there is no such offset


def _answered(futures: Mapping[Any, Future[Any]], seconds: float, *, or_nothing: bool = False) -> dict[Any, Any]:
    return {key: _answer(future, seconds, or_nothing=or_nothing) for key, future in futures.items()}


def _epoch(result: Any) -> int:
    """The epoch of the leader that answered; -1 if the answer has none."""
    return -1 if result.leader_epoch is None else int(result.leader_epoch)


def _answer(future: Future[Any], seconds: float, *, or_nothing: bool) -> Any:
    """Wait for an answer. If a leader's answer was lost, librdkafka gives offset -1001 and no error; this raises then.

    If that offset were taken for the end of the log, a writer would serve from an empty state.
    """
    answer = future.result(seconds)
    if isinstance(answer, _admin.ListOffsetsResultInfo) and answer.offset < (_NO_OFFSET if or_nothing else 0):
        raise KafkaException(KafkaError(KafkaError.OFFSET_NOT_AVAILABLE))
    return answer
