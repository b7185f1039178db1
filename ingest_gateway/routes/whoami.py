"""Identity: who the sender is to the gateway, and where people get tokens."""

from __future__ import annotations

from aiohttp import web

from artifact_store.documents import times
from artifact_store.documents.shapes import GrantShape, LoginAnswer, LoginIssuer, WhoAmIAnswer
from artifact_store.errors import UnavailableError
from ingest_gateway.protocol.declaration import Route, Success
from ingest_gateway.protocol.parameters import ACTOR
from ingest_gateway.protocol.request import (
    JSON,
    Call,
    json_answer,
)


async def whoami(call: Call) -> web.StreamResponse:
    """GET /v1/whoami."""
    found = call.principal
    return json_answer(
        WhoAmIAnswer(
            actor=call.actor,
            principal=found.actor,
            rights=[
                GrantShape(
                    can=sorted(grant.rights),
                    producers=list(grant.packages.producers),
                    subjects=list(grant.packages.subjects),
                )
                for grant in found.grants
            ],
            expires_at=None if found.expires_at is None else times.to_text(int(found.expires_at * 1_000_000)),
        ),
        headers={"Cache-Control": "no-store"},
    )


async def list_logins(call: Call) -> web.StreamResponse:
    """GET /v1/login."""
    return json_answer(
        LoginAnswer(
            issuers=[
                LoginIssuer(alias=choice.alias, url=choice.url, client_id=choice.client_id)
                for choice in call.gateway.logins()
            ]
        )
    )


ROUTES = (
    Route(
        "GET",
        "/v1/whoami",
        whoami,
        "Show who the sender is to the gateway, and what they may do",
        (Success(200, "The principal", {JSON: WhoAmIAnswer}),),
        access="identified",
        parameters=(ACTOR,),
        problems=(UnavailableError,),
        tag="operation",
    ),
    Route(
        "GET",
        "/v1/login",
        list_logins,
        "List the issuers at which people can log in",
        (Success(200, "The issuers, each with the client id for the login", {JSON: LoginAnswer}),),
        access="open",
        description="`artifact-store login` reads this. A login is the device flow (RFC 8628) with the issuer, which "
        "does not involve the gateway; later requests send the ID token that the issuer gives.",
        tag="operation",
    ),
)
