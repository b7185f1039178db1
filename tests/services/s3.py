"""Shared by the S3 servers on one folder: keys, an endpoint, and a page that shows that they are ready."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import ClassVar

from tests.services.process import Server, is_ok

REGION = "us-east-1"


class S3Server(Server):
    """`endpoint` is `host:port`, to be spoken to by plain HTTP with `access_key` and `secret_key`."""

    health: ClassVar[str]
    """The path of the page."""

    def __init__(
        self, folder: Path, port: int | None = None, access_key: str | None = None, secret_key: str | None = None
    ) -> None:
        """Without keys: drawn at random. See Server for the rest."""
        super().__init__(folder, port)
        self.access_key = access_key or f"test-{secrets.token_hex(6)}"
        self.secret_key = secret_key or secrets.token_urlsafe(24)
        self.region = REGION

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def prepare(self) -> None:
        (self.folder / "data").mkdir(exist_ok=True)

    def answers(self) -> bool:
        return is_ok(f"http://{self.endpoint}{self.health}")
