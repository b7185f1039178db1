"""The package that Python programs import to use an artifact store.

    from artifact_store import Client, push

    async with Client("http://127.0.0.1:8080") as registry:
        pushed = await push(registry, Path("results"), name="run 12", producer="lab",
                            subject="sample 7", retention_class="raw-evidence")

`Client` has every operation of `Registry` and talks to a gateway over HTTP. `Client.stream` bundles files that come one
by one. `push` and `pull` transfer whole trees of files. `SyncClient` is for programs without an event loop.
`artifact_store.errors` has one tree of errors, divided by what the caller should do next.

This package imports neither `schemas` nor `services`, nor any dependency that only the server needs. They import it.
Start reading at `registry.py`, which lists the operations; then `client/client.py`, `transfers/push.py` and
`transfers/pull.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from artifact_store.client.blocking import SyncClient
    from artifact_store.client.bodies import BodySource, BytesSource, FileSource
    from artifact_store.client.client import Client
    from artifact_store.client.stream import FileStream
    from artifact_store.client.transport import RetryPolicy
    from artifact_store.consumer import DurableConsumer, EventSource, PositionStore, PositionTable
    from artifact_store.errors import (
        ArtifactStoreError,
        ConfigurationError,
        CorruptError,
        DuplicateRelativePathError,
        ForbiddenError,
        IllegalPackageStateError,
        PackageNotFoundError,
        PushBackError,
        RejectedError,
        UnauthenticatedError,
        UnavailableError,
    )
    from artifact_store.events import RecordedEvent
    from artifact_store.manifest import ContentAddress, Manifest
    from artifact_store.models import Acknowledgement, Declared, EventFilter, File, Package, PackageFilter, Page
    from artifact_store.position import Position
    from artifact_store.registry import Registry
    from artifact_store.transfers.pull import Pulled, pull
    from artifact_store.transfers.push import Pushed, push

__all__ = [
    "Acknowledgement",
    "ArtifactStoreError",
    "BodySource",
    "BytesSource",
    "Client",
    "ConfigurationError",
    "ContentAddress",
    "CorruptError",
    "Declared",
    "DuplicateRelativePathError",
    "DurableConsumer",
    "EventFilter",
    "EventSource",
    "File",
    "FileSource",
    "FileStream",
    "ForbiddenError",
    "IllegalPackageStateError",
    "Manifest",
    "Package",
    "PackageFilter",
    "PackageNotFoundError",
    "Page",
    "Position",
    "PositionStore",
    "PositionTable",
    "Pulled",
    "PushBackError",
    "Pushed",
    "RecordedEvent",
    "Registry",
    "RejectedError",
    "RetryPolicy",
    "SyncClient",
    "UnauthenticatedError",
    "UnavailableError",
    "pull",
    "push",
]

_MODULES = {
    "client.blocking": ("SyncClient",),
    "client.bodies": ("BodySource", "BytesSource", "FileSource"),
    "client.client": ("Client",),
    "client.stream": ("FileStream",),
    "client.transport": ("RetryPolicy",),
    "consumer": ("DurableConsumer", "EventSource", "PositionStore", "PositionTable"),
    "events": ("RecordedEvent",),
    "manifest": ("ContentAddress", "Manifest"),
    "models": ("Acknowledgement", "Declared", "EventFilter", "File", "Package", "PackageFilter", "Page"),
    "position": ("Position",),
    "registry": ("Registry",),
    "transfers.pull": ("Pulled", "pull"),
    "transfers.push": ("Pushed", "push"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a name's module when the name is first used.

    `schemas` and the command line import modules of this package, which must not load aiohttp and pydantic.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
