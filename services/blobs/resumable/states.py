"""The states of uploads over several requests, kept in the blob store itself: any process can continue any upload.

The state of an upload is an object `resumable/<upload id>/state-<number>`. A state is never changed: its successor is
created under the next number, which only one process can do. That process then checks again that the previous state
still exists and that there is no later one. Otherwise a writer that was stalled for long might use a number that was
used and removed long ago, or continue a removed upload beside a new one with the same id. After the check it removes
the older states, or the new one if it is invalid. The store only has to support objects that are created once, and no
clock is needed.

Others who may write to the bucket must not decide what an event names: a state has digests of bytes, an actor and a
path. With a key, states end with a tag, BLAKE3 keyed with it over the object's name and the rest. A state with a
missing or wrong tag is ignored: its upload does not exist.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from blake3 import blake3
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from artifact_store.errors import ArtifactStoreError, CorruptError, UnavailableError
from artifact_store.models import Declared
from artifact_store.rules import parse_number
from services.blobs.port import RESUMABLE, BlobStore, Part, PartsKey, StoredBlob

FORM = 3
"""The newest form of a state that this release reads. A field that earlier releases may not ignore raises it."""

UNTAGGED, _TAGGED, WITH_PRINCIPAL = 1, 2, 3
"""The forms that it writes: without a key, with one, and with a principal. An earlier release would leave out the tag
or the principal."""

_TAG = b',"tag":"'

_STATE = "state-"
_READS = 10
_log = logging.getLogger(__name__)


class SupersededError(ArtifactStoreError):
    """Another request or process has changed the upload since its state was read."""


class NewerStateError(UnavailableError):
    """A newer release has continued the upload; this one leaves it alone."""


class UploadState(BaseModel):
    """One upload at one moment. Digests are hex, times aware; `number` is not in the object but its name."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="hex", val_json_bytes="hex")

    number: int = Field(default=0, exclude=True)
    form: int = UNTAGGED
    nonce: UUID = Field(default_factory=uuid4)
    """Makes every state differ from every other, so that its writer can tell whether it was written."""

    upload_id: UUID
    package_id: UUID
    relative_path: str
    media_type: str
    actor: str
    principal: str | None = None
    """Who began it in the actor's name; None: the actor."""
    command_id: UUID
    length: int
    blake3: str | None
    sha256: str | None
    metadata: str | None
    """`Upload-Metadata`, unchanged."""

    token: str
    part_bytes: int
    created_at: AwareDatetime
    active_at: AwareDatetime
    parts: tuple[Part, ...] = ()
    next_number: int = 1
    """The lowest number that was never reserved: nobody has put parts with this number or above."""
    held: int = 0
    """Bytes in `parts`."""
    tail: str | None = None
    """The key of the object with the bytes after the parts."""
    tail_bytes: int = 0
    holder: UUID | None = None
    """The request that is adding bytes now."""
    gone: bool = False
    stored: StoredBlob | None = None
    """The blob that it became: from here on an event may name it."""
    answer: str | None = None
    """The acknowledgement of the command that named it, as hex of the oldest version in `services.core.wire`."""

    @property
    def sender(self) -> str:
        """The owner of the upload."""
        return self.principal or self.actor

    @property
    def offset(self) -> int:
        """The number of stored bytes."""
        return self.held + self.tail_bytes

    @property
    def complete(self) -> bool:
        """Whether all bytes are stored."""
        return self.offset == self.length

    @property
    def where(self) -> PartsKey:
        """Its parts."""
        return PartsKey(self.upload_id, self.token)

    @property
    def declared(self) -> Declared:
        """The declaration that its bytes must match."""
        return Declared(
            self.length,
            None if self.blake3 is None else bytes.fromhex(self.blake3),
            None if self.sha256 is None else bytes.fromhex(self.sha256),
        )

    def changed(self, **fields: object) -> UploadState:
        """The state that follows with these fields."""
        # The step is specific to this upload, so that an earlier upload with the same id has other numbers.
        step = 1 + int.from_bytes(blake3(self.token.encode()).digest(4), "big")
        return self.model_copy(update={**fields, "number": self.number + step, "nonce": uuid4()})


class UploadStates:
    """The states in one blob store."""

    def __init__(self, blobs: BlobStore, key: bytes | None = None) -> None:
        """`key`: 32 bytes that all gateways share. Without it, every state in the store is trusted."""
        self._blobs = blobs
        self._key = key

    async def load(self, upload_id: UUID) -> UploadState | None:
        """The newest state; None if there is no such upload. Raises UnavailableError, CorruptError.

        A state that others wrote into the store is ignored.
        """
        for _ in range(_READS):
            numbers = _numbers(await self._blobs.list_objects(_folder(upload_id)))
            if not numbers:
                return None
            data = await self._blobs.get_object(_key(upload_id, numbers[-1]))
            if data is not None:  # otherwise its successor was written meanwhile
                if not self._is_authentic(_key(upload_id, numbers[-1]), data):
                    _log.warning("the state of upload %s is ignored: it has no valid tag", upload_id)
                    return None
                return None if (found := _read(data, numbers[-1])).gone else found
        raise UnavailableError(f"upload {upload_id} changes too fast to be read: retry")

    async def create(self, state: UploadState) -> None:
        """Write the first state. Raises SupersededError: there is one; UnavailableError: the outcome is unknown.

        Remains of a removed upload that conflict with this one are removed first.
        """
        try:
            await self._write(state, follows=None)
        except SupersededError:
            newest = await self._newest(state.upload_id)
            if newest is not None and newest.gone:
                await self.remove(newest)
            raise

    async def replace(self, old: UploadState, **fields: object) -> UploadState:
        """Write the successor of a state and return it.

        Raises SupersededError: somebody else has written one, or the upload is gone; others may have seen the new state
        nevertheless. UnavailableError: the outcome is unknown.
        """
        new = old.changed(**fields)
        await self._write(new, follows=old)
        if old.tail is not None and old.tail != new.tail:
            await self._blobs.delete_object(old.tail)
        return new

    async def remove(self, state: UploadState) -> None:
        """Remove an upload and everything that it left, except a blob that an event may name.

        Raises SupersededError: it was changed meanwhile; UnavailableError: the sweep will find the remains.
        """
        last = state if state.gone else await self.replace(state, gone=True, tail=None, tail_bytes=0, holder=None)
        await self._blobs.parts.discard(last.where, blob=last.stored is None)
        await self._clear(last.upload_id, [last.number])

    async def remove_with_blob(self, state: UploadState) -> None:
        """As `remove`, for an upload whose blob was stored and is certainly not named by any event."""
        await self.remove(await self.replace(state, stored=None))

    async def sweep(self, *, now: datetime, idle_seconds: float) -> int:
        """Remove uploads that were idle for this long. Returns how many. See `BlobStore.sweep`."""
        swept = 0
        for upload_id in _uploads(await self._blobs.list_objects(RESUMABLE)):
            try:
                state = await self._newest(upload_id)
                if state is None:
                    await self._clear(upload_id, [])
                elif state.gone or now - state.active_at >= timedelta(seconds=idle_seconds):
                    await self.remove(state)
                    swept += 1
            except SupersededError:  # another request continues it
                continue
            except (CorruptError, NewerStateError) as error:
                _log.error("upload %s: %s", upload_id, error)
        return swept

    async def _write(self, state: UploadState, *, follows: UploadState | None) -> None:
        key = _key(state.upload_id, state.number)
        if not await self._blobs.create_object(key, self._sealed(key, state)):
            raise SupersededError(f"upload {state.upload_id} was changed by another request")
        keys = await self._blobs.list_objects(_folder(state.upload_id))
        numbers = _numbers(keys)
        if numbers[-1:] != [state.number] or (follows is not None and follows.number not in numbers):
            if numbers[-1:] == [state.number]:  # its upload was removed; it must not be taken for a later one's state
                await self._blobs.delete_object(key)
            raise SupersededError(f"upload {state.upload_id} was changed by another request")
        for number in numbers[:-1]:
            await self._blobs.delete_object(_key(state.upload_id, number))

    def _sealed(self, key: str, state: UploadState) -> bytes:
        """The content of the state's object, with a tag if there is a key."""
        if self._key is None:
            return state.model_dump_json().encode()
        body = state.model_copy(update={"form": max(state.form, _TAGGED)}).model_dump_json().encode()
        return body[:-1] + _TAG + self._tag(self._key, key, body) + b'"}'

    def _is_authentic(self, key: str, data: bytes) -> bool:
        """Whether a gateway with the same key wrote the object under this name. Always true without a key."""
        if self._key is None:
            return True
        body, _, tag = data.rpartition(_TAG)
        return hmac.compare_digest(tag, self._tag(self._key, key, body + b"}") + b'"}')

    @staticmethod
    def _tag(secret: bytes, key: str, body: bytes) -> bytes:
        return blake3(key.encode() + b"\n" + body, key=secret).hexdigest().encode()

    async def _newest(self, upload_id: UUID) -> UploadState | None:
        """As `load`, but also returns the state of an upload whose removal was interrupted: it says that it is gone."""
        numbers = _numbers(await self._blobs.list_objects(_folder(upload_id)))
        data = await self._blobs.get_object(_key(upload_id, numbers[-1])) if numbers else None
        if numbers and data is None:
            raise SupersededError("it is in use")
        return None if data is None else _read(data, numbers[-1])

    async def blob_keys(self) -> frozenset[str]:
        """The uploads' own keys at which they have stored a blob, or may yet do so; an event may yet name it."""
        found: set[str] = set()
        for upload_id in _uploads(await self._blobs.list_objects(RESUMABLE)):
            state = await self.load(upload_id)
            key = None if state is None else self._blobs.parts.blob_key(state.where)
            if key is not None:
                found.add(key)
        return frozenset(found)

    async def _clear(self, upload_id: UUID, newest: list[int]) -> None:
        """Remove all objects of an upload; the newest state, which says that it is gone, is removed last.

        Does nothing if that is no longer the newest state: another process has removed the upload, and there may be a
        new one by now.
        """
        keys = await self._blobs.list_objects(_folder(upload_id))
        numbers = _numbers(keys)
        if numbers[-1:] != newest:
            return
        states = [_key(upload_id, number) for number in numbers]
        for key in (*(key for key in keys if key not in states), *states):
            await self._blobs.delete_object(key)


async def sweep_states(blobs: BlobStore, *, now: datetime, idle_seconds: float) -> int:
    """Run `UploadStates.sweep` as a part of the store's sweep."""
    return await UploadStates(blobs).sweep(now=now, idle_seconds=idle_seconds)


def tail_key(upload_id: UUID) -> str:
    """An unused key for the bytes after the last part."""
    return f"{_folder(upload_id)}tail-{uuid4()}"


def _folder(upload_id: UUID) -> str:
    return f"{RESUMABLE}{upload_id}/"


def _key(upload_id: UUID, number: int) -> str:
    return f"{_folder(upload_id)}{_STATE}{number:08d}"


def _numbers(keys: Sequence[str]) -> list[int]:
    names = (key.rpartition("/")[2] for key in keys)
    numbers = (parse_number(name.removeprefix(_STATE)) for name in names if name.startswith(_STATE))
    return sorted(number for number in numbers if number is not None)


def _uploads(keys: Sequence[str]) -> list[UUID]:
    found: set[UUID] = set()
    for key in keys:
        with suppress(ValueError):  # a file manager's file such as `.DS_Store`, which is not an upload
            found.add(UUID(key.split("/")[1]))
    return sorted(found)


def _read(data: bytes, number: int) -> UploadState:
    try:
        state = UploadState.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"not the state of an upload: {error.errors()[0]['msg']}") from None
    if state.form > FORM:
        raise NewerStateError(
            f"upload {state.upload_id} was continued by a newer release, whose states this one cannot read: "
            "upgrade this gateway, or retry at one that is"
        )
    return state.model_copy(update={"number": number})
