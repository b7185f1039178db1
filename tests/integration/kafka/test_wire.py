"""Commands, answers and errors cross from one gateway to another unchanged; anything else is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import (
    AnswerExpiredError,
    ArtifactStoreError,
    IllegalPackageStateError,
    InvalidRequestError,
    PathConflictError,
    PushBackError,
    RangeNotSatisfiableError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement, IngestedFile
from artifact_store.position import Position
from artifact_store.rules import PathPair
from schemas import identifiers
from schemas.runs import StoredFile
from services.core import wire
from services.core.access import EVERYTHING, Grant, Grants, Packages, Right
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestCheck, IngestFiles
from services.core.wire import (
    decode_acknowledgement,
    decode_check,
    decode_command,
    decode_error,
    encode_acknowledgement,
    encode_check,
    encode_command,
    encode_error,
)
from services.log.port import PartitionNotOwnedError


class DriverUUID(UUID):
    """An identifier as a database driver may give it."""


UUIDS = st.uuids() | st.uuids().map(lambda drawn: DriverUUID(int=drawn.int))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NUMBERS = st.integers(0, 2**63 - 1)
DIGESTS = st.binary(min_size=32, max_size=32)
STORED = st.builds(StoredFile, TEXTS, TEXTS, NUMBERS, DIGESTS, DIGESTS, TEXTS, TEXTS, NUMBERS, NUMBERS, NUMBERS)
INGESTED = st.builds(IngestedFile, UUIDS, TEXTS, NUMBERS, DIGESTS, DIGESTS, NUMBERS, DIGESTS)
PATTERNS = st.lists(TEXTS, min_size=1, max_size=2).map(tuple)
GRANTS: st.SearchStrategy[Grants] = st.just(EVERYTHING) | st.lists(
    st.builds(Grant, st.frozensets(st.sampled_from(Right)), st.builds(Packages, PATTERNS, PATTERNS)), max_size=3
).map(tuple)
NAMES = st.none() | TEXTS
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.builds(CreatePackage, UUIDS, UUIDS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, GRANTS, NAMES),
    st.builds(IngestFiles, UUIDS, UUIDS, TEXTS, st.lists(STORED, max_size=4).map(tuple), GRANTS, NAMES),
    st.builds(FinalizePackage, UUIDS, UUIDS, TEXTS, GRANTS, NAMES),
)
ACKNOWLEDGEMENTS = st.builds(
    Acknowledgement,
    UUIDS,
    NUMBERS,
    DIGESTS,
    st.lists(INGESTED, max_size=4).map(tuple),
    st.none() | DIGESTS,
    NUMBERS,
    st.lists(st.builds(PathPair, TEXTS, TEXTS), max_size=3).map(tuple),
    st.none() | st.builds(Position, st.uuids(), st.dictionaries(st.integers(0, 99), st.integers(0, 2**60))),
)


def all_errors(root: type[ArtifactStoreError] = ArtifactStoreError) -> Iterator[type[ArtifactStoreError]]:
    for cls in root.__subclasses__():
        yield cls
        yield from all_errors(cls)


def made(cls: type[ArtifactStoreError]) -> ArtifactStoreError:
    return cls("why", 7) if cls in (RangeNotSatisfiableError, PushBackError) else cls("why")


@given(COMMANDS)
def test_a_command_arrives_as_it_was_sent(command: Command) -> None:
    assert decode_command(encode_command(command)) == command
    assert decode_command(encode_command(command, 3), 3) == replace(command, principal=None)
    assert decode_command(encode_command(command, 2), 2) == replace(command, grants=EVERYTHING, principal=None)


def test_a_field_that_a_later_version_added_stays_out_of_messages_of_the_first() -> None:
    clashes = (PathPair("README", "readme"),)
    answer = Acknowledgement(UUID(int=1), 7, bytes(32), (), b"m" * 32, 1, clashes)
    first, second = encode_acknowledgement(answer, 1), encode_acknowledgement(answer, 2)
    assert decode_acknowledgement(first, 1) == replace(answer, unportable_count=0, unportable_paths=())
    assert decode_acknowledgement(second, 2) == answer
    for data, version in ((first, 2), (second, 1)):
        with pytest.raises(InvalidRequestError, match="another form"):
            decode_acknowledgement(data, version)


@pytest.mark.parametrize("version", [0, wire.VERSION + 1])
def test_a_version_that_is_not_known_is_refused(version: int) -> None:
    command = FinalizePackage(UUID(int=1), UUID(int=2), "ada")
    with pytest.raises(InvalidRequestError, match=f"version {version} "):
        decode_command(encode_command(command), version)


def test_derived_identifiers_arrive_as_what_they_were() -> None:
    package = identifiers.package_id("ada", UUID(int=7))
    file = IngestedFile(identifiers.file_id(package, "a"), "a", 1, bytes(32), bytes(32), 2, bytes(32))
    command = FinalizePackage(package, UUID(int=8), "ada")
    answer = Acknowledgement(package, 2, bytes(32), (file,))
    assert decode_command(encode_command(command)) == command
    assert decode_acknowledgement(encode_acknowledgement(answer)) == answer
    asked = IngestCheck(package, ["a"], None, EVERYTHING, None)
    assert decode_check(encode_check(asked)) == asked


@given(ACKNOWLEDGEMENTS)
def test_an_acknowledgement_arrives_as_it_was_sent(acknowledgement: Acknowledgement) -> None:
    found = decode_acknowledgement(encode_acknowledgement(acknowledgement))
    assert (found, found.position) == (acknowledgement, acknowledgement.position)
    assert decode_acknowledgement(encode_acknowledgement(acknowledgement, 4), 4).position is None


@given(UUIDS, st.lists(TEXTS, max_size=5), st.none() | UUIDS, GRANTS, NAMES)
def test_a_question_arrives_as_it_was_sent(
    package: UUID, paths: list[str], command_id: UUID | None, grants: Grants, principal: str | None
) -> None:
    asked = IngestCheck(package, paths, command_id, grants, principal)
    assert decode_check(encode_check(asked)) == asked
    assert decode_check(encode_check(asked, wire.SAYS_GRANTS)) == replace(asked, principal=None)


def test_a_question_of_the_previous_release_is_of_somebody_who_may_do_everything() -> None:
    package = UUID(int=7)
    assert decode_check(cbor2.dumps([package, ["a"], None])) == IngestCheck(package, ["a"], None, EVERYTHING, None)


def test_a_right_that_is_not_known_here_gives_nothing() -> None:
    package = UUID(int=7)
    grants = [[["read", "paint"], ["*"], ["*"]]]
    assert decode_check(cbor2.dumps([package, [], None, grants])).grants == (Grant(frozenset({Right.READ})),)
    for broken in (1, [1], [[["read"], "*", ["*"]]], [[["read"], ["*"]]]):
        with pytest.raises(InvalidRequestError):
            decode_check(cbor2.dumps([package, [], None, broken]))


@pytest.mark.parametrize("cls", [cls for cls in all_errors() if "problem" in cls.__dict__], ids=lambda cls: cls.problem)
def test_an_error_arrives_as_the_same_class_with_its_text(cls: type[ArtifactStoreError]) -> None:
    arrived = decode_error(encode_error(made(cls)))
    assert type(arrived) is cls
    assert arrived.detail == "why"


def test_numbers_of_an_error_arrive_too() -> None:
    pushed = decode_error(encode_error(PushBackError("full", 2.5)))
    ranged = decode_error(encode_error(RangeNotSatisfiableError("no byte", 10)))
    assert isinstance(pushed, PushBackError)
    assert isinstance(ranged, RangeNotSatisfiableError)
    assert (pushed.retry_after, ranged.size) == (2.5, 10)
    assert type(decode_error(encode_error(PartitionNotOwnedError("moved")))) is PartitionNotOwnedError


def test_facts_of_an_error_arrive_and_the_previous_release_gets_the_nearest_kind_it_knows() -> None:
    error = AnswerExpiredError("long ago", facts={"package_id": str(UUID(int=7)), "finalized_at": 12})
    arrived = decode_error(encode_error(error))
    assert (type(arrived), arrived.detail, arrived.facts) == (AnswerExpiredError, "long ago", error.facts)
    assert cbor2.loads(encode_error(error, 1)) == ["illegal-package-state", "long ago", None, None]
    assert cbor2.loads(encode_error(PathConflictError("both"), 1)) == ["conflict", "both", None, None]
    assert type(decode_error(encode_error(error, 1))) is IllegalPackageStateError


def test_an_error_that_is_not_known_here_leaves_the_outcome_unknown() -> None:
    assert type(decode_error(cbor2.dumps(["from-the-future", "why", None, None]))) is UnavailableError
    assert type(decode_error(b"\xff not an error")) is UnavailableError


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused_as_a_command(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        decode_command(data)


@pytest.mark.parametrize(
    "other",
    [
        ["purge-package", []],
        ["finalize-package", [UUID(int=1), UUID(int=2)]],
        ["finalize-package", [UUID(int=1), UUID(int=2), 3]],
        ["finalize-package", ["a", UUID(int=2), "ada"]],
        ["finalize-package", [UUID(int=1), UUID(int=2), "ada", "more"]],
        ["ingest-files", [UUID(int=1), UUID(int=2), "ada", "files"]],
        ["ingest-files", [UUID(int=1), UUID(int=2), "ada", [["a.txt"]]]],
        {"create-package": []},
        [[], []],
    ],
    ids=repr,
)
def test_a_command_of_another_form_is_refused(other: object) -> None:
    with pytest.raises(InvalidRequestError):
        decode_command(cbor2.dumps(other))
