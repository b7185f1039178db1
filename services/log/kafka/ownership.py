"""The group of writers: the gateways' consumer group, which assigns partitions and shows who owns them.

`WriterGroup` is this process's membership. The assignment decides who tries to write; the fence decides who may. The
group's consumer reads nothing: its partitions are paused.

`Owners` asks the group who owns which partition. The group's coordinator may be down while all owners are well, so its
last answer is used meanwhile. A process that has lost a partition since then refuses its commands, so an old answer
costs time but never an event.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from threading import Thread
from typing import TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    ConflictError,
    PushBackError,
    UnavailableError,
)
from services.log.kafka.cluster import Cluster, Member
from services.log.kafka.connection import (
    INTERFACE,
    READS_ADMINISTRATIVE,
    READS_PRINCIPALS,
    KafkaSettings,
    explained,
    interface_of,
    kafka_error,
    make_consumer,
)

NO_URL = "artifact-store"
"""The client id of a gateway that others cannot forward to."""

_POLL_SECONDS = 0.25

_POLL_INTERVAL_MS = 60_000
"""How long a rebalance waits for a member that does not take part (ms). A hand-over takes 15 s at most."""

_REJOIN_SECONDS = 0.5

_ASSIGNED_SECONDS = 15.0
"""How long a member waits for an assignment before it asks whether partitions are left without an owner."""

AWAY_SECONDS = (30.0, 600.0)
"""How long a process that cannot write stays out of the group: at first, and at most. It doubles each time."""

_LOOK_SECONDS = 2.0

_RECORDS = {
    READS_ADMINISTRATIVE: "records of the log's own",
    READS_PRINCIPALS: "events that name a principal beside the actor",
}

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class WriterGroup:
    """This process's membership. Its client id is the URL at which other gateways reach it (or NO_URL), then INTERFACE.

    `assigned`, `revoked` and `look_after` are called in the group's own thread. A partition passes to another process
    when `revoked` has returned, unless it was lost already (the second argument). `look_after` is called regularly, and
    returns why this process should leave its partitions to others; None when it can write. `describe` gives the members
    of a group, as `Cluster.members`.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        url: str | None,
        assigned: Callable[[int], None],
        revoked: Callable[[Sequence[int], bool], None],
        look_after: Callable[[], str | None],
        describe: Callable[[str], list[Member] | None],
    ) -> None:
        self.trouble: str | None = "the group of writers was not joined yet"
        self._kafka = kafka
        self._cluster = cluster
        self._client_id = (url or NO_URL) + INTERFACE
        self._assigned = assigned
        self._revoked = revoked
        self._look_after = look_after
        self._describe = describe
        self._closing = Flag()
        self._rejoin = Flag()
        self._away_until = -math.inf
        self._away_seconds = AWAY_SECONDS[0]
        self._member_id: str | None = None
        self._thread = Thread(target=self._run, name="log-writers", daemon=True)

    def start(self) -> None:
        """Join, in a thread. Does not block."""
        self._thread.start()

    def rejoin(self) -> None:
        """Leave and join again, because the group and this process disagree about who owns what. Does not block."""
        self._rejoin.set()

    def close(self) -> None:
        """Leave the group. Blocks until the partitions are handed over."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def members(self) -> list[Member] | None:
        """The members and their partitions; None while the group rebalances. Blocks. Raises UnavailableError."""
        return self._describe(self._kafka.writers_group)

    def owners(self) -> dict[int, Owner] | None:
        """As `members`, by partition."""
        members = self.members()
        if members is None:
            return None
        urls = {m.member_id: m.client_id if m.client_id.startswith("http") else None for m in members}
        return {p: Owner(urls[m.member_id], self.is_self(m)) for m in members for p in m.partitions}

    def is_self(self, member: Member) -> bool:
        """Whether the member is this process."""
        return member.member_id == self._member_id

    def holds(self, partition: int) -> bool | None:
        """Whether the partition is assigned to this process; None while the group rebalances. As `members`."""
        return self._any(lambda member: self.is_self(member) and partition in member.partitions)

    def require_readers(self, interface: int) -> None:
        """Return if all members of the writers' and the projectors' groups can read such records. Blocks.

        `interface` is READS_ADMINISTRATIVE or READS_PRINCIPALS. Raises ConflictError, which names one that cannot, and
        PushBackError if the members are unknown now.
        """
        kafka = self._kafka
        try:
            gateways = self._cluster.groups(kafka.writers_group)  # including those that stay away
            projectors = self._cluster.groups(kafka.projector_group(""))
            groups = [*((group, "gateway") for group in gateways), *((group, "projector") for group in projectors)]
            found = [(group, role, self._describe(group)) for group, role in groups]
        except (UnavailableError, ConfigurationError) as error:
            raise PushBackError(f"it is unknown who could read it: {error.detail}") from error
        for group, role, members in found:
            if members is None:
                raise PushBackError(f"the group {group} is between two assignments; try again in a moment")
            for member in members:
                if interface_of(member.client_id) < interface:
                    raise ConflictError(
                        f"the {role} {member.client_id} (member {member.member_id} of the group {group}) is of a "
                        f"release that cannot read {_RECORDS[interface]}: upgrade it or end it, then try again"
                    )

    def _give_way(self, why: str) -> None:
        """Leave for a while, if there are others that may be able to write. Blocks while it asks.

        A process that is cut off from only one broker stays a member, and would block its partitions for as long as
        that lasts.
        """
        others: bool | None = False
        with suppress(ConfigurationError, UnavailableError):
            others = self._others()
        now = time.monotonic()
        if not others or self._rejoin.is_set() or self._closing.is_set():
            return
        if now - self._away_until > AWAY_SECONDS[1]:
            self._away_seconds = AWAY_SECONDS[0]
        self._note(f"others are to write for {self._away_seconds:.0f} s: {why}")
        self._away_until = now + self._away_seconds
        self._away_seconds = min(2 * self._away_seconds, AWAY_SECONDS[1])
        self._rejoin.set()

    def _others(self) -> bool | None:
        """Whether gateways that this one can forward to are members; None while the group rebalances."""
        return self._any(lambda member: member.client_id.startswith("http") and not self.is_self(member))

    def _is_overlooked(self) -> bool:
        """Whether partitions have no owner in a group that is settled. Blocks.

        A client that was assigned nothing then waits in vain: when a broker was cut off from the others, such clients
        were seen to wait for minutes, while new clients were assigned all partitions within seconds.
        """
        with suppress(ConfigurationError, UnavailableError):
            owners = self.owners()
            return owners is not None and len(owners) < self._cluster.topic().partitions
        return False

    def _any(self, wanted: Callable[[Member], bool]) -> bool | None:
        members = self.members()
        return None if members is None else any(map(wanted, members))

    def _stay_away(self) -> None:
        """Stay out of the group for the time that `_give_way` set, while there are other gateways.

        Meanwhile it is a member of another group, in which `doctor` and `status` find it and ask what is wrong with it.
        """
        if time.monotonic() >= self._away_until:
            return
        consumer = make_consumer(self._kafka.member(self._kafka.aside_group, self._client_id, {}))
        try:
            consumer.subscribe([self._kafka.topic], on_assign=_take_paused)
            looked = time.monotonic()
            while time.monotonic() < self._away_until and not self._closing.is_set():
                consumer.poll(_POLL_SECONDS)
                if time.monotonic() - looked < _LOOK_SECONDS:
                    continue
                looked = time.monotonic()
                with suppress(ConfigurationError, UnavailableError):
                    if self._others() is False:
                        self._away_until = -math.inf
        finally:
            consumer.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._rejoin.clear()
            try:
                self._stay_away()
                self._be_member()
            except (ConfigurationError, UnavailableError) as error:
                self._note(error.detail)
            except KafkaException as error:
                found = kafka_error(error)
                self._note(explained(found, "joining the writers").detail if found else "the group cannot be joined")
            # Join again after any error: outside the group, the process would write nothing until it is restarted.
            except Exception as error:  # noqa: BLE001 - see above; the cause is logged whole
                _LOG.exception("the group of writers was left")
                self._note(f"the group was left: {type(error).__name__}")
            self._closing.wait(_REJOIN_SECONDS)

    def _be_member(self) -> None:
        """Join, and stay until asked to close or to rejoin."""
        bounds = {"max.poll.interval.ms": _POLL_INTERVAL_MS}
        consumer = make_consumer(self._kafka.member(self._kafka.writers_group, self._client_id, bounds))
        try:
            consumer.subscribe(
                [self._kafka.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            asked = time.monotonic()
            while not self._closing.is_set() and not self._rejoin.is_set():
                message = consumer.poll(_POLL_SECONDS)
                if self._member_id is None and time.monotonic() - asked > _ASSIGNED_SECONDS:
                    asked = time.monotonic()
                    if self._is_overlooked():
                        self._note("the group has assigned nothing, although partitions have no owner: joining again")
                        return
                error = message.error() if message is not None else None
                if error is not None:
                    self._note(explained(error, "staying in the group of writers").detail)
                if (why := self._look_after()) is not None:
                    self._give_way(why)
        finally:
            consumer.close()
            self._member_id = None

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        _take_paused(consumer, partitions)
        self._member_id = consumer.memberid()
        self.trouble = None
        for p in partitions:
            self._assigned(p.partition)

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        began, numbers = time.monotonic(), _numbers(partitions)
        self._revoked(numbers, False)
        _LOG.info("partitions %s were given up in %.2f s", numbers, time.monotonic() - began)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Also called while the coordinator is down, because the client times the session by its own clock."""
        self._revoked(_numbers(partitions), True)
        self._note(
            f"partitions {_numbers(partitions)} were lost: the group's coordinator did not hear from this process, or "
            "did not answer it, for session.timeout.ms"
        )

    def _note(self, text: str) -> None:
        if text != self.trouble:
            _LOG.warning("group of writers: %s", text)
        self.trouble = text


def _take_paused(consumer: Consumer, partitions: list[TopicPartition]) -> None:
    # The offset does not matter; without one the client would look it up.
    consumer.incremental_assign([TopicPartition(p.topic, p.partition, 0) for p in partitions])
    consumer.pause(partitions)


def _numbers(partitions: Sequence[TopicPartition]) -> list[int]:
    return sorted(p.partition for p in partitions)


_STILL_OWNED_SECONDS = 1.0
"""How often to check that the owner of a forwarded command still is: a frozen process never answers."""

_FRESH_SECONDS = 1.0
_UNSETTLED_SECONDS = 0.1
"""How old an answer of the group may be: usually, and while it rebalances."""

_FAILED_SECONDS = 0.5
"""How long to wait before asking a group again that did not answer."""

_PATIENCE_SECONDS = 1.0
"""How long callers wait for a new answer of the group before they use the earlier one."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A member of the group. `url` is None if others cannot reach it."""

    url: str | None
    is_self: bool


class Owners:
    """Asks the group who owns which partition, once for all callers that wait at the same time."""

    def __init__(self, ask: Callable[[], Mapping[int, Owner] | None]) -> None:
        """`ask` blocks. It returns None while the group rebalances, and raises UnavailableError, ConfigurationError."""
        self._ask_group = ask
        # A separate thread, because a group that does not answer must not delay other questions.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-owners")
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._closed = False
        self._known: Mapping[int, Owner] | None = None
        """The group's last answer."""
        self._failure: ArtifactStoreError | None = None
        """Why the last question got no answer."""
        self._until = 0.0
        """When to ask the group again, on the monotonic clock (s)."""
        self._least = 0.0
        """The earliest time to ask it again if its answer has proved wrong."""

    async def all(self) -> Mapping[int, Owner]:
        """The owners by partition. Partitions without an owner are absent.

        While the group does not answer, these are the owners that it named last. Raises UnavailableError or
        ConfigurationError if it has not answered yet.
        """
        if self._closed:
            raise UnavailableError("this process asks for no owners any more")
        if time.monotonic() >= self._until:
            if self._question is None or self._question.done():
                self._question = asyncio.create_task(self._ask(), name="log-owners")
                self._asked_at = time.monotonic()
            known = self._known is not None
            patience = max(0.0, self._asked_at + _PATIENCE_SECONDS - time.monotonic()) if known else None
            await asyncio.wait([self._question], timeout=patience)
            if self._closed:
                raise UnavailableError("this process asks for no owners any more")
            if self._question.done():
                self._question.result()
        if self._known is not None:
            return self._known
        if self._failure is not None:
            raise type(self._failure)(self._failure.detail)
        return {}

    async def _ask(self) -> None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask_group)
        except (UnavailableError, ConfigurationError) as error:
            self._failure = error
            self._until = self._least = time.monotonic() + _FAILED_SECONDS
            return
        self._failure = None
        # While the group rebalances, most partitions stay where they were.
        if found is not None:
            self._known = found
        self._until = time.monotonic() + (_FRESH_SECONDS if found is not None else _UNSETTLED_SECONDS)
        self._least = time.monotonic() + _UNSETTLED_SECONDS

    async def while_owned(self, partition: int, owner: Owner, answer: Awaitable[_T]) -> _T:
        """Wait for the answer of a partition's owner. Raises UnavailableError once the partition has another owner."""
        waiting = asyncio.ensure_future(answer)
        looking: asyncio.Future[None] | None = None
        try:
            if not (await asyncio.wait([waiting], timeout=_STILL_OWNED_SECONDS))[0]:
                looking = asyncio.ensure_future(self._goes_elsewhere(partition, owner))
                await asyncio.wait([waiting, looking], return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    await looking
                    raise UnavailableError("the partition went to another process")
            return await waiting
        finally:
            waiting.cancel()
            if looking is not None:
                looking.cancel()

    async def _goes_elsewhere(self, partition: int, owner: Owner) -> None:
        """Return when the group names another owner of the partition."""
        while True:
            # A missing answer does not mean that the partition has another owner.
            with suppress(UnavailableError, ConfigurationError):
                if (await self.all()).get(partition, owner) != owner:
                    return
            await asyncio.sleep(_STILL_OWNED_SECONDS)

    def close(self) -> None:
        """Stop asking. Does not wait for a running question."""
        self._closed = True
        if self._question is not None:
            self._question.cancel()
        self._thread.shutdown(wait=False)

    def forget(self) -> None:
        """Ask the group again, because its answer has proved wrong, unless it was asked a moment ago."""
        self._until = min(self._until, self._least)
