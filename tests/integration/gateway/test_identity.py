"""A started gateway identifies senders by the files that its settings name."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from artifact_store.errors import ConfigurationError
from ingest_gateway import server
from ingest_gateway.protocol.connections import Connection
from services.config import Settings
from services.core.access import Right
from services.identity.static_tokens import create_token, revoke_tokens
from tests.integration.processes import COMMAND, command_environment
from tests.integration.tokens import bearer
from tests.oidc_provider import CLIENT_ID, provider
from tests.unit.identity.test_tokens import BAD, write_policy

PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway of these settings."""
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.run(settings, stop=stop, ready=url.set_result))
        async with aiohttp.ClientSession(await url) as session:
            yield session
        stop.set()


async def test_on_loopback_without_settings_the_sender_is_the_local_user(embedded_settings: Settings) -> None:
    async with started(embedded_settings) as client:
        async with client.get("/v1/whoami") as answer:
            found = await answer.json()
        assert found["actor"].startswith("local:")
        async with client.post("/v1/packages", json=PACKAGE) as answer:
            assert answer.status == 201
        async with client.get("/v1/events") as answer:
            assert f'"actor":"{found["actor"]}"' in await answer.text()


async def test_with_policy_and_tokens_each_sender_is_who_the_token_says(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    async with provider() as issuer:
        policy, tokens = tmp_path / "policy.toml", tmp_path / "tokens.json"
        policy.write_text(
            f'[[issuer]]\nalias = "sso"\nurl = "{issuer.url}"\naudience = ["{CLIENT_ID}"]\nclient_id = "{CLIENT_ID}"\n'
            '[[rule]]\nissuer = "sso"\nclaims = { sub = "ada" }\ncan = ["read"]\n'
        )
        _, token = create_token(tokens, "robot", [Right.WRITE], now=time.time())
        issuer.away = True  # which keeps no gateway from starting
        settings = replace(embedded_settings, policy=policy, tokens=tokens, audit_file=tmp_path / "audit.jsonl")
        async with started(settings) as client:
            async with client.get("/v1/whoami") as answer:
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="artifact-store"')
            async with client.get("/v1/login") as answer:
                assert await answer.json() == {"issuers": [{"alias": "sso", "url": issuer.url, "client_id": CLIENT_ID}]}
            async with client.get("/v1/packages", headers=bearer(issuer.token(aud=CLIENT_ID, sub="ada"))) as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
            async with client.post("/v1/packages", json=PACKAGE, headers=bearer(token)) as answer:
                assert answer.status == 201
            async with client.get("/v1/packages", headers=bearer(token)) as answer:
                assert answer.status == 403
            # A sender may write these headers, too: the address in the audit stream is that of the connection.
            passed_on = {"X-Forwarded-For": "192.0.2.7", "X-Real-IP": "192.0.2.7", "Forwarded": "for=192.0.2.7"}
            named = {**bearer(token), **passed_on, "X-Actor": "sso:ada"}
            async with client.post("/v1/packages", json=PACKAGE, headers=named) as answer:
                assert answer.status == 403
            async with client.get("/metrics") as answer:
                shown = await answer.text()
        audited = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [(one["principal"], one["action"], one["status"], one["allowed"]) for one in audited] == [
            (None, "GET /v1/whoami", 401, False),
            ("token:robot", "POST /v1/packages", 201, True),
            ("token:robot", "GET /v1/packages", 403, False),
            ("token:robot", "POST /v1/packages", 403, False),
        ]
        assert [one.get("actor") for one in audited] == [None, None, None, "sso:ada"]
        assert {one["client"] for one in audited} == {"127.0.0.1"}
        assert 'artifact_store_authentications_total{issuer="token",outcome="accepted"} 3.0' in shown
        assert 'artifact_store_authentications_total{issuer="sso",outcome="unavailable"} 1.0' in shown


async def test_what_a_sender_may_not_know_of_is_no_allowed_request_in_the_audit_stream(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    tokens, file = tmp_path / "tokens.json", tmp_path / "audit.jsonl"
    _, all_rights = create_token(tokens, "all", list(Right), now=time.time())
    _, of_team = create_token(tokens, "team", [Right.READ, Right.WRITE], producers=["team"], now=time.time())
    async with started(replace(embedded_settings, tokens=tokens, audit_file=file)) as client:
        for producer, token in (("other", all_rights), ("team", of_team)):
            async with client.post(
                "/v1/packages", json={**PACKAGE, "producer": producer}, headers=bearer(token)
            ) as made:
                package = (await made.json())["package_id"]
            path = f"/v1/packages/{package}/files/a"
            async with client.put(path, data=b"x", headers=bearer(all_rights)) as put:
                file_id = (await put.json())["file_id"]
            targets = (f"/v1/packages/{package}", path, f"/v1/files/{file_id}", f"/v1/packages/{package}/files/b")
            for target in targets:
                async with client.get(target, headers=bearer(of_team)) as answer:
                    await answer.read()
            async with client.post(f"/v1/packages/{package}/finalize", headers=bearer(of_team)) as answer:
                await answer.read()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    team = [(one["status"], one["allowed"], one.get("unseen")) for one in lines if one["principal"] == "token:team"]
    assert team[:5] == [(404, False, True)] * 5
    assert team[5:] == [(201, True, None), *[(200, True, None)] * 3, (404, True, None), (200, True, None)]


async def test_the_audit_stream_has_the_whole_address_also_where_limits_count_its_network(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, file = "2001:db8:1:2:3::4", tmp_path / "audit.jsonl"
    monkeypatch.setattr(Connection, "peername", (address, 1, 0, 0))  # not every machine has IPv6
    settings = replace(embedded_settings, tokens=tmp_path / "tokens.json", audit_file=file)
    async with started(settings) as client, client.get("/v1/whoami") as answer:
        assert answer.status == 401
    assert json.loads(file.read_text())["client"] == address


async def test_no_bad_token_gets_past_a_gateway(embedded_settings: Settings, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    made, revoked = create_token(tokens, "gone", list(Right), now=time.time())
    revoke_tokens(tokens, made.id)
    async with provider() as issuer:
        policy = write_policy(tmp_path, issuer)
        bad = {kind: make(issuer) for kind, (make, _) in BAD.items()} | {"revoked": revoked}
        async with started(replace(embedded_settings, policy=policy, tokens=tokens)) as client:
            for kind, token in bad.items():
                for method, path in (("POST", "/v1/packages"), ("GET", "/v1/events?follow=true")):
                    async with client.request(method, path, headers=bearer(token)) as answer:
                        assert answer.status == 401, kind
                        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
                        assert token not in await answer.text() + str(answer.headers)
            async with client.get("/v1/packages", headers=bearer(issuer.token())) as answer:
                assert answer.status == 200


async def command(folder: Path, url: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a client's command, whose user's files are in `folder`."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env=command_environment(None, url, folder),
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


@pytest.mark.processes
async def test_a_person_logs_in_from_a_terminal(embedded_settings: Settings, tmp_path: Path) -> None:
    async with provider() as issuer:
        policy = tmp_path / "policy.toml"
        policy.write_text(
            f'[[issuer]]\nalias = "sso"\nurl = "{issuer.url}"\naudience = ["{CLIENT_ID}"]\nclient_id = "{CLIENT_ID}"\n'
            '[[rule]]\nissuer = "sso"\nclaims = { sub = "ada" }\ncan = ["read"]\nproducers = ["lab"]\n'
        )
        async with started(replace(embedded_settings, policy=policy)) as client:
            url = str(client._base_url).rstrip("/")
            code, _, errors = await command(tmp_path, url, "packages")
            assert (code, "this needs a token" in errors) == (1, True)
            code, output, errors = await command(tmp_path, url, "login")
            assert (code, output) == (0, "logged in as sso:ada\n"), errors
            assert f"open {issuer.url}/activate\nand confirm the code ABCD-EFGH" in errors
            code, output, errors = await command(tmp_path, url, "whoami")
            assert "read on packages of lab about *" in output, errors
            assert (await command(tmp_path, url, "logout"))[:2] == (0, "logged out\n")


async def test_a_policy_that_is_invalid_keeps_a_gateway_from_starting(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text("[[issuer]]\nalias = 7\n")
    with pytest.raises(ConfigurationError, match=r"policy\.toml is invalid: \[\[issuer\]\] 1 \(line 1\), alias"):
        await server.run(replace(embedded_settings, policy=tmp_path / "policy.toml"), stop=asyncio.Event())


def test_beyond_loopback_something_must_say_who_may_ask(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_TOKENS"):
        server.listen_address(Settings(listen="0.0.0.0:0"))
    assert not server.listen_address(Settings(listen="0.0.0.0:0", tokens=tmp_path / "tokens.json")).is_loopback
