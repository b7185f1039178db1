"""Named mistakes in the product that the simulation must find: each removes what keeps a promise.

A mutation replaces whole functions of the product; one whose function no longer exists fails, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from services.core import decide as decide_module
from services.log.kafka import driver as driver_module
from services.log.kafka.cluster import Cluster
from services.log.kafka.driver import COMMIT_SECONDS, INIT_SECONDS, PartitionLease
from services.log.kafka.ownership import Owners
from services.log.kafka.topic import Guard
from services.log.state import partition_state
from services.log.state.partition_state import PartitionState
from services.views.engine import source as assignment
from tests.simulation.clients import Producer, World
from tests.simulation.faults import Focus

_Patch = tuple[object, str, object]


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with this mistake; None: with none. Raises KeyError for a name that is unknown."""
    patches = [] if name is None else MUTATIONS[name].patches()
    before = [(where, attribute, getattr(where, attribute)) for where, attribute, _ in patches]
    try:
        for where, attribute, value in patches:
            setattr(where, attribute, value)
        yield
    finally:
        for where, attribute, value in before:
            setattr(where, attribute, value)


def _end_by_list_offsets() -> list[_Patch]:
    """A take-over asks the cluster for the end, and believes whichever broker answers."""

    def barrier(self: Any) -> int:
        return int(self._cluster.high_watermark([self._partition])[self._partition]) - 1

    return [
        (PartitionLease, "_barrier", barrier),
        (PartitionLease, "_require_all_read", lambda _: None),
        (Cluster, "_note_epochs", lambda *_: True),
        (Cluster, "judged", lambda _, error, __: error),
    ]


def _no_proof() -> list[_Patch]:
    """A refusal rests on the state as it is, although another may have taken over."""
    return [(PartitionLease, "prove", lambda _: None)]


def _restore_before_fence() -> list[_Patch]:
    """A take-over reads first, and cuts off its predecessors then."""
    restore = cast("Any", PartitionLease)._restore

    class LateFence(Producer):
        def init_transactions(self, timeout: float = -1) -> None:
            self._id = self._epoch = -1

        def fence(self) -> None:
            super().init_transactions(INIT_SECONDS)

    def restore_then_fence(self: Any, barrier: int) -> None:
        restore(self, barrier)
        World.scheduler.sleep(5.0)  # what reading a long partition takes
        self._producer.fence()

    return [
        *_end_by_last_stable(),
        (driver_module, "make_producer", LateFence),
        (PartitionLease, "_restore", restore_then_fence),
    ]


def _end_by_last_stable() -> list[_Patch]:
    def barrier(self: Any) -> int:
        return int(self._cluster.last_stable([self._partition])[self._partition]) - 1

    return [(PartitionLease, "_barrier", barrier), (PartitionLease, "_require_all_read", lambda _: None)]


def _acknowledge_before_read_back() -> list[_Patch]:
    """A commit counts as soon as the client says so; what was appended is read back before the next one."""
    hand_over, idle, prove = PartitionLease.hand_over, PartitionLease.idle, PartitionLease.prove
    waiting: dict[int, Sequence[bytes]] = {}

    def commit(self: Any, values: Sequence[bytes]) -> None:
        self._producer.flush(COMMIT_SECONDS)
        self._producer.commit_transaction(COMMIT_SECONDS)
        self._first_committed = True
        waiting[id(self)] = values

    def reading_back(then: Callable[..., Any]) -> Callable[..., Any]:
        def read_back(self: Any, *args: Any) -> Any:
            if (values := waiting.pop(id(self), None)) is not None:
                self.state.confirm(self._read_back(values), values[-1])
            return then(self, *args)

        return read_back

    return [
        (PartitionLease, "commit", commit),
        (PartitionLease, "hand_over", reading_back(hand_over)),
        (PartitionLease, "idle", reading_back(idle)),
        (PartitionLease, "prove", reading_back(prove)),
    ]


def _state_ahead_of_log() -> list[_Patch]:
    """A state file is written with what was decided, before the log has it."""
    save = PartitionState.save

    def save_all(self: Any) -> None:
        self._ahead = False
        save(self)

    return [(PartitionState, "save", save_all)]


def _guard_only_at_start() -> list[_Patch]:
    """What a topic keeps is looked at when a gateway starts, and never again."""
    return [(Guard, "look", lambda _: None)]


def _owners_forgotten() -> list[_Patch]:
    """While the group cannot be asked, nobody knows who owned what."""
    ask = cast("Any", Owners)._ask

    async def ask_and_forget(self: Any) -> None:
        await ask(self)
        if self._failure is not None:
            self._known = None

    return [(Owners, "_ask", ask_and_forget)]


def _bad_record_closes_partition() -> list[_Patch]:
    """What an operator confirmed about a record that is no event opens its partition for nobody."""
    return [(PartitionLease, "_is_skipped", lambda *_: False)]


def _loss_overlooked() -> list[_Patch]:
    """A state whose record the log does not hold is thrown away, and the log is believed."""
    return [(PartitionLease, "_lost", lambda *_: None)]


def _memory_forgotten() -> list[_Patch]:
    """A writer that takes over again has forgotten what it had read itself, as far as no state file has it."""
    return [(PartitionLease, "_remember", lambda *_: None)]


def _append_to_a_shorter_log() -> list[_Patch]:
    """A writer commits what it decided although the log ends before what it was decided on."""
    return [(PartitionLease, "_require_all_read", lambda _: None)]


def _repeat_is_a_contradiction() -> list[_Patch]:
    """An event that its package has already, as mirrors that repeat make, is taken for a wrong one."""
    return [(partition_state, "repeats", lambda *_: False)]


def _answers_to_anybody() -> list[_Patch]:
    """Whoever sends a command in an actor's name gets the answer to another's command of the same id."""
    known: Callable[[Any, Any], Any] = vars(decide_module)["_known"]

    def known_by_its_actor(state: Any, command: Any) -> Any:
        found = state.commands.get(command.command_id)
        return known(state, command if found is None else replace(command, principal=found.principal))

    return [(decide_module, "_known", known_by_its_actor)]


def _any_rewind_empties_the_view() -> list[_Patch]:
    """One partition whose offset a tool has set back is enough for the view to be emptied and folded again."""

    def folds_again(_: str, committed: Any, position: Any, __: Any) -> bool:
        return any(not text and offset < position.offsets.get(p, 0) for p, (offset, text) in committed.items())

    return [(assignment, "folds_again", folds_again)]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mistake, and what a run that looks for it looks at most."""

    patches: Callable[[], list[_Patch]]
    focus: Focus = field(default_factory=Focus)


_DEPOSED = Focus(("cut a broker off from controller and peers",))
_LOSS = Focus(("the log loses its tail", "kill a gateway", "freeze a gateway"))
_OVERLAP = Focus(("freeze a gateway", "expel a member", "cut a process off from brokers"))

MUTATIONS = {
    "end-by-list-offsets": Mutation(_end_by_list_offsets, _DEPOSED),
    "refuse-without-proof": Mutation(_no_proof, Focus(("freeze a gateway",))),
    "restore-before-fence": Mutation(_restore_before_fence, _OVERLAP),
    "acknowledge-before-read-back": Mutation(_acknowledge_before_read_back),
    "guard-only-at-start": Mutation(_guard_only_at_start, Focus(("settings change",), calm=True)),
    "owners-forgotten": Mutation(_owners_forgotten, Focus(("members of groups untold",), calm=True)),
    "bad-record-closes-partition": Mutation(_bad_record_closes_partition, Focus(("a stranger's committed record",))),
    "loss-overlooked": Mutation(_loss_overlooked, Focus(("the log loses its tail",))),
    "memory-forgotten": Mutation(_memory_forgotten, Focus(("the log loses its tail",))),
    "append-to-a-shorter-log": Mutation(_append_to_a_shorter_log, _LOSS),
    "repeat-is-a-contradiction": Mutation(_repeat_is_a_contradiction, Focus(("a mirror repeats", "kill a gateway"))),
    "answers-to-anybody": Mutation(_answers_to_anybody),
    "any-rewind-empties-the-view": Mutation(_any_rewind_empties_the_view, Focus(("a tool sets a group",))),
    "state-ahead-of-log": Mutation(_state_ahead_of_log, Focus(("answers lost", "late repeats", "kill a broker"))),
}
