"""The client for programs without an event loop: the same operations, each of which blocks until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from artifact_store.client.client import Client
from artifact_store.client.stream import Added, FileStream
from artifact_store.client.transport import Notify, RetryPolicy, log_retry
from artifact_store.errors import ConfigurationError
from artifact_store.models import IngestedFile
from artifact_store.registry import ANYONE

Asked = ParamSpec("Asked")
Result = TypeVar("Result")


class _LoopThread:
    """An event loop in a separate thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # As a daemon it does not keep alive a program that forgets to close its client.
        self._thread = Thread(target=self._loop.run_forever, name="artifact-store-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
        """Do the work there and return its result. After `seconds`, cancels the work and raises TimeoutError."""
        doing = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return doing.result(seconds)
        except BaseException:
            doing.cancel()
            raise

    def close(self) -> None:
        """End the thread. Blocks until it has ended."""
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _blocking(
    operation: Callable[Concatenate[Client, Asked], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[SyncClient, Asked], Result]:
    """The operation as a method that blocks."""

    @wraps(operation)
    def call(self: SyncClient, /, *args: Asked.args, **kwargs: Asked.kwargs) -> Result:
        return self.run(operation(self.registry, *args, **kwargs))

    return call


def _iterated(
    operation: Callable[Concatenate[Client, Asked], Coroutine[Any, Any, AsyncIterator[Result]]],
) -> Callable[Concatenate[SyncClient, Asked], Iterator[Result]]:
    """The operation as a method that blocks, and returns an iterator that blocks."""

    @wraps(operation)
    def call(self: SyncClient, /, *args: Asked.args, **kwargs: Asked.kwargs) -> Iterator[Result]:
        return self.iterate(self.run(operation(self.registry, *args, **kwargs)))

    return call


def _followed(
    operation: Callable[Concatenate[Client, Asked], AsyncIterator[Result]],
) -> Callable[Concatenate[SyncClient, Asked], Iterator[Result]]:
    """The operation as a method that returns an iterator that blocks."""

    @wraps(operation)
    def call(self: SyncClient, /, *args: Asked.args, **kwargs: Asked.kwargs) -> Iterator[Result]:
        return self.iterate(operation(self.registry, *args, **kwargs))

    return call


class SyncClient:
    """`Client` without `async`. Use it inside `with`; any number of threads may share it.

    Operations have the arguments, results and errors of those of `Client`, and block. Asynchronous iterators are
    iterators here.
    """

    def __init__(
        self,
        url: str,
        policy: RetryPolicy | None = None,
        notify: Notify = log_retry,
        *,
        token_file: Path | None = None,
        ca: Path | None = None,
    ) -> None:
        """As `Client`. `notify` is called in the client's own thread."""
        self.registry = Client(url, policy, notify, token_file=token_file, ca=ca)
        self._thread: _LoopThread | None = None

    def __enter__(self) -> SyncClient:
        self._thread = _LoopThread()
        self.run(self.registry.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.run(self.registry.__aexit__())
            thread.close()

    create_package = _blocking(Client.create_package)
    ingest_file = _blocking(Client.ingest_file)
    finalize_package = _blocking(Client.finalize_package)
    get_manifest_bytes = _blocking(Client.get_manifest_bytes)
    get_file = _iterated(Client.get_file)
    tail_events = _followed(Client.tail_events)
    create = _blocking(Client.create)
    finalize = _blocking(Client.finalize)
    get_package = _blocking(Client.get_package)
    list_packages = _blocking(Client.list_packages)
    list_usage = _blocking(Client.list_usage)
    list_files = _blocking(Client.list_files)
    get_file_record = _blocking(Client.get_file_record)
    get_file_at = _blocking(Client.get_file_at)
    open_content = _iterated(Client.open_content)
    read_events = _followed(Client.read_events)

    def stream(
        self,
        package_id: UUID,
        actor: str = ANYONE,
        *,
        spool: Path | str | None = None,
        max_bytes: int | None = None,
    ) -> SyncFileStream:
        """As `Client.stream`, for `with`. Files that several threads add are also sent together."""
        return SyncFileStream(self, lambda: self.registry.stream(package_id, actor, spool=spool, max_bytes=max_bytes))

    def run(self, work: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
        """Do `work`, which uses `registry`, and return its result.

        Raises TimeoutError after `seconds`; None: never.
        """
        if self._thread is None:
            work.close()
            raise ConfigurationError("the client is closed; use it inside `with`")
        return self._thread.run(work, seconds)

    def iterate(self, source: AsyncIterator[Result]) -> Iterator[Result]:
        """Iterate over an asynchronous iterator of `registry`. Close the iterator if you stop before its end."""

        async def following() -> tuple[Result] | None:
            try:
                return (await anext(source),)
            except StopAsyncIteration:
                return None

        async def end() -> None:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()

        try:
            while (item := self.run(following())) is not None:
                yield item[0]
        finally:
            with suppress(ConfigurationError):  # closed after its client
                self.run(end())


class SyncAdded:
    """A file that a stream took."""

    __slots__ = ("_added", "_client")

    def __init__(self, client: SyncClient, added: Added) -> None:
        self._client = client
        self._added = added

    def result(self, seconds: float | None = None) -> IngestedFile:
        """Wait for the acknowledgement. Raises as awaiting an `Added` does, and TimeoutError after `seconds`."""

        async def acknowledged() -> IngestedFile:
            return await self._added

        return self._client.run(acknowledged(), seconds)


class SyncFileStream:
    """`FileStream` without `async`. Made by `SyncClient.stream`; use it inside `with`."""

    def __init__(self, client: SyncClient, make: Callable[[], FileStream]) -> None:
        self._client = client
        self._make = make
        self._stream: FileStream | None = None

    def __enter__(self) -> SyncFileStream:
        async def entered() -> FileStream:
            return await self._make().__aenter__()

        self._stream = self._client.run(entered())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.run(self._opened().__aexit__(kind, error, traceback))

    def add(self, relative_path: str, data: bytes | bytearray | memoryview, media_type: str | None = None) -> SyncAdded:
        """As `FileStream.add`; blocks while that waits."""
        return SyncAdded(self._client, self._client.run(self._opened().add(relative_path, data, media_type)))

    def flush(self) -> None:
        """As `FileStream.flush`; blocks."""
        self._client.run(self._opened().flush())

    def _opened(self) -> FileStream:
        if self._stream is None:
            raise ConfigurationError("the stream is closed; use it inside `with`")
        return self._stream
