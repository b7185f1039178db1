"""Writing in another's name: who may do it, and how log, readers and repeats show the sender."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from artifact_store import Client
from artifact_store.registry import ANYONE
from services.config import Settings
from services.core.access import Right
from services.verify import verify
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.tokens import Tokens, bearer, principal

PACKAGE = {"name": "n", "producer": "lab", "subject": "s", "retention_class": "scratch"}
BOT = principal("bot", Right.READ, Right.WRITE, Right.DELEGATE)
WRITER = principal("writer", Right.READ, Right.WRITE)
TOKENS = Tokens(
    bot=BOT,
    renewed=BOT,
    other=principal("other", Right.READ, Right.WRITE, Right.DELEGATE),
    writer=WRITER,
    elsewhere=replace(WRITER, grants=(*WRITER.grants, *principal("", Right.DELEGATE, producers=("another",)).grants)),
    ada=principal("ada", Right.READ, Right.WRITE),
    all=principal("all", *Right),
)
ADA = {"X-Actor": "ci:ada"}
TUS = {"Tus-Resumable": "1.0.0"}
BEGIN = {**TUS, "Upload-Length": "2", "Upload-Metadata": f"relative_path {base64.b64encode(b'u').decode()}"}
APPEND = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("t")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"t"))
    return out.getvalue()


async def answered(
    gateway: RunningGateway, method: str, path: str, token: str, headers: dict[str, str], **body: Any
) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to this request."""
    sent = {**headers, **bearer(token)}
    async with gateway.session.request(method, path, headers=sent, **body) as answer:
        text = await answer.text()
        told = {"Location": answer.headers.get("Location")}
        return answer.status, {**told, **(json.loads(text) if text else {})}


async def created(gateway: RunningGateway, token: str, **headers: str) -> tuple[int, dict[str, Any]]:
    return await answered(gateway, "POST", "/v1/packages", token, headers, json=PACKAGE)


async def shown(gateway: RunningGateway) -> list[tuple[str, str, str | None]]:
    """Of each event, as followers over HTTP see it: type, actor, principal."""
    async with gateway.session.get("/v1/events", headers=bearer("all")) as answer:
        events = [json.loads(line) for line in (await answer.text()).splitlines()]
    return [(event["type"], event["actor"], event.get("principal")) for event in events]


def named(package: str) -> list[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """Every kind of write: method, path, headers, body."""
    return [
        ("POST", "/v1/packages", {}, {"json": PACKAGE}),
        ("PUT", f"/v1/packages/{package}/files/x", {}, {"data": b"bytes"}),
        ("POST", f"/v1/packages/{package}/files", {"Content-Type": "application/x-tar"}, {"data": tar()}),
        ("POST", f"/v1/packages/{package}/uploads", BEGIN, {}),
        ("POST", f"/v1/packages/{package}/finalize", {}, {}),
    ]


async def test_another_s_name_needs_the_right_before_anything_is_changed(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        _, made = await created(gateway, "all")
        for token in ("writer", "elsewhere"):  # without it, and with it for packages of another producer
            for method, path, headers, body in named(made["package_id"]):
                status, told = await answered(gateway, method, path, token, {**headers, **ADA}, **body)
                assert (status, told["type"]) == (403, "urn:artifact-store:problem:forbidden"), (token, path)
        assert await gateway.events() == 1
        assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and path.suffix != ".lock"]
        for method, path, headers, body in named(made["package_id"]):
            status, told = await answered(gateway, method, path, "writer", {**headers, "X-Actor": "ci:writer"}, **body)
            assert status < 300, (path, told)


async def test_an_event_names_the_sender_beside_the_actor(embedded_settings: Settings, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("bot")
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        _, made = await created(gateway, "bot", **ADA)
        package = made["package_id"]
        for method, path, headers, body in named(package)[1:]:
            status, told = await answered(gateway, method, path, "bot", {**headers, **ADA}, **body)
            assert status < 300, told
            if "uploads" in path:  # whoever began it goes on, whether they name the actor again or not
                assert (await answered(gateway, "PATCH", told["Location"], "ada", APPEND, data=b"ok"))[0] == 404
                assert (await answered(gateway, "PATCH", told["Location"], "renewed", APPEND, data=b"ok"))[0] == 204
        _, own = await created(gateway, "bot")
        both = "ci:ada", "ci:bot"
        assert await shown(gateway) == [
            ("v2.package.created", *both),
            *[("v2.file.ingested", *both)] * 3,
            ("v2.package.finalized", *both),
            ("v1.package.created", "ci:bot", None),
        ]
        async with gateway.session.get("/v1/events", headers={**bearer("bot"), "Accept": "text/event-stream"}) as feed:
            assert (await feed.text()).count('"actor":"ci:ada","principal":"ci:bot"') == 5
        async with Client(gateway.url, token_file=token_file) as client:
            seen = [event async for event in client.read_events()]
            assert [(event.actor, event.principal) for event in seen] == [*[both] * 5, ("ci:bot", None)]
            assert str(await client.create_package("n", "lab", "s", "scratch", "ci:ada")) != package
            assert await client.create_package("n", "lab", "s", "scratch", ANYONE) != UUID(own["package_id"])
        assert (await shown(gateway))[-2:] == [
            ("v2.package.created", *both),
            ("v1.package.created", "ci:bot", None),
        ]
        async with gateway.session.get(f"/v1/packages/{package}", headers=bearer("ada")) as answer:
            assert (await answer.json())["status"] == "finalized"
        report = await verify(gateway.parts.log, gateway.parts.blobs, gateway.parts.views)
        assert report.violations == []


async def test_repeats_belong_to_the_real_sender(embedded_settings: Settings) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        first, second = [await created(gateway, token, **key, **ADA) for token in ("bot", "other")]
        assert (first[0], second[0], first[1]["package_id"] != second[1]["package_id"]) == (201, 201, True)
        assert await created(gateway, "renewed", **key, **ADA) == first
        assert (await created(gateway, "bot", **key))[0] == 422, "the same key in one's own name is another request"
        assert (await created(gateway, "ada", **key))[1]["package_id"] not in (
            first[1]["package_id"],
            second[1]["package_id"],
        )

        file, key["Idempotency-Key"] = f"/v1/packages/{first[1]['package_id']}/files/a", str(uuid4())
        put = [
            await answered(gateway, "PUT", file, token, {**key, **named}, data=b"a")
            for token, named in (("bot", ADA), ("renewed", ADA), ("other", ADA), ("ada", {}), ("bot", {}))
        ]
        assert [status for status, _ in put] == [201, 201, 422, 422, 422]
        assert put[0] == put[1]
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:  # the state comes from the log
        assert await answered(gateway, "PUT", file, "bot", {**key, **ADA}, data=b"a") == put[0]
        assert (await answered(gateway, "PUT", file, "other", {**key, **ADA}, data=b"a"))[0] == 422


async def test_two_senders_do_not_share_an_upload(embedded_settings: Settings) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        _, made = await created(gateway, "bot")
        uploads = f"/v1/packages/{made['package_id']}/uploads"
        first = await answered(gateway, "POST", uploads, "bot", {**BEGIN, **key, **ADA})
        again = await answered(gateway, "POST", uploads, "renewed", {**BEGIN, **key, **ADA})
        assert (first[0], again) == (201, first)
        assert (await answered(gateway, "POST", uploads, "other", {**BEGIN, **key, **ADA}))[0] == 422
        # Who has all rights may go on with it. The event names who began it.
        assert (await answered(gateway, "PATCH", first[1]["Location"], "all", APPEND, data=b"ok"))[0] == 204
        assert (await shown(gateway))[-1] == ("v2.file.ingested", "ci:ada", "ci:bot")


async def test_a_sender_learns_in_whose_name_they_write(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        for token, headers, actor in (("bot", ADA, "ci:ada"), ("bot", {}, "ci:bot"), ("all", ADA, "ci:ada")):
            _, told = await answered(gateway, "GET", "/v1/whoami", token, headers)
            assert (told["actor"], told["principal"]) == (actor, f"ci:{token}")
        assert (await answered(gateway, "GET", "/v1/whoami", "writer", ADA))[0] == 403


async def test_with_all_rights_the_sender_is_named_as_well(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, authenticate=TOKENS) as gateway:
        _, made = await created(gateway, "all", **ADA)
        for method, path, headers, body in named(made["package_id"])[1:]:
            status, told = await answered(gateway, method, path, "all", {**headers, **ADA}, **body)
            assert status < 300, told
        assert {(actor, sender) for _, actor, sender in await shown(gateway)} == {("ci:ada", "ci:all")}


async def test_on_loopback_without_settings_whoever_is_named_is_the_sender(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway:
        async with gateway.session.post("/v1/packages", json=PACKAGE, headers=ADA) as answer:
            assert answer.status == 201
        assert await shown(gateway) == [("v1.package.created", "ci:ada", None)]
