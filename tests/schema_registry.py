"""A schema registry in this process, as far as we use Confluent's interface; it fails on request.

The real one, `tests.services.apicurio`, takes 10 s to start and cannot be made to lose schemas or loosen its rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote


class FakeRegistry:
    """What it holds may be read and changed at any time."""

    def __init__(self) -> None:
        self.url = ""
        self.schemas: dict[str, str] = {}
        """By subject; a schema's id is its place, from 1."""
        self.levels: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and `Authorization` of each."""
        self.status: int | None = None
        """What everything is answered with, when it is set."""

    def id_of(self, subject: str) -> int:
        """The id of its schema."""
        return list(self.schemas).index(subject) + 101

    def answer(self, method: str, path: str, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        if self.status is not None:
            return self.status, {"error_code": self.status, "message": "it was told to"}
        match [method, *map(unquote, path.strip("/").split("/"))]:
            case ["POST", "subjects", subject] if self.schemas.get(subject) == document["schema"]:
                return 200, {"subject": subject, "id": self.id_of(subject), "version": 1, **document}
            case ["POST", "subjects", subject, "versions"]:
                self.schemas[subject] = document["schema"]
                return 200, {"id": self.id_of(subject)}
            case ["PUT", "config", subject]:
                self.levels[subject] = document["compatibility"]
                return 200, document
            case ["GET", "config", subject] if subject in self.levels:
                return 200, {"compatibilityLevel": self.levels[subject]}
        return 404, {"error_code": 40401, "message": "not found"}


@contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    """It runs for the length of the block."""
    registry = FakeRegistry()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            registry.requests.append((self.command, self.path, self.headers.get("Authorization")))
            status, document = registry.answer(self.command, self.path, json.loads(body) if body else {})
            sent = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815 - names of http.server

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as http.server names it
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        registry.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
