"""The scenario through HTTP, only by the documented requests: no code of the client library."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID

import aiohttp
import pytest
from yarl import URL

from projector import replay
from tests.integration.scenario.driver import About, Driver, Product, Rejection, SourceFile, TailedEvent
from tests.integration.scenario.python import nothing_is_broken, view_digest

_MANIFEST_TYPES = {"cbor": "application/cbor", "json": "application/json"}
_PROBLEM_TYPE = "application/problem+json"


class ProblemError(Exception):
    """An answer that is an error: status, type and detail of its problem document (RFC 9457)."""

    def __init__(self, status: int, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind


class HttpDriver:
    """`Driver` over one session to a gateway."""

    def __init__(self, product: Product, session: aiohttp.ClientSession, url: str) -> None:
        self._product = product
        self._session = session
        self._url = url
        self._sequences: dict[UUID, int] = {}

    async def publish(
        self, about: About, files: Sequence[SourceFile], *, finalize: bool = True
    ) -> tuple[UUID, str | None]:
        fields = {
            "name": about.name,
            "producer": about.producer,
            "subject": about.subject,
            "retention_class": about.retention_class,
            "metadata": dict(about.metadata),
        }
        status, headers, body = await self._ask("POST", "/v1/packages", json=fields)
        created = json.loads(body)
        package_id = UUID(created["package_id"])
        assert (status, created["status"], created["sequence"]) == (201, "created", 1)
        assert headers["Location"].endswith(f"/v1/packages/{package_id}")
        for file in files:
            await self.add_file(package_id, file)
        if not finalize:
            return package_id, None
        finalized = await self._finalize(package_id)
        assert finalized["sequence"] == len(files) + 2
        return package_id, finalized["manifest_digest"]

    async def add_file(self, package_id: UUID, file: SourceFile) -> None:
        status, _, body = await self._ask(
            "PUT",
            f"/v1/packages/{package_id}/files/{quote(file.relative_path, safe='/')}",
            data=io.BytesIO(file.content),
            headers={"Content-Type": file.media_type},
        )
        assert status == 201
        stored = json.loads(body)
        assert stored["size_bytes"] == len(file.content)
        self._sequences[package_id] = stored["sequence"]

    async def finalize(self, package_id: UUID) -> None:
        await self._finalize(package_id)

    async def manifest(self, package_id: UUID, form: Literal["cbor", "json"]) -> bytes:
        _, headers, body = await self._ask(
            "GET", f"/v1/packages/{package_id}/manifest", headers={"Accept": _MANIFEST_TYPES[form]}
        )
        assert headers["Content-Type"].split(";")[0] == _MANIFEST_TYPES[form]
        return body

    async def contents(self, package_id: UUID) -> dict[str, bytes]:
        """Views lag behind the log: a reader says which of its own writes it must see."""
        wait = self._sequences[package_id]
        _, _, body = await self._ask("GET", f"/v1/packages/{package_id}/files?wait_sequence={wait}")
        page = json.loads(body)
        assert page["next"] is None
        found = {}
        for file in page["items"]:
            _, headers, content = await self._ask("GET", f"/v1/files/{file['file_id']}/content")
            assert headers["Content-Type"].split(";")[0] == file["media_type"]
            found[file["relative_path"]] = content
        return found

    async def tail(self, package_id: UUID | None = None) -> list[TailedEvent]:
        where = "" if package_id is None else f"?package_id={package_id}"
        _, headers, body = await self._ask("GET", f"/v1/events{where}", headers={"Accept": "application/x-ndjson"})
        assert headers["Content-Type"].split(";")[0] == "application/x-ndjson"
        events = [json.loads(line) for line in body.splitlines()]
        return [
            TailedEvent(event["type"], UUID(event["id"]), UUID(event["package_id"]), event["sequence"])
            for event in events
        ]

    async def replay(self, projection: str) -> None:
        """An operator's job, as the two below: there is no request for it."""
        await replay(self._product.settings, projection)

    async def digest(self, projection: str) -> str:
        return await view_digest(self._product.settings, projection)

    async def verify(self) -> None:
        await nothing_is_broken(self._product.settings)

    def expects(self, rejection: Rejection) -> AbstractContextManager[Any]:
        wanted = (rejection.status, rejection.problem)
        return pytest.raises(
            ProblemError, match=rejection.words, check=lambda found: (found.status, found.kind) == wanted
        )

    async def _finalize(self, package_id: UUID) -> dict[str, Any]:
        status, _, body = await self._ask("POST", f"/v1/packages/{package_id}/finalize")
        assert status == 200
        answer: dict[str, Any] = json.loads(body)
        self._sequences[package_id] = answer["sequence"]
        return answer

    async def _ask(self, method: str, target: str, **options: Any) -> tuple[int, Any, bytes]:
        """Status, headers and body of an answer; the target is sent as it is. Raises ProblemError."""
        async with self._session.request(method, URL(self._url + target, encoded=True), **options) as answer:
            body = await answer.read()
            if answer.status >= 400:
                assert answer.content_type == _PROBLEM_TYPE
                problem = json.loads(body)
                assert problem["status"] == answer.status
                raise ProblemError(answer.status, problem["type"].rpartition(":")[2], problem["detail"])
            return answer.status, answer.headers, body


@asynccontextmanager
async def http_driver(product: Product) -> AsyncIterator[Driver]:
    """A driver for this product, as long as it is open."""
    assert product.url is not None
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield HttpDriver(product, session, product.url)
