"""A small OIDC provider on loopback, with keys that rotate, outages, slow answers and the device flow (RFC 8628)."""

from __future__ import annotations

import asyncio
import ssl
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from joserfc import jwk, jwt
from joserfc.errors import SecurityWarning

AUDIENCE = "artifact-store"
CLIENT_ID = "artifact-store-cli"


class Provider:
    """Issues tokens and serves what is needed to check them."""

    def __init__(self) -> None:
        self.url = ""
        self.key: jwk.Key = new_key("first")
        self.published: list[jwk.Key] = [self.key]
        self.asked: Counter[str] = Counter()
        self.came = asyncio.Event()
        """Whether anybody has asked for anything."""
        self.away = False
        """Whether every request is answered with 503."""
        self.proceed = asyncio.Event()
        """Answers wait for it."""
        self.proceed.set()
        self.discovery: dict[str, Any] = {}
        """What the discovery document says in place of the truth."""
        self.approved = asyncio.Event()
        """Whether the person has typed in the code."""
        self.waits = 0
        """How often a client was told to be patient."""
        self.refresh_token = "refresh-1"
        self.lifetime = 300

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of a sound token, with changes; a claim that is None is left out."""
        now = int(time.time())
        found = {"iss": self.url, "sub": "job-7", "aud": AUDIENCE, "iat": now, "nbf": now, "exp": now + self.lifetime}
        return {name: value for name, value in {**found, **changes}.items() if value is not None}

    def token(self, key: jwk.Key | None = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
        """A token by the key that is in use, or by another one."""
        key = key or self.key
        algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA", "oct": "HS256"}[key.key_type]
        head = {"alg": algorithm, "kid": key.kid, **(header or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # of EdDSA by that name, which providers still sign by
            return jwt.encode(head, self.claims(**changes), key, algorithms=[head["alg"]])

    def rotate(self, name: str, *, keep: bool = False) -> None:
        """Sign with a new key from now on; the old one is published no more, unless it is kept."""
        self.key = new_key(name)
        self.published = [*(self.published if keep else ()), self.key]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any request."""
        self.asked[request.path] += 1
        self.came.set()
        await self.proceed.wait()
        if self.away:
            return web.Response(status=503)
        match request.path:
            case "/.well-known/openid-configuration":
                return web.json_response(
                    {
                        "issuer": self.url,
                        "jwks_uri": f"{self.url}/keys",
                        "token_endpoint": f"{self.url}/token",
                        "device_authorization_endpoint": f"{self.url}/device",
                        **self.discovery,
                    }
                )
            case "/keys":
                return web.json_response({"keys": [key.as_dict(private=False) for key in self.published]})
            case "/device":
                return web.json_response(
                    {
                        "device_code": "device-1",
                        "user_code": "ABCD-EFGH",
                        "verification_uri": f"{self.url}/activate",
                        "expires_in": 60,
                        "interval": 0,
                    }
                )
            case "/token":
                return await self._token(dict((await request.post()).items()))
        return web.Response(status=404)

    async def _token(self, form: dict[str, Any]) -> web.StreamResponse:
        refreshed = form.get("grant_type") == "refresh_token"
        if form.get("client_id") != CLIENT_ID:
            return web.json_response({"error": "invalid_client"}, status=400)
        if refreshed and form.get("refresh_token") != self.refresh_token:
            return web.json_response({"error": "invalid_grant"}, status=400)
        if not refreshed and not self.approved.is_set():
            self.waits += 1
            if self.waits > 1:
                self.approved.set()
            return web.json_response({"error": "authorization_pending"}, status=400)
        number = int(self.refresh_token.rpartition("-")[2])
        self.refresh_token = f"refresh-{number + 1}"
        token = self.token(aud=CLIENT_ID, sub="ada", jti=str(number))
        return web.json_response(
            {"id_token": token, "access_token": "opaque", "refresh_token": self.refresh_token, "expires_in": 300}
        )


def new_key(name: str, kind: str = "EC") -> jwk.Key:
    """A key pair of this id."""
    size: Any = {"EC": "P-256", "RSA": 2048, "OKP": "Ed25519"}[kind]
    return jwk.JWKRegistry.generate_key(kind, size, {"kid": name, "use": "sig"})


@asynccontextmanager
async def provider(tls: ssl.SSLContext | None = None) -> AsyncIterator[Provider]:
    """A provider that listens for the length of the block; over https with `tls`."""
    made = Provider()
    runner = web.ServerRunner(web.Server(made.answer), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    made.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        made.proceed.set()
        await runner.cleanup()
