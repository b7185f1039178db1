"""Opens the blob store that a URL names: a folder for `file:`, a bucket for `s3:` or `s3+http:`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from artifact_store.errors import ConfigurationError
from services.blobs.local import LocalBlobStore
from services.blobs.memory import ByteBudget
from services.blobs.port import BlobStore
from services.config import Settings
from services.runtime.clock import Clock, system_clock

if TYPE_CHECKING:
    from services.blobs.s3.requests import Endpoint

_MEMORY_BYTES = 64 << 20
"""How much memory all uploads to a bucket may hold in one process."""

_SMALL_MEMORY_BYTES = 12 << 20
"""How much memory is reserved for small uploads in addition."""

_FORMS = "file:FOLDER, s3://host:port/BUCKET (TLS) or s3+http://host:port/BUCKET"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def bucket_of(settings: Settings) -> str:
    """The bucket, or the folder, that `settings.blobs_url` names. Its host may have several names and is left out."""
    url = urlsplit(settings.blobs_url)
    return url.path if url.scheme == "file" else url.path.strip("/")


def open_blobs(settings: Settings, clock: Clock = system_clock) -> BlobStore:
    """The blob store that `settings.blobs_url` names; its clock is compared with `clock`. Does not connect yet.

    Raises:
        ConfigurationError: the URL has another form, or a bucket has no credentials. The text omits the URL, because
            somebody may have put credentials into it.
    """
    try:
        url = urlsplit(settings.blobs_url)
        host, port = url.hostname, url.port
    except ValueError:
        raise _wrong("it cannot be read") from None
    if url.query or url.fragment:
        raise _wrong("it ends in a query or fragment")
    if url.scheme == "file":
        if url.netloc not in {"", "localhost"}:
            raise _wrong("a file: URL names a folder of this machine: file:./relative or file:///absolute")
        if not url.path:
            raise _wrong("the folder is missing")
        if settings.s3_public_url is not None:
            raise ConfigurationError("ARTIFACT_STORE_S3_PUBLIC_URL needs a bucket in ARTIFACT_STORE_BLOBS_URL")
        return LocalBlobStore(Path(unquote(url.path)))
    if url.scheme not in {"s3", "s3+http"}:
        raise _wrong(
            f"the scheme {url.scheme!r} is unknown" if "://" in settings.blobs_url else "the scheme is missing"
        )
    if url.username is not None or url.password is not None:
        raise _wrong("credentials belong in ARTIFACT_STORE_S3_ACCESS_KEY and ARTIFACT_STORE_S3_SECRET_KEY")
    if not host:
        raise _wrong("the host is missing")
    bucket = bucket_of(settings)
    if not _BUCKET.fullmatch(bucket):
        raise _wrong("the path is not one bucket name (3 to 63 lower case letters, digits, dots and hyphens)")
    if not settings.s3_access_key or not settings.s3_secret_key.get_secret_value():
        raise ConfigurationError(
            "a bucket needs ARTIFACT_STORE_S3_ACCESS_KEY and ARTIFACT_STORE_S3_SECRET_KEY, at least one is unset"
        )
    if not settings.s3_region:
        raise ConfigurationError(
            "ARTIFACT_STORE_S3_REGION is empty: us-east-1 is right for most stores except Amazon's"
        )
    from services.blobs.s3.requests import Endpoint
    from services.blobs.s3.store import S3BlobStore  # loads the SDK, which a folder does not need

    endpoint = Endpoint(
        host=_netloc(host, port),
        bucket=bucket,
        secure=url.scheme == "s3",
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
    )
    return S3BlobStore(
        endpoint,
        memory=ByteBudget(_MEMORY_BYTES, small=_SMALL_MEMORY_BYTES),
        own_clock=clock,
        public=_public(settings, endpoint),
    )


def _public(settings: Settings, endpoint: Endpoint) -> Endpoint | None:
    """The endpoint at which clients reach the store; None if they do not. Raises ConfigurationError."""
    if settings.s3_public_url is None:
        return None
    try:
        url = urlsplit(settings.s3_public_url)
        host, port = url.hostname, url.port
    except ValueError:
        host = None
    if not host or url.scheme not in {"https", "http"} or url.path.strip("/") or url.query or url.username is not None:
        raise ConfigurationError(
            "ARTIFACT_STORE_S3_PUBLIC_URL must have the form https://HOST[:PORT], without a bucket"
        )
    secret = settings.s3_public_secret_key.get_secret_value()
    if bool(settings.s3_public_access_key) != bool(secret):
        raise ConfigurationError(
            "ARTIFACT_STORE_S3_PUBLIC_ACCESS_KEY and ARTIFACT_STORE_S3_PUBLIC_SECRET_KEY go together: one is unset"
        )
    own = {"access_key": settings.s3_public_access_key, "secret_key": secret} if secret else {}
    return replace(endpoint, host=_netloc(host, port), secure=url.scheme == "https", **own)


def _netloc(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _wrong(reason: str) -> ConfigurationError:
    return ConfigurationError(f"ARTIFACT_STORE_BLOBS_URL: {reason}; accepted are {_FORMS}")
