"""JSON shapes of requests and answers, and their conversion to the domain's own objects and back.

Both sides use them: the gateway writes answers with `of`, the client reads them with `model_validate_json` and `to_…`,
except for the answers that `answers.py` reads. Digests and addresses are text, times are RFC 3339
(`documents/times.py`). Requests refuse unknown fields. Answers may gain fields, so readers ignore unknown ones.
"""

from __future__ import annotations

from dataclasses import asdict
from json.encoder import encode_basestring as json_string
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from artifact_store.archives.bundle import MAX_BUNDLE_FILES, NamedFile
from artifact_store.documents import times
from artifact_store.documents.http import MAX_KNOWN
from artifact_store.errors import CorruptError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement, File, IngestedFile, Package, Page, UsageTotal
from artifact_store.position import Position
from artifact_store.rules import MAX_PAIRS

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="32 bytes in lower-case hex")]
AddressText = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$", description="BLAKE3 content address")]
TimeText = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z$",
        description="RFC 3339, UTC, with six digits of a second",
    ),
]
SequenceNumber = Annotated[int, Field(ge=1, description="Number of an event within its package")]
DayText = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", description="A day in UTC, as in RFC 3339")]
Count = Annotated[int, Field(ge=0, description="How many")]
Size = Annotated[int, Field(ge=0, description="Bytes")]


class Request(BaseModel):
    """A request. Unknown fields and values of other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CreatePackageRequest(Request):
    """A package to create."""

    name: str = Field(min_length=1, max_length=256)
    producer: str = Field(min_length=1, max_length=256)
    subject: str = Field(min_length=1, max_length=256)
    retention_class: str
    metadata: dict[str, Any] = Field(default_factory=dict)


class EndAnswer(Answer):
    """Where the log ends."""

    position: str


class NothingRequest(Request):
    """A request without fields: no body, or an empty object."""


WrittenAt = Annotated[
    str | None,
    Field(
        description="With this as `since`, reading continues after this write, and misses nothing that came later. "
        "Events of other packages from the second before may be included. Null if it is not known, as it may be in the "
        "answer to a repeat"
    ),
]


class PackageCreatedAnswer(Answer):
    """A package was created."""

    package_id: UUID
    status: str
    sequence: SequenceNumber
    event_digest: Hex32
    position: WrittenAt = None

    @classmethod
    def of(cls, done: Acknowledgement) -> Self:
        """The answer that this acknowledgement becomes."""
        return cls(
            package_id=done.package_id,
            status="created",
            sequence=done.sequence,
            event_digest=done.event_digest.hex(),
            position=_text_of(done.position),
        )


class FileIngestedAnswer(Answer):
    """A file's bytes and its event are durable."""

    package_id: UUID
    file_id: UUID
    relative_path: str
    content_address: AddressText
    sha256: Hex32
    size_bytes: Size
    sequence: SequenceNumber
    event_digest: Hex32
    position: WrittenAt = None

    @classmethod
    def of(cls, done: Acknowledgement) -> Self:
        """The answer that this acknowledgement of one file becomes."""
        (file,) = done.files
        return cls(
            package_id=done.package_id,
            file_id=file.file_id,
            relative_path=file.relative_path,
            content_address=ContentAddress.of_digest(file.blake3),
            sha256=file.sha256.hex(),
            size_bytes=file.size_bytes,
            sequence=file.sequence,
            event_digest=file.event_digest.hex(),
            position=_text_of(done.position),
        )

    @classmethod
    def json_of(cls, done: Acknowledgement) -> bytes:
        """The JSON of `of`, made without the shape, because it is the most frequent answer."""
        (file,) = done.files
        position = _json_of_position(done)
        return f'{{"package_id":"{done.package_id}",{_json_of_file(file)},"position":{position}}}'.encode()


class ClashingPaths(Answer):
    """Two paths of a package that differ only by case or by Unicode form."""

    path: str = Field(description="The path of a file")
    other: str = Field(description="The path of another file, or of a folder with files in it")


class PackageFinalizedAnswer(Answer):
    """A package is frozen under its manifest."""

    package_id: UUID
    manifest_digest: AddressText
    sequence: SequenceNumber
    event_digest: Hex32
    position: WrittenAt = None
    unportable_count: Count = Field(
        0, description="How many paths differ from another path of the package only by case or Unicode form"
    )
    unportable_paths: list[ClashingPaths] = Field(
        default_factory=list,
        description=f"The first {MAX_PAIRS} of them. Such files can be unpacked together only where file systems tell "
        "the two paths apart",
    )

    @classmethod
    def of(cls, done: Acknowledgement) -> Self:
        """The answer that this acknowledgement becomes. Raises CorruptError if it has no manifest."""
        if done.manifest_digest is None:
            raise CorruptError("a package was finalized without a manifest")
        return cls(
            package_id=done.package_id,
            manifest_digest=ContentAddress.of_digest(done.manifest_digest),
            sequence=done.sequence,
            event_digest=done.event_digest.hex(),
            position=_text_of(done.position),
            unportable_count=done.unportable_count,
            unportable_paths=[ClashingPaths(path=path, other=other) for path, other in done.unportable_paths],
        )


class ParkedAnswer(Answer):
    """Where and why the view stopped following a package. `events` of its events are not shown."""

    partition: Count
    offset: Count
    events: Count
    cause: str


class PackageAnswer(Answer):
    """A package as the view shows it."""

    package_id: UUID
    name: str
    producer: str
    subject: str
    retention_class: str
    status: str
    metadata: dict[str, Any]
    manifest_digest: AddressText | None
    last_event_sequence: SequenceNumber
    created_at: TimeText
    finalized_at: TimeText | None
    parked: ParkedAnswer | None = None

    @classmethod
    def of(cls, package: Package) -> Self:
        """The answer that shows this package."""
        return cls(
            package_id=package.package_id,
            name=package.name,
            producer=package.producer,
            subject=package.subject,
            retention_class=package.retention_class,
            status=package.status,
            metadata=package.metadata,
            manifest_digest=package.manifest_digest,
            last_event_sequence=package.last_event_sequence,
            created_at=times.to_text(package.created_at),
            finalized_at=None if package.finalized_at is None else times.to_text(package.finalized_at),
            parked=None if package.parked is None else ParkedAnswer(**asdict(package.parked)),
        )


class FileAnswer(Answer):
    """A file as the view shows it."""

    file_id: UUID
    package_id: UUID
    relative_path: str
    media_type: str
    size_bytes: Size
    content_address: AddressText
    sha256: Hex32
    created_at: TimeText

    @classmethod
    def of(cls, file: File) -> Self:
        """The answer that shows this file."""
        return cls(
            file_id=file.file_id,
            package_id=file.package_id,
            relative_path=file.relative_path,
            media_type=file.media_type,
            size_bytes=file.size_bytes,
            content_address=ContentAddress.of_digest(file.blake3),
            sha256=file.sha256.hex(),
            created_at=times.to_text(file.created_at),
        )

    def to_file(self) -> File:
        """The file in this answer."""
        return File(
            file_id=self.file_id,
            package_id=self.package_id,
            relative_path=self.relative_path,
            media_type=self.media_type,
            size_bytes=self.size_bytes,
            blake3=ContentAddress(self.content_address).digest,
            sha256=bytes.fromhex(self.sha256),
            created_at=times.from_text(self.created_at),
        )


class UsageAnswer(Answer):
    """The total of one producer, retention class and day."""

    producer: str
    retention_class: str
    day: DayText
    packages: Count
    files: Count
    bytes: Size

    @classmethod
    def of(cls, total: UsageTotal) -> Self:
        """The answer that shows this total."""
        return cls(
            producer=total.producer,
            retention_class=total.retention_class,
            day=times.day_to_text(total.day),
            packages=total.packages,
            files=total.files,
            bytes=total.bytes,
        )

    def to_total(self) -> UsageTotal:
        """The total in this answer."""
        day = times.day_from_text(self.day)
        return UsageTotal(self.producer, self.retention_class, day, self.packages, self.files, self.bytes)


class UsagePageAnswer(Answer):
    """A page of totals by producer, class and day; `next` is the cursor of the following page, null on the last."""

    items: list[UsageAnswer]
    next: str | None

    @classmethod
    def of(cls, page: Page[UsageTotal]) -> Self:
        """The answer that shows this page."""
        return cls(items=[UsageAnswer.of(item) for item in page.items], next=page.next)

    def to_page(self) -> Page[UsageTotal]:
        """The page again."""
        return Page(tuple(item.to_total() for item in self.items), self.next)


class PackagePageAnswer(Answer):
    """A page of packages, newest first; `next` is the cursor of the following page, null on the last."""

    items: list[PackageAnswer]
    next: str | None

    @classmethod
    def of(cls, page: Page[Package]) -> Self:
        """The answer that shows this page."""
        return cls(items=[PackageAnswer.of(item) for item in page.items], next=page.next)


class FilePageAnswer(Answer):
    """A page of files by the bytes of their paths; `next` is the cursor of the following page, null on the last."""

    items: list[FileAnswer]
    next: str | None

    @classmethod
    def of(cls, page: Page[File]) -> Self:
        """The answer that shows this page."""
        return cls(items=[FileAnswer.of(item) for item in page.items], next=page.next)

    def to_page(self) -> Page[File]:
        """The page again."""
        return Page(tuple(item.to_file() for item in self.items), self.next)


class NamedFileRequest(Request):
    """A file whose bytes are stored already: as the blob of its content address, or as a slice of another blob."""

    relative_path: str
    media_type: str = Field(min_length=1, max_length=256)
    size_bytes: int = Field(ge=0, lt=2**63)
    content_address: AddressText
    blob: AddressText | None = Field(None, description="The blob that holds it; absent: the file is a blob by itself")
    offset: int = Field(0, ge=0, lt=2**62, description="Where in the blob it begins")

    @classmethod
    def of(cls, file: NamedFile) -> Self:
        """The request that names this file."""
        return cls(
            relative_path=file.relative_path,
            media_type=file.media_type,
            size_bytes=file.size_bytes,
            content_address=ContentAddress.of_digest(file.blake3),
            blob=None if file.blob == file.blake3 else ContentAddress.of_digest(file.blob),
            offset=file.offset,
        )

    def to_file(self) -> NamedFile:
        """The file that is named."""
        digest = ContentAddress(self.content_address).digest
        blob = digest if self.blob is None else ContentAddress(self.blob).digest
        return NamedFile(self.relative_path, self.media_type, self.size_bytes, digest, blob, self.offset)


class IngestNamedRequest(Request):
    """Files to add without sending their bytes, all or none."""

    files: list[NamedFileRequest] = Field(max_length=MAX_BUNDLE_FILES)

    def to_files(self) -> list[NamedFile]:
        """The files that are named."""
        return [file.to_file() for file in self.files]


class IngestedFileAnswer(Answer):
    """One of many files whose bytes and events are durable."""

    file_id: UUID
    relative_path: str
    content_address: AddressText
    sha256: Hex32
    size_bytes: Size
    sequence: SequenceNumber
    event_digest: Hex32


class FilesIngestedAnswer(Answer):
    """The bytes and events of many files are durable. `sequence` and `event_digest` are those of the last file."""

    package_id: UUID
    files: list[IngestedFileAnswer]
    sequence: SequenceNumber
    event_digest: Hex32
    position: WrittenAt = None

    @staticmethod
    def json_of(done: Acknowledgement) -> bytes:
        """The JSON that this acknowledgement becomes, without the way over the shape. Blocks for some milliseconds."""
        files = ",".join(f"{{{_json_of_file(file)}}}" for file in done.files)
        return (
            f'{{"package_id":"{done.package_id}","files":[{files}],"sequence":{done.sequence},'
            f'"event_digest":"{done.event_digest.hex()}","position":{_json_of_position(done)}}}'
        ).encode()


class KnownBlobsRequest(Request):
    """Blobs to look for."""

    addresses: list[AddressText] = Field(max_length=MAX_KNOWN)

    def to_digests(self) -> list[bytes]:
        """The digests (32 raw bytes each)."""
        return [ContentAddress(address).digest for address in self.addresses]


class KnownBlobsAnswer(Answer):
    """The blobs that are stored, in no particular order."""

    known: list[AddressText]


class GrantShape(Answer):
    """Rights on the packages whose producer and subject match a pattern each."""

    can: list[str]
    producers: list[str]
    subjects: list[str]


class WhoAmIAnswer(Answer):
    """Who the sender is, as the gateway sees it."""

    actor: str = Field(description="The name in which they write; differs from `principal` if `X-Actor` names another")
    principal: str | None = Field(default=None, description="Who they are to the gateway")
    rights: list[GrantShape]
    expires_at: TimeText | None = Field(
        description="When the token expires; null if it never does, or there is no token"
    )


class LoginIssuer(Answer):
    """An issuer at which people can log in."""

    alias: str
    url: str
    client_id: str


class LoginAnswer(Answer):
    """Where people can log in."""

    issuers: list[LoginIssuer]


def _text_of(position: Position | None) -> str | None:
    return None if position is None else str(position)


def _json_of_file(file: IngestedFile) -> str:
    """The members of its JSON object."""
    return (
        f'"file_id":"{file.file_id}","relative_path":{json_string(file.relative_path)},'
        f'"content_address":"blake3:{file.blake3.hex()}","sha256":"{file.sha256.hex()}",'
        f'"size_bytes":{file.size_bytes},"sequence":{file.sequence},"event_digest":"{file.event_digest.hex()}"'
    )


def _json_of_position(done: Acknowledgement) -> str:
    return "null" if done.position is None else f'"{done.position}"'
