"""Which losses an operator's acceptance covers, and that a state remembers the acceptance."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import pytest

from artifact_store.events import LOSS_ACCEPTED, Event, LossAccepted
from schemas.codec import schema_text
from services.log.records import AcceptedLoss, AdministrativeHead, administrative_event
from services.log.state.loss import FILE, MEMORY, SNAPSHOT, Loss, Witness
from services.log.state.partition_state import PartitionState
from services.log.state.state_file import Anchor, LogPartition, StateFile

LOG, BEFORE, BEFORE_THAT = UUID(int=7), UUID(int=6), UUID(int=5)
PLACE = LogPartition(LOG, "t.events", 3)
MARK = bytes(range(32))


def loss(log: UUID, offset: int, time: int) -> Loss:
    return Loss(PLACE.partition, Witness(FILE, log, Anchor(offset + 1, MARK, time), "state.db"), "ends before")


def accepted(log: UUID, offset: int, time: int) -> AcceptedLoss:
    return AcceptedLoss(log, offset, MARK, time, AdministrativeHead(1, bytes(32)))


@pytest.mark.parametrize(
    ("found", "covered"),
    [
        (loss(LOG, 100, 50), True),
        (loss(LOG, 40, 20), True),  # another machine's, older
        (loss(LOG, 101, 50), False),  # more was lost than anybody knew
        (loss(LOG, 90, 60), False),  # it remembers what came after the acceptance, and that is lost again
        (loss(BEFORE, 40, 20), False),
    ],
)
def test_an_acceptance_covers_what_was_lost_of_its_log_before_it(found: Loss, covered: bool) -> None:
    assert found.accepted_by(accepted(LOG, 100, 60), LOG) is covered


@pytest.mark.parametrize(
    ("found", "covered"),
    [
        (loss(BEFORE, 100, 50), True),
        (loss(BEFORE, 10_000, 70), True),  # all of that topic is gone, whatever its states remember
        (loss(BEFORE_THAT, 40, 20), False),
        (loss(LOG, 40, 20), False),
    ],
)
def test_an_acceptance_covers_all_of_a_topic_that_was_deleted(found: Loss, covered: bool) -> None:
    assert found.accepted_by(accepted(BEFORE, 100, 60), LOG) is covered


@pytest.mark.parametrize(("kind", "evidence"), [(FILE, "file"), (SNAPSHOT, "snapshot"), (MEMORY, "file")])
def test_what_proves_a_loss_is_recorded_by_a_name_that_the_schema_has(kind: str, evidence: str) -> None:
    assert Witness(kind, LOG, Anchor(101, MARK, 50), "somewhere").evidence == evidence
    assert f"`{evidence}`" in schema_text(LOSS_ACCEPTED)


def test_a_state_remembers_what_was_accepted_in_its_log(tmp_path: Path) -> None:
    state = PartitionState(StateFile.create(tmp_path / "state.db", PLACE))
    events: list[Event] = []
    for log, previous in ((LOG, None), (LOG, BEFORE), (uuid4(), None)):  # the last one came with a copy of another log
        payload = LossAccepted(log, PLACE.partition, FILE, previous, 100, MARK, None, 90, "the disk burned")
        after = state.irregular.administrative if log == LOG else None
        event = administrative_event(payload, after, created_at=60 + len(events), actor="ada", command_id=uuid4())
        state.note_administrative(event)
        state.confirm(len(events), b"record")
        events.append(event)
    assert state.close()
    again = PartitionState(StateFile.open(tmp_path / "state.db", PLACE))
    assert again.irregular.accepted == [
        AcceptedLoss(log, 100, MARK, event.created_at, AdministrativeHead.of(event))
        for log, event in zip((LOG, BEFORE), events, strict=False)
    ]
    again.close()
