"""An authenticator for tests: each token is the name of a principal that the test has defined."""

from __future__ import annotations

import time

from artifact_store.errors import UnauthenticatedError
from services.core.access import Grant, Packages, Principal, Right


def principal(
    name: str, *rights: Right, producers: tuple[str, ...] = ("*",), subjects: tuple[str, ...] = ("*",)
) -> Principal:
    """A principal of the issuer `ci` with these rights on packages of these producers and subjects."""
    return Principal(f"ci:{name}", (Grant(frozenset(rights), Packages(producers, subjects)),) if rights else ())


class Tokens:
    """The principals that hold tokens, by their token. Called as an `Authenticate`."""

    def __init__(self, **principals: Principal) -> None:
        self.principals = principals

    async def __call__(self, authorization: str | None) -> Principal:
        """See `Authenticate`."""
        if authorization is None:
            raise UnauthenticatedError("this needs a token: send it as `Authorization: Bearer TOKEN`")
        found = self.principals.get(authorization.removeprefix("Bearer "))
        if found is None or (found.expires_at is not None and found.expires_at <= time.time()):
            raise UnauthenticatedError("the token is not accepted", "invalid_token")
        return found


def bearer(token: str) -> dict[str, str]:
    """The header of a request with this token."""
    return {"Authorization": f"Bearer {token}"}
