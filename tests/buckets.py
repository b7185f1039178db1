"""A separate bucket for a test on any S3, emptied and removed afterwards; and a key that signs for its clients."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import urllib3
from minio import Minio, MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.deleteobjects import DeleteObject

_SECONDS = 30.0
_POLICY = Path(__file__).parents[1] / "docs" / "security" / "s3-direct.json"


@contextmanager
def direct_settings(bucket: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings by which clients send parts straight to the store of these settings of a bucket. Blocks.

    MinIO gets a user with the policy of docs/security for it; other stores refuse headers that were not signed, so that
    the bucket's own key will do.
    """
    url = urlsplit(bucket["blobs_url"])
    public = {"s3_public_url": f"http://{url.netloc}"}
    with urllib3.PoolManager(timeout=urllib3.Timeout(_SECONDS)) as pool:
        if pool.request("GET", f"http://{url.netloc}/minio/health/live", retries=False).status != 200:
            yield public
            return
        keys = StaticProvider(bucket["s3_access_key"], bucket["s3_secret_key"])
        admin = MinioAdmin(
            endpoint=url.netloc, credentials=keys, region=bucket["s3_region"], secure=False, http_client=pool
        )
        user, secret = f"direct-{uuid.uuid4().hex[:12]}", secrets.token_urlsafe(24)
        policy = json.loads(_POLICY.read_text(encoding="utf-8").replace("BUCKET", url.path.strip("/")))
        admin.user_add(user, secret)
        try:
            admin.policy_add(user, policy=policy)
            admin.policy_set(user, user=user)
            yield {**public, "s3_public_access_key": user, "s3_public_secret_key": secret}
        finally:
            admin.user_remove(user)
            admin.policy_remove(user)


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
