"""Parts that clients send straight to the store: signed addresses, and the check that one grants no more than a part.

An address is signed for one number of one multipart upload, for so many bytes with this CRC-32. Some stores take
headers that were not signed all the same: with `x-amz-copy-source` the request would copy another object into the part,
by the rights of the key that signed it, and its answer would tell an MD5 of any range of that object. So gateways try
just that on an upload of their own before they hand out an address, and again from time to time.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from uuid import uuid4

from artifact_store.errors import UnavailableError
from services.blobs.port import ADDRESS_SECONDS, UPLOADS, DirectPart, PartAddress
from services.blobs.s3.multipart import GONE, OK, begin_upload
from services.blobs.s3.requests import CHECKSUM_CRC32, S3Requests, crc32_text

PROBE_KEY = "health/write-probe"
_AGAIN_SECONDS = 600.0
"""How long a check counts that went well,"""

_PAUSE_SECONDS = 60.0
"""and one that did not."""

_CHECK_SECONDS = 5.0
_PROBE = b"ok"
_log = logging.getLogger(__name__)


class DirectAccess:
    """Addresses of parts at the store's public URL. Belongs to one event loop."""

    def __init__(self, requests: S3Requests, public: S3Requests) -> None:
        """`public` signs for the URL that clients use, perhaps with a key of its own; `requests` are the gateway's."""
        self._requests = requests
        self._public = public
        self._checking = asyncio.Lock()
        self._usable = False
        self._checked_until = 0.0
        self._trouble: str | None = None

    async def usable(self) -> bool:
        """Whether clients may be sent to the store. Asks it, if that was not done lately, for at most 5 s."""
        clock = asyncio.get_running_loop().time
        async with self._checking:
            if clock() >= self._checked_until:
                trouble = await self._find_trouble()
                if trouble is not None and trouble != self._trouble:
                    _log.warning("large files come through the gateways, not straight to the store: %s", trouble)
                self._usable, self._trouble = trouble is None, trouble
                self._checked_until = clock() + (_AGAIN_SECONDS if self._usable else _PAUSE_SECONDS)
            return self._usable

    def address(self, key: str, upload_id: str, part: DirectPart) -> PartAddress:
        """The address of one part of a multipart upload to `key`."""
        headers = {"Content-Length": str(part.length), CHECKSUM_CRC32: crc32_text(part.crc32)}
        query = {"partNumber": str(part.number), "uploadId": upload_id}
        # By the store's time: whether the address has expired is for the store to say.
        url = self._public.presign(key, query, headers, ADDRESS_SECONDS, self._requests.clock.now())
        return PartAddress(url, headers)

    async def close(self) -> None:
        """Close the connections."""
        await self._public.close()

    async def _find_trouble(self) -> str | None:
        """What keeps clients from being sent to the store, None if nothing does."""
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                return await self._probe()
        except TimeoutError:
            return f"{self._public.endpoint.host} gave no answer within {_CHECK_SECONDS:g} s"
        except UnavailableError as error:
            return error.detail

    async def _probe(self) -> str | None:
        key = f"{UPLOADS}{uuid4()}"
        await self._requests.send("PUT", PROBE_KEY, OK, body=_PROBE, attempts=1)
        upload_id = await begin_upload(self._requests, key)
        try:
            address = self.address(key, upload_id, DirectPart(1, len(_PROBE), zlib.crc32(_PROBE)))
            found = await self._public.put_presigned(address.url, address.headers, _PROBE)
            if found.status != 200:
                return (
                    f"{self._public.endpoint.host} answered {found.status} {found.code} to a signed part: check "
                    "ARTIFACT_STORE_S3_PUBLIC_URL, its keys, and ARTIFACT_STORE_S3_REGION"
                )
            copying = {**address.headers, "x-amz-copy-source": f"/{self._requests.endpoint.bucket}/{PROBE_KEY}"}
            found = await self._public.put_presigned(address.url, copying, _PROBE)
            if found.status != 403:
                return (
                    f"{self._public.endpoint.host} would copy other objects for who holds the address of a part: set "
                    "ARTIFACT_STORE_S3_PUBLIC_ACCESS_KEY and its secret to a key that cannot read (s3-direct.json)"
                )
            return None
        finally:
            await self._requests.send("DELETE", key, GONE, query={"uploadId": upload_id})
