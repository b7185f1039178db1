"""MinIO on one folder: the S3 that is tested first."""

from __future__ import annotations

import secrets
import urllib.error
import urllib.request
from pathlib import Path

from tests.services.install import minio_binary
from tests.services.process import Server

REGION = "us-east-1"


class MinioServer(Server):
    """One MinIO. `endpoint` is `host:port`, to be spoken to by plain HTTP with `access_key` and `secret_key`."""

    name = "minio"

    def __init__(
        self, folder: Path, port: int | None = None, access_key: str | None = None, secret_key: str | None = None
    ) -> None:
        """Without keys: drawn at random. See Server for the rest."""
        super().__init__(folder, port)
        self.access_key = access_key or f"test-{secrets.token_hex(6)}"
        self.secret_key = secret_key or secrets.token_urlsafe(24)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None:
        (self.folder / "data").mkdir(exist_ok=True)

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
        }

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/minio/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
