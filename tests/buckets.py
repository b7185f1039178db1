"""A bucket of a test's own on any S3, which is emptied and removed afterwards."""

from __future__ import annotations

import uuid
from typing import Any, Self

import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject

_SECONDS = 30.0


class Bucket:
    """One bucket at `host` (`host:port`, spoken to without TLS). Every method blocks."""

    def __init__(self, host: str, access_key: str, secret_key: str, region: str) -> None:
        """Draws a name, asks nothing of the store yet."""
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(_SECONDS))
        self._client = Minio(host, access_key, secret_key, secure=False, region=region, http_client=self._pool)
        self.settings: dict[str, Any] = {
            "blobs_url": f"s3+http://{host}/{self.name}",
            "s3_access_key": access_key,
            "s3_secret_key": secret_key,
            "s3_region": region,
        }

    def __enter__(self) -> Self:
        self._client.make_bucket(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        if self._client.bucket_exists(self.name):
            self.empty()
            self._client.remove_bucket(self.name)
        self._pool.clear()

    def empty(self) -> None:
        """Remove every object."""
        found = self._client.list_objects(self.name, recursive=True)
        refused = list(self._client.remove_objects(self.name, (DeleteObject(str(f.object_name)) for f in found)))
        assert refused == []
