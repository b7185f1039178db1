"""MinIO on one folder: the main S3 for tests."""

from __future__ import annotations

from tests.services.install import minio_binary
from tests.services.s3 import REGION, S3Server


class MinioServer(S3Server):
    """One MinIO."""

    name = "minio"

    health = "/minio/health/ready"

    def command(self) -> list[str]:
        certificates = str(self.folder / "certs")  # otherwise a folder in the user's home
        address = ["--address", self.endpoint]
        return [
            str(minio_binary()),
            "server",
            "--quiet",
            "--certs-dir",
            certificates,
            *address,
            str(self.folder / "data"),
        ]

    def environment(self) -> dict[str, str]:
        return {
            "MINIO_ROOT_USER": self.access_key,
            "MINIO_ROOT_PASSWORD": self.secret_key,
            "MINIO_REGION": REGION,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
            "MINIO_API_STALE_UPLOADS_EXPIRY": "720h",  # as in compose.yaml
        }
