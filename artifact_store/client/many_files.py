"""Many files in one request, in both directions: as archives, or by name if the store has their bytes already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from uuid import UUID

import aiohttp

from artifact_store.archives.bundle import SMALL_FILE_BYTES, Bundle, Group, HeldFiles, NamedFile, StreamedFile
from artifact_store.archives.tar import END, ArchiveLimits, TarReader, entries_of, pieces_of_small, tar_of
from artifact_store.client.bodies import PiecesSource
from artifact_store.client.sending import Sending, send_body
from artifact_store.client.transport import Transport
from artifact_store.documents import answers
from artifact_store.documents.http import MAX_KNOWN, TAR
from artifact_store.errors import CorruptError, RejectedError, UnavailableError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement

_BARREN_CONNECTIONS = 5
"""Give up after this many connections in a row without a file."""

_ANY = 1 << 62


async def send_files(
    transport: Transport, package_id: UUID, files: Bundle, headers: Mapping[str, str], command_id: UUID
) -> Acknowledgement:
    """Send a bundle as one archive. Raises as `Registry.ingest_files`."""
    fields = {**headers, "Content-Type": TAR}
    if isinstance(files, HeldFiles):
        archive = PiecesSource([*await asyncio.to_thread(pieces_of_small, files.files), END])
        fields["Content-Length"] = str(archive.size_bytes)
        sending = Sending(archive, archive.size_bytes, hashed=False)
    else:
        sending = Sending(tar_of(files), None, hashed=False)
    answer = await send_body(
        transport,
        "POST",
        f"/v1/packages/{package_id}/files",
        fields,
        sending,
        what="an archive was lost on its way and its stream cannot be read again",
        command_id=command_id,
    )
    return await asyncio.to_thread(answers.ingested_together, answer.body)


async def name_files(
    transport: Transport, package_id: UUID, files: Sequence[NamedFile], headers: Mapping[str, str]
) -> Acknowledgement:
    """Record files whose bytes are stored already. Raises as `Registry.ingest_named`."""
    from artifact_store.documents.shapes import IngestNamedRequest, NamedFileRequest  # these load pydantic

    request = IngestNamedRequest(files=[NamedFileRequest.of(file) for file in files])
    answer = await transport.call(
        "POST", f"/v1/packages/{package_id}/files", headers=headers, json=request.model_dump(exclude_none=True)
    )
    return await asyncio.to_thread(answers.ingested_together, answer.body)


async def ask_known(transport: Transport, digests: Sequence[bytes]) -> frozenset[bytes]:
    """Ask which blobs are stored, in as many requests as needed."""
    found: set[bytes] = set()
    for start in range(0, len(digests), MAX_KNOWN):
        addresses = [ContentAddress.of_digest(digest) for digest in digests[start : start + MAX_KNOWN]]
        answer = await transport.call("POST", "/v1/blobs/known", json={"addresses": addresses})
        found |= answers.known_blobs(answer.body)
    return frozenset(found)


async def receive_files(
    transport: Transport, package_id: UUID, after: str | None, largest: int | None, wait_sequence: int | None
) -> AsyncGenerator[Group, None]:
    """The files of a package, from its archive. After a lost connection it continues after the last complete file.

    Iterating raises as `Registry.read_files`. It also raises UnavailableError if the gateway stays down, or if a larger
    file broke off, because an archive cannot be continued within a file.
    """
    last, barren = after, 0
    while True:
        before = last
        query = {"after": last, "largest": largest, "wait_sequence": wait_sequence}
        response = await transport.open(f"/v1/packages/{package_id}/archive", query=query)
        reader = TarReader(ArchiveLimits(_ANY, _ANY, SMALL_FILE_BYTES))

        streaming = False
        try:
            async for group in entries_of(reader, _chunks(transport, response)):
                streaming = isinstance(group, StreamedFile)
                yield group
                streaming = False
                last = group.relative_path if isinstance(group, StreamedFile) else group[-1].relative_path
            return
        except UnavailableError:
            barren = 0 if last != before else barren + 1
            if streaming or barren >= _BARREN_CONNECTIONS:
                raise
        except RejectedError as error:
            raise CorruptError(
                f"the gateway's archive of package {package_id} cannot be read: {error.detail}"
            ) from None
        finally:
            response.close()


async def _chunks(transport: Transport, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    while chunk := await transport.read_chunk(response):
        yield chunk
