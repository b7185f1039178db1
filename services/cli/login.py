"""`login`, `logout` and `whoami`: who you are at a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from services.cli.command import ACTOR, answer, common_options, invocation, remark, run

if TYPE_CHECKING:
    from artifact_store.client.device_login import Prompt
    from artifact_store.client.transport import Transport
    from artifact_store.documents.shapes import LoginIssuer, WhoAmIAnswer
    from services.config import Settings


@click.command()
@click.option("--issuer", metavar="ALIAS", help="The issuer to log in at, if the gateway offers several.")
@common_options(shown=("url", "ca"))
def login(issuer: str | None) -> None:
    """Log in to the gateway of --url as a person, in a browser on any device.

    The tokens are kept in your state folder, readable by you alone, and renewed as long as the issuer allows it. Later
    commands with the same --url use them.
    """
    found = run(_login(issuer))
    answer(found.model_dump(), f"logged in as {found.actor}")


async def _login(alias: str | None) -> WhoAmIAnswer:
    from artifact_store.client.device_login import log_in
    from artifact_store.client.transport import RetryPolicy, Transport, read_answer
    from artifact_store.documents.shapes import LoginAnswer

    settings = invocation().settings()
    url = _url(settings)
    async with Transport(url, RetryPolicy(), ca=settings.ca) as transport:
        offered = read_answer(LoginAnswer, await transport.call("GET", "/v1/login"))
    await log_in(url, _chosen(offered.issuers, alias), _show, ca=settings.ca)
    async with open_transport(settings, stored=True) as transport:
        return await who_is(transport)


def _chosen(offered: list[LoginIssuer], alias: str | None) -> LoginIssuer:
    from artifact_store.errors import ConfigurationError

    if not offered:
        raise ConfigurationError(
            "nobody can log in at this gateway: its policy has no issuer with a client_id; "
            "set ARTIFACT_STORE_TOKEN_FILE to a file with a token"
        )
    known = ", ".join(issuer.alias for issuer in offered)
    if alias is None and len(offered) > 1:
        raise click.UsageError(f"choose one with --issuer: {known}")
    for issuer in offered:
        if alias in (None, issuer.alias):
            return issuer
    raise click.UsageError(f"the gateway has no issuer {alias!r} to log in at; it has {known}")


def _show(prompt: Prompt) -> None:
    from services.cli.command import visible

    click.echo(visible(f"open {prompt.complete or prompt.address}"), err=True)
    click.echo(visible(f"and confirm the code {prompt.code} within {prompt.seconds / 60:.0f} minutes"), err=True)


@click.command()
@common_options(shown=("url",))
def logout() -> None:
    """Forget the login at the gateway of --url. The issuer may keep its own session for longer."""
    from artifact_store.client.device_login import forget_login

    forgotten = forget_login(_url(invocation().settings()))
    answer({"logged_out": forgotten}, "logged out" if forgotten else "nobody was logged in")


@click.command()
@ACTOR
@common_options(shown=("url", "token_file", "ca"))
def whoami(*, actor: str | None) -> None:
    """Show who you are to the gateway of --url, and what you may do; without --url, who you are on this machine."""
    found = run(_whoami(actor))
    if invocation().as_json:
        answer(found.model_dump())
        return
    rights = [
        f"{', '.join(grant.can)} on packages of {', '.join(grant.producers)} about {', '.join(grant.subjects)}"
        for grant in found.rights
    ]
    who = {"actor": found.actor, "principal": found.principal}
    answer({**who, "rights": "; ".join(rights) or "none", "expires_at": found.expires_at})
    if not rights:
        remark("no rule of the gateway's policy matches you: ask its operator for rights")


async def _whoami(actor: str | None) -> WhoAmIAnswer:
    settings = invocation().settings()
    if settings.url is None:
        from artifact_store.documents.shapes import GrantShape, WhoAmIAnswer
        from services.core.access import Right
        from services.identity.actors import local_actor

        everything = GrantShape(can=sorted(Right), producers=["*"], subjects=["*"])
        return WhoAmIAnswer(actor=actor or local_actor(), principal=local_actor(), rights=[everything], expires_at=None)
    async with open_transport(settings) as transport:
        return await who_is(transport, actor)


async def who_is(transport: Transport, actor: str | None = None) -> WhoAmIAnswer:
    """Who the sender is to the gateway, if they act in this actor's name."""
    from artifact_store.client.transport import read_answer
    from artifact_store.documents import http
    from artifact_store.documents.shapes import WhoAmIAnswer

    headers = {} if actor is None else {http.ACTOR: actor}
    return read_answer(WhoAmIAnswer, await transport.call("GET", "/v1/whoami", headers=headers))


def open_transport(settings: Settings, *, seconds: float = 60.0, stored: bool = False) -> Transport:
    """A transport to the gateway of the settings, with the user's credentials; `stored`: only with those of `login`."""
    from artifact_store.client.device_login import find_credentials, stored_login
    from artifact_store.client.transport import RetryPolicy, Transport

    url = _url(settings)
    found = stored_login(url, settings.ca) if stored else find_credentials(url, settings.token_file, settings.ca)
    return Transport(url, RetryPolicy(total_seconds=seconds), credentials=found, ca=settings.ca)


def _url(settings: Settings) -> str:
    from artifact_store.errors import ConfigurationError

    if settings.url is None:
        raise ConfigurationError("name the gateway with --url or ARTIFACT_STORE_URL")
    return settings.url
