"""JSON shapes for many files at once: files that are named instead of sent, what became of them, and known blobs."""

from __future__ import annotations

from typing import Self
from uuid import UUID

from pydantic import Field

from services.bundle import MAX_BUNDLE_FILES, NamedFile
from services.core.commands import Acknowledgement, IngestedFile
from services.core.content_address import ContentAddress
from services.http.models import AddressText, Answer, Hex32, Request, SequenceNumber, Size

TAR = "application/x-tar"
MAX_KNOWN = 1_000
"""About so many blobs one request may ask."""


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
        """How this file is named."""
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
    """One file of many whose bytes and event are durable."""

    file_id: UUID
    relative_path: str
    content_address: AddressText
    sha256: Hex32
    size_bytes: Size
    sequence: SequenceNumber
    event_digest: Hex32


class FilesIngestedAnswer(Answer):
    """Many files' bytes and events are durable; `sequence` and `event_digest` are those of the last."""

    package_id: UUID
    files: list[IngestedFileAnswer]
    sequence: SequenceNumber
    event_digest: Hex32

    @classmethod
    def of(cls, done: Acknowledgement) -> Self:
        """The answer that this acknowledgement becomes."""
        # Made by ourselves out of checked parts: to check ten thousand of them again takes longer than the rest.
        files = [
            IngestedFileAnswer.model_construct(
                file_id=file.file_id,
                relative_path=file.relative_path,
                content_address=ContentAddress.of_digest(file.blake3),
                sha256=file.sha256.hex(),
                size_bytes=file.size_bytes,
                sequence=file.sequence,
                event_digest=file.event_digest.hex(),
            )
            for file in done.files
        ]
        return cls.model_construct(
            package_id=done.package_id, files=files, sequence=done.sequence, event_digest=done.event_digest.hex()
        )

    def to_acknowledgement(self) -> Acknowledgement:
        """The acknowledgement again."""
        files = tuple(
            IngestedFile(
                file_id=file.file_id,
                relative_path=file.relative_path,
                size_bytes=file.size_bytes,
                blake3=ContentAddress(file.content_address).digest,
                sha256=bytes.fromhex(file.sha256),
                sequence=file.sequence,
                event_digest=bytes.fromhex(file.event_digest),
            )
            for file in self.files
        )
        return Acknowledgement(self.package_id, self.sequence, bytes.fromhex(self.event_digest), files=files)


class KnownBlobsRequest(Request):
    """Blobs to look for."""

    addresses: list[AddressText] = Field(max_length=MAX_KNOWN)

    def to_digests(self) -> list[bytes]:
        """The digests (32 raw bytes each)."""
        return [ContentAddress(address).digest for address in self.addresses]


class KnownBlobsAnswer(Answer):
    """Those of the blobs that are stored, in no order."""

    known: list[AddressText]

    def to_digests(self) -> frozenset[bytes]:
        """The digests (32 raw bytes each)."""
        return frozenset(ContentAddress(address).digest for address in self.known)
