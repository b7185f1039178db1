"""Owners: subscriptions from Python and the command line, and rights that follow tokens and the policy."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from uuid import UUID

import pytest
from click.testing import CliRunner

from artifact_store import Client, EventFilter
from artifact_store.errors import InvalidRequestError, NotFoundError
from services.cli import main
from services.config import Settings
from services.core.access import Right, scope
from services.identity.authenticator import Authenticator
from services.identity.static_tokens import create_token, revoke_tokens
from services.webhooks.subscriptions import Subscriptions
from tests.integration.webhooks.stage import Stage, stage
from tests.oidc_provider import AUDIENCE, provider

POLICY = """
[[issuer]]
alias = "ci"
url = "{url}"
audience = ["{audience}"]
[[rule]]
issuer = "ci"
claims = {{ team = "{team}" }}
can = ["read", "subscribe"]
"""


async def test_subscriptions_from_python_and_the_command_line(embedded_settings: Settings) -> None:
    async with stage(embedded_settings) as on, Client(on.gateway.url) as client:
        wanted = EventFilter(producers={"ci"}, types={"v1.package.finalized"})
        made = await client.subscriptions.create("https://receiver.example/", wanted)
        assert made.filters.to_filter() == wanted
        with pytest.raises(InvalidRequestError, match="no public address"):
            await client.subscriptions.create("https://10.0.0.1/")

        async def command(*arguments: str) -> list[dict[str, object]]:
            flags = ["subscriptions", *arguments, "--json", "--quiet", "--url", on.gateway.url]
            done = await asyncio.to_thread(CliRunner().invoke, main, flags)
            assert done.exit_code == 0, done.output
            return [json.loads(line) for line in done.stdout.splitlines()]

        (other,) = await command("create", "https://other.example/", "--subject", "main", "--since", "now")
        assert {one["subscription_id"] for one in await command("list")} == {
            str(made.subscription_id),
            other["subscription_id"],
        }
        name = str(other["subscription_id"])
        for verb, state in (("pause", "paused"), ("resume", "active")):
            assert (await command(verb, name))[0]["state"] == state
        (changed,) = await command("change", name, "--target", "https://new.example/")
        assert (changed["url"], changed["filters"]) == ("https://new.example/", other["filters"])
        assert (await command("rotate", name))[0]["secret"] != other["secret"]
        assert (await command("test", name))[0]["subscription_id"] == name
        await command("redeliver", name, "--since", "2020-01-01T00:00:00Z")
        assert await command("deliveries", name) == []
        await command("delete", name)
        with pytest.raises(NotFoundError):
            await client.subscriptions.get(UUID(name))
        await create_repeatedly(on)


async def create_repeatedly(on: Stage) -> None:
    """A creation that is sent again with its key makes one subscription."""
    key = {"Idempotency-Key": "3f0e8f58-1f06-4e0c-9a2e-2c4f6d5b7a11"}
    answers = []
    for url, status in (("https://a.example/", 201), ("https://a.example/", 201), ("https://b.example/", 422)):
        async with on.gateway.session.post("/v1/subscriptions", json={"url": url}, headers=key) as answer:
            assert answer.status == status
            answers.append(await answer.json())
    assert answers[0] == answers[1]


async def test_the_rights_of_a_subscription_follow_its_token_and_the_policy(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    policy, tokens, ticks = tmp_path / "policy.toml", tmp_path / "tokens.json", [0.0]
    async with provider() as issuer:
        policy.write_text(POLICY.format(url=issuer.url, audience=AUDIENCE, team="red"))
        made, static = create_token(tokens, "bot", [Right.READ, Right.SUBSCRIBE], now=time.time(), days=1)
        async with Authenticator(policy=policy, tokens=tokens, ticks=lambda: ticks[0]) as who:
            of_issuer = await who.authenticate(f"Bearer {issuer.token(sub='job', team='red', email='a@b.c')}")
            of_token = await who.authenticate(f"Bearer {static}")
            assert of_issuer.basis == {"issuer": "ci", "claims": {"team": "red"}}
            assert all(scope(who.grants_of(one.basis), Right.SUBSCRIBE) for one in (of_issuer, of_token))
            policy.write_text(POLICY.format(url=issuer.url, audience=AUDIENCE, team="blue"))
            revoke_tokens(tokens, made.id)
            ticks[0] += 2.0
            assert [who.grants_of(one.basis) for one in (of_issuer, of_token)] == [(), ()]
            assert who.grants_of({}) == ()
        anyone = Authenticator.open(embedded_settings)
        assert anyone.grants_of({}) != ()
        assert anyone.grants_of(of_token.basis) == (), "a process without policy gives rights to who had a token"


async def test_nobody_sees_or_redirects_the_subscriptions_of_others(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.json"
    named = {}
    for name, rights in (
        ("owner", [Right.READ, Right.SUBSCRIBE]),
        ("other", [Right.READ, Right.SUBSCRIBE]),
        ("operator", [Right.READ, Right.SUBSCRIBE, Right.OPERATE]),
        ("blind", [Right.SUBSCRIBE]),
    ):
        _, named[name] = create_token(tokens, name, rights, now=time.time())
    async with Authenticator(tokens=tokens) as who, stage(embedded_settings, authenticate=who.authenticate) as on:
        made = await on.call("POST", "", 201, named["owner"], url="https://receiver.example/")
        one = f"/{made['subscription_id']}"
        await on.call("POST", "", 403, named["blind"], url="https://receiver.example/")
        assert (await on.call("GET", "", 200, named["other"]))["items"] == []
        await on.call("GET", one, 404, named["other"])
        assert len((await on.call("GET", "", 200, named["operator"]))["items"]) == 1
        assert (await on.call("PATCH", one, 200, named["operator"], paused=True))["owner"] == "token:owner"
        for method, path, body in (
            ("PATCH", one, {"url": "https://elsewhere.example/"}),
            ("PATCH", one, {"filters": {}}),
            ("POST", f"{one}/rotate", {}),
            ("POST", f"{one}/redeliver", {"since": "2020-01-01T00:00:00Z"}),
            ("GET", f"{one}/deliveries", {}),
        ):
            await on.call(method, path, 404, named["operator"], **body)
        (kept,) = await Subscriptions(on.gateway.parts.views).page(None, 10)
        assert kept.basis.keys() == {"token"}
        await on.call("DELETE", one, 204, named["operator"])
