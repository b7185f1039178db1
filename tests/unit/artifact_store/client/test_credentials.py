"""A client's credentials: where they come from, where they are sent, and where they are never shown."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from artifact_store import Client, ConfigurationError, RetryPolicy
from artifact_store.client import device_login
from artifact_store.client.credentials import TokenFile
from artifact_store.client.device_login import Login, Prompt, find_credentials, forget_login, log_in, stored_login
from artifact_store.documents.shapes import LoginIssuer
from artifact_store.errors import ArtifactStoreError, UnauthenticatedError, UnavailableError
from tests.oidc_provider import CLIENT_ID, Provider, provider
from tests.unit.artifact_store.client.failing_gateway import PACKAGE, QUICK, FailingGateway, failing_gateway, refuses

URL = "https://gateway.example"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No login and no variable of the user that the tests run as."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state home"))
    monkeypatch.delenv("ARTIFACT_STORE_TOKEN_FILE", raising=False)
    return tmp_path


@pytest.fixture
async def issuer() -> AsyncIterator[Provider]:
    async with provider() as made:
        yield made


def file_of(folder: Path, token: str) -> Path:
    path = folder / "token"
    path.with_suffix(".new").write_text(token + "\n")
    return path.with_suffix(".new").rename(path)


async def ask(gateway: FailingGateway, **options: Path) -> None:
    async with Client(gateway.url, QUICK, **options) as client:  # type: ignore[arg-type]  # paths by their names
        with pytest.raises(ArtifactStoreError):
            await client.get_package(PACKAGE)


async def test_the_token_in_the_file_is_sent_and_read_again_when_it_changes(home: Path) -> None:
    path = file_of(home, "first")
    async with failing_gateway(refuses(404, "package-not-found")) as gateway:
        async with Client(gateway.url, QUICK, token_file=path) as client:
            for token in ("first", "second", "second"):
                file_of(home, token)
                with pytest.raises(ArtifactStoreError):
                    await client.get_package(PACKAGE)
        assert gateway.sent("Authorization") == ["Bearer first", "Bearer second", "Bearer second"]


async def test_the_environment_names_the_file_unless_the_caller_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "other").write_text("other")
    monkeypatch.setenv("ARTIFACT_STORE_TOKEN_FILE", str(file_of(home, "mine")))
    async with failing_gateway(refuses(404, "package-not-found")) as gateway:
        await ask(gateway)
        await ask(gateway, token_file=home / "other")
        assert gateway.sent("Authorization") == ["Bearer mine", "Bearer other"]


async def test_without_credentials_nothing_is_sent() -> None:
    async with failing_gateway(refuses(404, "package-not-found")) as gateway:
        await ask(gateway)
        assert gateway.sent("Authorization") == [None]


@pytest.mark.parametrize("url", ["http://gateway.example", "http://10.0.0.1:8080", "http://localhost.example"])
def test_a_token_is_never_sent_in_the_clear(url: str, home: Path) -> None:
    Client(url)
    with pytest.raises(ConfigurationError, match="is not https"):
        Client(url, token_file=file_of(home, "sesame"))


async def test_a_redirect_is_not_followed(home: Path) -> None:
    async def elsewhere(_request: web.BaseRequest, _body: bytes) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": other.url})

    async with failing_gateway(refuses(404, "package-not-found")) as other, failing_gateway(elsewhere) as gateway:
        await ask(gateway, token_file=file_of(home, "sesame"))
        assert other.seen == []


async def test_no_error_log_or_text_shows_the_token(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def nonsense(request: web.BaseRequest, _body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 999999 ???\r\n\x00\r\n\r\n")
        request.transport.close()
        return web.Response()

    path, once = file_of(home, "sesame"), RetryPolicy(total_seconds=0.1)
    async with failing_gateway(nonsense) as gateway, Client(gateway.url, once, token_file=path) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.get_package(PACKAGE)
        assert gateway.sent("Authorization")[0] == "Bearer sesame"
    chain: list[BaseException] = [caught.value]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "sesame" not in told + repr(TokenFile(path)) + "".join(map(repr, chain[:1]))


@pytest.mark.parametrize("content", ["", "two words", "a\nb", "ä", "x" * (65 << 10)])
async def test_a_file_without_a_token_is_named_and_not_shown(content: str, home: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not hold a token") as caught:
        await TokenFile(file_of(home, content)).token()
    assert not content or content not in caught.value.detail


async def test_a_file_that_is_not_there_is_named(home: Path) -> None:
    with pytest.raises(ConfigurationError, match="none cannot be read"):
        await TokenFile(home / "none").token()


# --- logins ---


async def logged_in(issuer: Provider) -> tuple[Login, list[Prompt]]:
    told: list[Prompt] = []
    found = await log_in(URL, LoginIssuer(alias="sso", url=issuer.url, client_id=CLIENT_ID), told.append)
    return found, told


async def test_a_login_waits_for_the_person_and_is_kept_for_this_gateway_alone(issuer: Provider, home: Path) -> None:
    found, told = await logged_in(issuer)
    assert (told[0].address, told[0].code) == (f"{issuer.url}/activate", "ABCD-EFGH")
    assert issuer.waits == 2
    token = await found.token()
    again = find_credentials(URL + "/")
    assert isinstance(again, Login)
    assert await again.token() == token
    assert stored_login("https://other.example") is None
    (file,) = (home / "state home").rglob("*.json")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert token not in repr(found) + repr(vars(found))
    assert forget_login(URL)
    assert not forget_login(URL)
    assert list((home / "state home").rglob("*.json")) == []
    with pytest.raises(UnauthenticatedError, match="artifact-store login"):
        await again._renewed()


async def test_a_login_that_is_about_to_end_is_renewed_once_for_all(issuer: Provider) -> None:
    issuer.lifetime = 30
    await logged_in(issuer)
    issuer.lifetime = 300
    first, second = Login(device_login._file_of(URL)), Login(device_login._file_of(URL))  # type: ignore[arg-type]  # there is a home
    asked = issuer.asked["/token"]
    tokens = await asyncio.gather(first.token(), second.token(), first.token(), second.token())
    assert len(set(tokens)) == 1
    assert issuer.asked["/token"] == asked + 1
    assert json.loads(device_login._file_of(URL).read_text())["refresh_token"] == issuer.refresh_token  # type: ignore[union-attr]


async def test_a_login_goes_on_while_the_issuer_is_away_until_its_token_expires(issuer: Provider) -> None:
    issuer.lifetime = 30
    found, _ = await logged_in(issuer)
    issuer.away = True
    assert (await found.token()).count(".") == 2
    issuer.away, issuer.lifetime = False, -5
    await found.token()  # renewed, but to what has expired
    issuer.away = True
    with pytest.raises(UnavailableError, match="status 503"):
        await found.token()
    issuer.away, issuer.refresh_token = False, "refresh-99"
    with pytest.raises(UnauthenticatedError, match=f"has ended; run `artifact-store login --url {URL}`"):
        await found.token()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"issuer": "https://other.example"}, "another issuer"),
        ({"device_authorization_endpoint": None}, "no device_authorization_endpoint"),
        ({"token_endpoint": "http://tokens.example"}, "is not https"),
    ],
)
async def test_an_issuer_that_cannot_be_right_is_not_used(
    changes: dict[str, str], cause: str, issuer: Provider
) -> None:
    issuer.discovery = changes
    with pytest.raises(ConfigurationError, match=cause):
        await logged_in(issuer)
    assert issuer.asked["/device"] == 0


async def test_a_login_that_nobody_confirms_ends(issuer: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_login, "_number", lambda *_: 0.0)  # the code is good for no time
    with pytest.raises(UnauthenticatedError, match="in time"):
        await logged_in(issuer)
    assert stored_login(URL) is None


def test_a_damaged_login_is_named_and_not_shown(home: Path) -> None:
    path = home / "login.json"
    for content in ('{"id_token": "sesame"}', "sesame", "[]"):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match="is damaged") as caught:
            asyncio.run(Login(path).token())
        assert "sesame" not in "".join(traceback.format_exception(caught.value))
