"""The JSON shapes: what the gateway writes, the client reads back as the same object."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from artifact_store import errors
from artifact_store.documents import answers, times
from artifact_store.documents.event_lines import event_line, parse_event
from artifact_store.documents.http import parse_content_md5, parse_digests, parse_id, quoted, repr_digest, unquoted
from artifact_store.documents.problem_details import Problem, error_of, problem, problem_of
from artifact_store.documents.resumable_uploads import parse_checksum
from artifact_store.documents.shapes import (
    FileAnswer,
    FileIngestedAnswer,
    FilesIngestedAnswer,
    PackageAnswer,
    PackageCreatedAnswer,
    PackageFinalizedAnswer,
    PackagePageAnswer,
)
from artifact_store.errors import (
    AnswerExpiredError,
    ArtifactStoreError,
    CorruptError,
    InvalidPathError,
    InvalidRequestError,
    PushBackError,
    RangeNotSatisfiableError,
    RejectedError,
    UnavailableError,
)
from artifact_store.events import (
    FileIngested,
    PackageCreated,
    PackageFinalized,
    Payload,
    RecordedEvent,
    StorageReceipt,
    type_with,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement, File, IngestedFile, Package, Page, Parked
from artifact_store.position import Position
from artifact_store.rules import PathPair, parse_number

_TIME = 1_767_225_600_123_456

_PAYLOADS: list[tuple[str, Payload]] = [
    ("v1.package.created", PackageCreated("n", "p", "s", "permanent", None, '{"a":[1,2.5,"é"]}')),
    (
        "v1.file.ingested",
        FileIngested(
            uuid4(),
            "a/ü",
            "text/plain",
            3,
            bytes(range(32)),
            bytes(32),
            StorageReceipt(uuid4(), "local", "blobs/x", 0, 3, _TIME),
        ),
    ),
    ("v1.package.finalized", PackageFinalized(b"\xa0\xff" * 100, None, 0, 0)),
    ("v1.package.finalized", PackageFinalized(None, "blobs/x", 1, 3)),
]


@pytest.mark.parametrize(("event_type", "payload"), _PAYLOADS)
def test_an_event_survives_the_way_over_http(event_type: str, payload: Payload) -> None:
    event = RecordedEvent(
        event_id=uuid4(),
        event_type=event_type,
        package_id=uuid4(),
        sequence=7,
        created_at=_TIME,
        actor="ünï",
        command_id=uuid4(),
        command_index=0,
        command_count=1,
        payload_digest=bytes(range(32)),
        previous_digest=bytes(32),
        payload=payload,
        position=Position(uuid4(), {0: 3, 5: 2**40}),
    )
    line = event_line(event)
    assert b"\n" not in line
    assert b'"principal"' not in line
    assert parse_event(line) == event
    delegated = replace(event, event_type=type_with(event_type, "çi:bot"), principal="çi:bot")
    assert parse_event(event_line(delegated)) == delegated
    for wrong in (replace(delegated, event_type=event_type), replace(delegated, principal=None)):
        with pytest.raises(CorruptError):
            parse_event(event_line(wrong))


def test_a_line_that_is_no_event_is_corrupt() -> None:
    for line in (b"", b"{}", b'{"type":"v9.unknown"}', b"\xff"):
        with pytest.raises(CorruptError):
            parse_event(line)


@pytest.mark.parametrize("path", ["a.csv", "ordner/größe 3.bin", 'quoted "and" back\\slashed', "\u2028\U0001f9ea"])
def test_the_answer_that_is_sent_most_often_is_the_one_of_its_shape(path: str) -> None:
    file = IngestedFile(uuid4(), path, 4_096, bytes(range(32)), bytes(range(1, 33)), 7, bytes(range(2, 34)))
    for position in (None, Position(uuid4(), {0: 3, 5: 2**40})):
        done = Acknowledgement(uuid4(), 7, file.event_digest, files=(file,), position=position)
        assert FileIngestedAnswer.json_of(done) == FileIngestedAnswer.of(done).model_dump_json().encode()
        done.files = (file, file._replace(file_id=uuid4(), sequence=8))
        many = FilesIngestedAnswer.json_of(done)
        assert FilesIngestedAnswer.model_validate_json(many).model_dump_json().encode() == many
        assert FilesIngestedAnswer.model_validate_json(many).files[1].relative_path == path


def test_acknowledgements_survive_the_way_over_http() -> None:
    created = Acknowledgement(uuid4(), 1, bytes(range(32)))
    file = IngestedFile(uuid4(), "a/b", 5, bytes(range(32)), bytes(32), 2, bytes(32))
    ingested = Acknowledgement(created.package_id, 2, file.event_digest, files=(file,))
    clashes = 7, (PathPair("README", "readme"), PathPair("a", "A"))
    finalized = Acknowledgement(created.package_id, 3, bytes(32), (), bytes(range(32)), *clashes)
    ways: list[tuple[Callable[[Acknowledgement], bytes], Acknowledgement, Callable[[bytes], Acknowledgement]]] = [
        (lambda done: PackageCreatedAnswer.of(done).model_dump_json().encode(), created, answers.created),
        (FileIngestedAnswer.json_of, ingested, answers.ingested),
        (FilesIngestedAnswer.json_of, ingested, answers.ingested_together),
        (lambda done: PackageFinalizedAnswer.of(done).model_dump_json().encode(), finalized, answers.finalized),
    ]
    for written, done, read in ways:
        for position in (None, Position(uuid4(), {0: 3, 5: 2**40})):
            done.position = position
            found = read(written(done))
            assert (found, found.position) == (done, position)


_ANSWER: dict[str, Any] = {
    "package_id": str(uuid4()),
    "sequence": 2,
    "event_digest": "00" * 32,
    "files": [
        {
            "file_id": str(uuid4()),
            "relative_path": "a",
            "size_bytes": 0,
            "content_address": "blake3:" + "00" * 32,
            "sha256": "00" * 32,
            "sequence": 2,
            "event_digest": "00" * 32,
        }
    ],
    "manifest_digest": "blake3:" + "00" * 32,
    "unportable_paths": [{"path": "a", "other": "A"}],
}


_WRONG: dict[str, tuple[object, ...]] = {
    "package_id": (None, 7, "seven", []),
    "sequence": (None, "2", -1, 0, 2.0, True),
    "event_digest": (None, 7, "00", "zz" * 32, "AB" * 32, "00 " * 32),
    "position": (7, "nowhere"),
    "files": (
        *(None, 7, [7], [{}]),
        *([{**_ANSWER["files"][0], "relative_path": wrong}] for wrong in (7, "\ud800")),
    ),
    "manifest_digest": (None, 7, "blake3:00", "blake3:" + "AB" * 32),
    "unportable_paths": ([{"path": "a"}], [{"path": "a", "other": "\ud800"}]),
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, all_wrong in _WRONG.items() for wrong in all_wrong]
)
def test_an_answer_to_a_push_with_another_shape_is_corrupt(name: str, wrong: object) -> None:
    readers = (answers.created, answers.ingested_together, answers.finalized)
    right = json.dumps({**_ANSWER, "more": "of the future"}).encode()
    for read in readers:
        assert read(right).sequence == 2
    body = json.dumps({**_ANSWER, name: wrong}).encode()
    refused = []
    for read in readers:
        try:
            read(body)
        except CorruptError:
            refused.append(read)
    assert refused, body


@pytest.mark.parametrize("name", ["file_id", "relative_path", "size_bytes", "content_address", "sha256"])
def test_an_answer_to_one_file_that_lacks_the_file_is_corrupt(name: str) -> None:
    (file,) = _ANSWER["files"]
    right = {"package_id": _ANSWER["package_id"], **file, "files": []}
    assert answers.ingested(json.dumps(right).encode()).files[0].relative_path == "a"
    for wrong in ({**right, name: None}, {key: value for key, value in right.items() if key != name}):
        with pytest.raises(CorruptError):
            answers.ingested(json.dumps(wrong).encode())


def test_an_answer_to_a_push_that_is_no_object_is_corrupt() -> None:
    readers = (
        answers.created,
        answers.ingested,
        answers.ingested_together,
        answers.finalized,
        answers.known_blobs,
        answers.package,
        answers.packages,
    )
    for read in readers:
        for body in (b"", b"\xff", b"\xef\xbb\xbf{}", b"[]", b"7", b"{}", b"[" * 100_000):
            with pytest.raises(CorruptError):
                read(body)
    assert answers.known_blobs(b'{"known":["blake3:%s"]}' % (b"01" * 32)) == {b"\1" * 32}
    with pytest.raises(CorruptError):
        answers.known_blobs(b'{"known":[7]}')


def test_packages_and_files_survive_the_way_over_http() -> None:
    address = ContentAddress.of_digest(bytes(range(32)))
    package = Package(uuid4(), "n", "p", "s", "report", "finalized", {"k": 1}, address, 3, _TIME, _TIME + 1)
    assert answers.package(PackageAnswer.of(package).model_dump_json().encode()) == package
    parked = replace(package, manifest_digest=None, finalized_at=None, parked=Parked(0, 7, 2, "why"))
    for following in (None, "cursor"):
        page = Page((package, parked), following)
        assert answers.packages(PackagePageAnswer.of(page).model_dump_json().encode()) == page
    file = File(uuid4(), package.package_id, "a/b", "text/plain", 5, bytes(range(32)), bytes(32), _TIME)
    assert FileAnswer.model_validate_json(FileAnswer.of(file).model_dump_json()).to_file() == file


def test_times_are_exact_to_the_microsecond() -> None:
    assert times.to_text(_TIME) == "2026-01-01T00:00:00.123456Z"
    for micros in (0, 1, 999_999, _TIME, 253_402_300_799_999_999):
        assert times.from_text(times.to_text(micros)) == micros
    with pytest.raises(ValueError, match="offset"):
        times.from_text("2026-01-01T00:00:00")


def _classes(kind: type[ArtifactStoreError]) -> list[type[ArtifactStoreError]]:
    own = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    return [kind, *(deeper for child in own for deeper in _classes(child))]


@pytest.mark.parametrize("kind", _classes(ArtifactStoreError))
def test_every_error_of_the_tree_comes_back_as_itself(kind: type[ArtifactStoreError]) -> None:
    error = RangeNotSatisfiableError("why", 12) if kind is RangeNotSatisfiableError else kind("why")
    back = error_of(Problem.model_validate_json(problem_of(error).model_dump_json()))
    assert type(back) is kind
    assert back.detail == "why"
    if isinstance(back, RangeNotSatisfiableError):
        assert back.size == 12


def test_a_problem_says_what_is_known_and_where_to_look() -> None:
    known = {"package_id": str(uuid4()), "manifest_digest": f"blake3:{'0' * 64}"}
    found = problem_of(AnswerExpiredError("why", facts={**known, "finalized_at": _TIME}))
    assert (found.status, found.name) == (409, "answer-expired")
    assert found.model_dump(include=set(known)) == known
    assert found.finalized_at == times.to_text(_TIME)
    assert found.events == f"/v1/events?package_id={known['package_id']}"
    back = error_of(Problem.model_validate_json(found.model_dump_json()))
    assert (type(back), back.facts) == (AnswerExpiredError, {**known, "finalized_at": _TIME})
    assert "finalized_at" not in error_of(found.model_copy(update={"finalized_at": "yesterday"})).facts


def test_a_problem_of_an_unknown_kind_tells_by_its_status_what_to_do() -> None:
    assert isinstance(error_of(problem(406, "not-acceptable", "x")), RejectedError)
    pushed = error_of(problem(429, "rate", "x", retry_after=2.5))
    assert isinstance(pushed, PushBackError)
    assert pushed.retry_after == 2.5
    assert isinstance(error_of(problem(408, "body-timeout", "x")), UnavailableError), "a sender may go on after a sleep"


def test_paths_are_quoted_and_read_back_once() -> None:
    for path in ("a/b", "ü/100%/x y", "a%2Fb", "?#;+&", "~"):
        assert unquoted(quoted(path)) == path


@pytest.mark.parametrize("raw", ["a%2Fb", "a%2fb", "a%", "a%zz", "a%4", "%ff", "\udcff"])
def test_a_path_with_a_bad_encoding_is_refused(raw: str) -> None:
    with pytest.raises(InvalidPathError):
        unquoted(raw)


def test_an_id_has_one_form() -> None:
    text = "6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11"
    assert parse_id("package_id", text) == UUID(text)
    for other in (text.upper(), text.replace("-", ""), "{" + text + "}", text + "\n", ""):
        with pytest.raises(InvalidRequestError, match="package_id"):
            parse_id("package_id", other)


READ = parse_digests("Content-Digest")


def test_digests_are_read_of_algorithms_that_are_checked_and_others_beside_them_are_ignored() -> None:
    sha256, sha512 = bytes(range(32)), bytes(range(64))
    long = f"sha-512=:{b64encode(sha512).decode()}:"
    assert READ(repr_digest(sha256)) == {"sha-256": sha256}
    assert READ(f"md5=:AAAA:,\t{repr_digest(sha256)} , {long};a=1") == {"sha-256": sha256, "sha-512": sha512}
    assert READ(f"{repr_digest(bytes(32))}, {repr_digest(sha256)}") == {"sha-256": sha256}, "the last one counts"
    assert READ(long.replace("==:", ":")) == {"sha-512": sha512}, "without padding"


@pytest.mark.parametrize("alone", ["md5=:AAAA:", "sha=:AAAA:", "adler=:AAAA:, crc32c=:AAAA:", "x=:AA==:"])
def test_digests_of_no_algorithm_that_is_checked_are_refused(alone: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"Content-Digest names no supported algorithm: declare sha-256 or sha-512"
    ):
        READ(alone)


@pytest.mark.parametrize(
    "value",
    ["", "sha-256", "sha-256=abc", "sha-256=:AA:", "sha-256=:AAAA:", "sha-256=:A=A=:", "sha-512=:AAAA:"],
)
def test_a_malformed_digest_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="Content-Digest"):
        READ(value)


def test_a_checksum_of_an_upload_is_an_algorithm_and_base64() -> None:
    assert parse_checksum("sha1 AAAA") == ("sha1", bytes(3))
    for other in ("sha1 ?", "sha1 ää==", "sha1 AAA"):
        with pytest.raises(InvalidRequestError, match="Upload-Checksum"):
            parse_checksum(other)


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1_0", "٣", "²", "1.0", "9" * 19, "0" * 20, "9" * 5_000])
def test_a_number_is_decimal_digits_of_64_bits(text: str) -> None:
    assert parse_number(text) is None
    assert parse_number(str(2**63 - 1)) == 2**63 - 1
    assert parse_number("007") == 7


def test_content_md5_is_sixteen_bytes_in_base64() -> None:
    assert parse_content_md5("AAAAAAAAAAAAAAAAAAAAAA==") == bytes(16)
    for other in ("", "AAAA", "?", "0" * 32, "ä" * 24):
        with pytest.raises(InvalidRequestError, match="Content-MD5"):
            parse_content_md5(other)
