"""Headers of records: enough to route, filter and recognise an event without decoding it."""

from __future__ import annotations

from uuid import UUID, uuid4

from schemas.codec import encode
from schemas.digests import event_digest
from schemas.headers import headers
from services.core.decide import Limits, decide
from services.core.state import evolve
from tests.commands import create, finalize

LOG = UUID("6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11")
NOW = 1_900_000_000_000_000


def test_every_record_names_its_type_schema_log_and_origin() -> None:
    state = evolve(None, decide(None, create(), NOW, Limits())[0])
    (event,) = decide(state, finalize(state.package_id), NOW, Limits())
    raw = headers(event, LOG, state.created)
    found = {name: value.decode() if isinstance(value, bytes) else value for name, value in raw.items()}
    fingerprint = encode(event)[2:10].hex()
    assert found == {
        "event_type": "v1.package.finalized",
        "event_version": "1",
        "command_id": str(event.command_id),
        "command_index": "0",
        "command_count": "1",
        "content-type": "avro/binary",
        "ce_specversion": "1.0",
        "ce_id": event_digest(event).hex(),
        "ce_source": f"urn:artifact-store:log:{LOG}",
        "ce_type": "v1.package.finalized",
        "ce_subject": str(state.package_id),
        "ce_time": "2030-03-17T17:46:40Z",
        "ce_dataschema": f"urn:artifact-store:schema:{fingerprint}",
        "producer": state.created.producer,
        "subject": state.created.subject,
        "retention_class": state.created.retention_class,
    }


def test_two_records_of_one_number_differ_in_their_id() -> None:
    """A transaction was aborted, and the command that it held is decided again."""
    state = evolve(None, decide(None, create(), NOW, Limits())[0])
    command = finalize(state.package_id)
    (aborted,), (committed,) = (decide(state, command, NOW + later, Limits()) for later in (0, 1))
    assert aborted.event_id == committed.event_id
    first, second = (headers(event, LOG, state.created)["ce_id"] for event in (aborted, committed))
    assert first != second


def test_the_same_event_of_two_installations_differs_in_its_source() -> None:
    (event,) = decide(None, create(), NOW, Limits())
    first, second = (headers(event, log, None)["ce_source"] for log in (uuid4(), uuid4()))
    assert first != second
