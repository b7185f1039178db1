"""Admission: how many connections, transfers, followers and bytes in memory one gateway process takes at a time.

No client gets more than half of the places or of the room of a kind, so that one client alone never keeps out all
others. A client is an IPv4 address or a /64 of IPv6: all clients behind a proxy that hides their addresses count as
one.

Quotas bound how much one principal may add to the registry in an hour, through one gateway process. They are counted
in memory, without PostgreSQL or other gateways: writes continue if these are unavailable, and a process that restarts
counts from zero. With N processes a principal gets up to N times as much. A quota refills over the hour. A body that
has begun is never cut off for a quota: its excess counts against the time that follows. `OpenUploads` bounds the
resumable uploads that one principal holds open at a time. If nothing proves who the sender is, the address is the
principal.

`Followers` are clients that follow events, and stay until the gateway closes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Literal
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, PushBackError
from services.blobs.port import IDLE_SECONDS
from services.registry.bundle_store import BUNDLES_AT_ONCE

_log = logging.getLogger(__name__)

Transfer = Literal["uploads", "downloads"]
"""Requests that move many bytes, and therefore have separate places."""

MAX_DOWNLOADS = 128
"""Maximum number of concurrent downloads. Each may hold a connection to the blob store, and uploads need some too."""

MAX_READS = 128
"""How many clients may read events up to the log's end at a time; `event_tail` lets a few of them read at once."""

MAX_FOLLOWERS = 1000

JSON_ROOM_BYTES = 64 << 20
"""Bytes of JSON bodies that may be held at a time, until they are parsed."""

HEADS_ROOM_BYTES = 16 << 20
"""Bytes of request heads that may be held at a time, each from its first byte until its request is answered."""

_RETRY_SECONDS = 2.0
_OTHER_DESCRIPTORS = 512
"""File descriptors reserved for connections to the blob store, the log and the views, and for files."""

_WANTED_DESCRIPTORS = 65_536

Refused = Callable[[str, int], None]
"""Called with a kind of place or room, and how often it was refused because none was left. 0 makes the kind known."""


@dataclass(frozen=True)
class Bounds:
    """The limits of one gateway, in bytes, seconds and clients."""

    max_file_bytes: int
    max_metadata_bytes: int
    max_followers: int = MAX_FOLLOWERS
    max_reads: int = MAX_READS
    max_connections: int = 2048
    max_uploads: int = 256
    max_downloads: int = MAX_DOWNLOADS
    json_room_bytes: int = JSON_ROOM_BYTES
    """Bytes of JSON bodies that may be held at a time."""
    body_idle_seconds: float = 60.0
    """How long a body may make no progress, and the time over which its pace is measured. Also applies to answers."""
    body_bytes_per_second: float = 1024.0
    """The slowest pace at which a client may send a body or receive an answer."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    """How much a principal may use in an hour, by the values of `Quota`."""
    heartbeat_seconds: float = 10.0
    """How often a follower without events gets an empty line or a comment, which keeps its connection open."""


class TooManyAtOnceError(PushBackError, problem="too-many-at-once", status=429):
    """The client (its address) has as many connections, uploads or downloads in progress as one client may have."""


class _Shares:
    """How much of one kind each client holds, and all clients together. Belongs to one event loop."""

    def __init__(self, what: str, limit: int, refused: Refused) -> None:
        self.what = what
        self.limit = limit
        self.per_client = max(1, limit // 2)
        self.all = 0
        self._refused = refused
        self._of: Counter[str] = Counter()
        refused(what, 0)

    def take(self, client: str, more: int, *, none_left: str, enough: str) -> None:
        """Count `more` for the client. Raises PushBackError with the text `none_left` if nothing is left,
        TooManyAtOnceError with the text `enough` if the client would hold too much."""
        if self.all + more > self.limit:
            self._refused(self.what, 1)
            raise PushBackError(none_left, _RETRY_SECONDS)
        if self._of[client] + more > self.per_client:
            self._refused(self.what, 1)
            raise TooManyAtOnceError(enough, _RETRY_SECONDS)
        self.all += more
        self._of[client] += more

    def give(self, client: str, less: int) -> None:
        """Give back `less` of what this client holds."""
        self.all -= less
        self._of[client] -= less
        if not self._of[client]:
            del self._of[client]


class Places:
    """A bounded number of places of one kind. Belongs to one event loop."""

    def __init__(self, what: str, limit: int, refused: Refused = lambda *_: None) -> None:
        self._shares = _Shares(what, limit, refused)

    def __len__(self) -> int:
        return self._shares.all

    def take(self, client: str) -> None:
        """Take a place, which `give` gives back.

        Raises PushBackError if all are taken, TooManyAtOnceError if this client holds as many as one client may.
        """
        shares = self._shares
        shares.take(
            client,
            1,
            none_left=f"this gateway has {shares.limit:,} {shares.what} already",
            enough=f"{shares.per_client:,} {shares.what} come from this address",
        )

    def give(self, client: str) -> None:
        """Give back a place that this client holds."""
        self._shares.give(client, 1)

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Hold a place during the block. Raises as `take`."""
        self.take(client)
        try:
            yield
        finally:
            self.give(client)


class Room:
    """A bounded number of bytes that may be held at a time. Belongs to one event loop."""

    def __init__(self, what: str, limit: int, refused: Refused = lambda *_: None) -> None:
        self._shares = _Shares(what, limit, refused)

        self._none_left = f"this gateway can hold no more {what} now"
        self._enough = f"one address may send no more {what} at a time"

    def take(self, client: str, more: int) -> None:
        """Take more bytes for this client, which `give` gives back.

        Raises PushBackError if there is no room, TooManyAtOnceError if the client holds as much as one client may.
        """
        self._shares.take(client, more, none_left=self._none_left, enough=self._enough)

    def give(self, client: str, less: int) -> None:
        """Give back bytes that this client holds."""
        self._shares.give(client, less)

    @contextmanager
    def share(self, client: str) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes more bytes for this client; all are given back at the end of the block.

        The function raises as `take`.
        """
        held = 0

        def take(more: int) -> None:
            nonlocal held
            self.take(client, more)
            held += more

        try:
            yield take
        finally:
            self.give(client, held)


class Admission:
    """All places and rooms of one gateway, and its requests in progress. Belongs to one event loop."""

    def __init__(self, bounds: Bounds, refused: Refused) -> None:
        """`refused` counts refusals by their kind."""
        self.connections = Places("connections", bounds.max_connections, refused)
        self.transfers: Mapping[Transfer, Places] = {
            "uploads": Places("uploads", bounds.max_uploads, refused),
            "downloads": Places("downloads", bounds.max_downloads, refused),
        }
        self.archives = Places("archives", BUNDLES_AT_ONCE, refused)
        """As many places as bundles are read at a time: a client with a place never waits, and none holds all."""
        self.reads = Places("reads of events", bounds.max_reads, refused)
        self.heads = Room("heads", HEADS_ROOM_BYTES, refused)
        self.json = Room("JSON", bounds.json_room_bytes, refused)
        self.parsing = asyncio.Lock()
        """Held while a large JSON body is parsed: its objects take many times its size."""
        self.draining = False
        self.in_flight = 0
        """The number of requests in progress."""
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Count a request as in progress until `end`."""
        self.in_flight += 1
        self._idle.clear()

    def end(self) -> None:
        """Note that a request that `begin` counted is answered."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` until every request is answered. From now on, answers close their connections."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d requests were not finished within %g s; they are cut off", self.in_flight, seconds)


def connections_within(wanted: int, forwarded: int = 0) -> int:
    """The number of connections, at most `wanted`, that the limit of file descriptors allows.

    Raises this process's soft limit as far as needed and permitted. Reserves descriptors for `forwarded` commands, but
    never more than half of those that remain.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _WANTED_DESCRIPTORS)
    needed = min(most, wanted + forwarded + _OTHER_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = soft - _OTHER_DESCRIPTORS
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, max(left - forwarded, left // 2)))


_HOUR_SECONDS = 3600.0
_MOST_KNOWN = 10_000
"""Above this number of remembered principals, those that have used nothing for an hour are forgotten."""


class Quota(StrEnum):
    """What a quota counts."""

    PACKAGES = "packages"
    BYTES = "bytes"
    """Of request bodies."""
    METADATA_BYTES = "metadata bytes"
    RESUMABLE_UPLOADS = "resumable uploads"
    """Resumable uploads that are begun in the hour: each may stay open for a day."""
    OPEN_UPLOADS = "open uploads"
    """Resumable uploads that are open at the same time; see `OpenUploads`."""


class QuotaExceededError(PushBackError):
    """The principal used what it may use in an hour, or holds as many resumable uploads open as it may."""

    status = 429
    problem = "quota-exceeded"


@dataclass(slots=True)
class _Use:
    """How much of an hour's quota was used at a time of the clock. It decays at the pace of the quota."""

    amount: float = 0.0
    at: float = 0.0


@dataclass(slots=True)
class Quotas:
    """The hourly quotas of one gateway process, by kind. A kind may have none. Belongs to one event loop."""

    limits: dict[Quota, int] = field(default_factory=dict)
    refused: Refused = lambda _, __: None
    clock: Callable[[], float] = time.monotonic
    _used: dict[tuple[Quota, str], _Use] = field(default_factory=dict)

    def require(self, quota: Quota, principal: str) -> None:
        """Raise QuotaExceededError while the principal's quota is used up."""
        limit = self.limits.get(quota)
        if limit is None:
            return
        used = self._now(quota, principal, limit)
        if used + 1 > limit:
            self.refused(f"quota of {quota}", 1)
            seconds = (used + 1 - limit) * _HOUR_SECONDS / limit
            raise QuotaExceededError(
                f"{principal} has used its quota of {limit:,} {quota} an hour at this gateway", math.ceil(seconds)
            )

    def count(self, quota: Quota, principal: str, amount: int) -> None:
        """Count `amount` as used, even beyond the quota."""
        limit = self.limits.get(quota)
        if limit is None:
            return
        used = self._now(quota, principal, limit)
        if len(self._used) >= _MOST_KNOWN and (quota, principal) not in self._used:
            self._forget_unused()
        self._used[quota, principal] = _Use(used + amount, self.clock())

    def _now(self, quota: Quota, principal: str, limit: int) -> float:
        use = self._used.get((quota, principal))
        if use is None:
            return 0.0
        return max(0.0, use.amount - (self.clock() - use.at) * limit / _HOUR_SECONDS)

    def _forget_unused(self) -> None:
        for quota, principal in list(self._used):
            if not self._now(quota, principal, self.limits[quota]):
                del self._used[quota, principal]


_LOOKED_AT = 16
_OPEN_RETRY_SECONDS = 30.0


@dataclass(slots=True)
class OpenUploads:
    """The resumable uploads that each principal holds open through this gateway process. Belongs to one event loop.

    An upload may end at another process. So before a principal at its limit is refused, the blob store is asked about
    some of its uploads, those first that were not checked for the longest time.
    """

    limit: int | None = None
    refused: Refused = lambda _, __: None
    clock: Callable[[], float] = time.monotonic
    _held: dict[str, dict[UUID, float]] = field(default_factory=dict)
    """By principal, the uploads and when each would be swept."""

    async def take(self, principal: str, upload_id: UUID, is_open: Callable[[UUID], Awaitable[bool]]) -> bool:
        """Count an upload that is about to begin, until `end`. Returns False if it was counted already.

        `is_open` asks the store about another upload. Raises QuotaExceededError if the principal holds as many others
        as it may.
        """
        if self.limit is None or upload_id in self._held.get(principal, ()):
            return False
        if self._count(principal) >= self.limit:
            for known in list(islice(self._held[principal], _LOOKED_AT)):
                if not await _is_open(known, is_open):
                    self.end(principal, known)
                    break
                self.touch(principal, known)
        if self._count(principal) >= self.limit:
            self.refused(f"quota of {Quota.OPEN_UPLOADS}", 1)
            raise QuotaExceededError(
                f"{principal} holds {self.limit:,} resumable uploads open at this gateway: finish or end some",
                _OPEN_RETRY_SECONDS,
            )
        self.touch(principal, upload_id)
        return True

    def touch(self, principal: str, upload_id: UUID) -> None:
        """Note that the upload is open now."""
        if self.limit is not None:
            held = self._held.setdefault(principal, {})
            held.pop(upload_id, None)
            held[upload_id] = self.clock() + IDLE_SECONDS

    def end(self, principal: str, upload_id: UUID) -> None:
        """Note that the upload became a file, or is gone. Has no effect if it was not counted."""
        held = self._held.get(principal, {})
        held.pop(upload_id, None)
        if not held:
            self._held.pop(principal, None)

    def _count(self, principal: str) -> int:
        now = self.clock()
        for upload_id, swept_at in list(self._held.get(principal, {}).items()):
            if swept_at <= now:
                self.end(principal, upload_id)
        return len(self._held.get(principal, ()))


async def _is_open(upload_id: UUID, is_open: Callable[[UUID], Awaitable[bool]]) -> bool:
    try:
        return await is_open(upload_id)
    except ArtifactStoreError:
        return True  # nobody can tell now


_CLOSING_RETRY_SECONDS = 5.0


def gateway_closes() -> PushBackError:
    """The error for a follower that is disconnected because the gateway stops."""
    return PushBackError("this gateway is stopping", _CLOSING_RETRY_SECONDS)


class Followers:
    """The places for followers of one gateway. Belongs to one event loop."""

    def __init__(self, limit: int = MAX_FOLLOWERS, refused: Refused = lambda *_: None) -> None:
        self._places = Places("followers", limit, refused)
        self._stays: set[asyncio.Timeout] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def stay(self, client: str, until: float | None = None) -> AsyncIterator[Callable[[], None]]:
        """Hold a place during the block. The block ends early, without an error, when the gateway closes.

        It also ends at `until`, by the event loop's clock, and when the yielded function is called: the place is then
        free at once, although the block takes a while to end.

        Raises as `Places.take`, and PushBackError while the gateway closes.
        """
        if self._closing:
            raise gateway_closes()
        scope = asyncio.timeout_at(until)
        try:
            with ExitStack() as place:
                place.enter_context(self._places.place(client))

                def leave() -> None:
                    place.close()
                    _end(scope)

                async with scope:
                    self._stays.add(scope)
                    yield leave
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._stays.discard(scope)

    def dismiss(self) -> None:
        """End every follower's block, and take no more followers."""
        self._closing = True
        for scope in list(self._stays):
            _end(scope)


def _end(scope: asyncio.Timeout) -> None:
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())
