"""A views URL that the driver cannot use is reported as a setting to mend, whenever the driver notices."""

from __future__ import annotations

import ssl
from pathlib import Path

import asyncpg
import pytest

from artifact_store.errors import ConfigurationError, UnavailableError
from services.views.database import Views

SECRET = "w0rd-that-nobody-sees"
POSTGRESQL = f"postgresql+asyncpg://ada:{SECRET}@127.0.0.1:1/views"


@pytest.mark.parametrize(
    "url",
    [
        f"{POSTGRESQL}?sslmode=require",
        f"{POSTGRESQL}?ssl=foo",
        f"{POSTGRESQL}?ssl=verify-full&sslrootcert=nowhere",
        f"{POSTGRESQL}?prepared_statement_cache_size=abc",
        f"{POSTGRESQL}?statement_cache_size=abc",
        POSTGRESQL.replace(":1/", ":99999/"),
        POSTGRESQL.replace("127.0.0.1", "a..b"),
        "sqlite+aiosqlite:///{folder}/views.db?timeout=abc",
    ],
)
async def test_what_the_driver_cannot_use_is_a_wrong_setting_and_is_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_VIEWS_URL") as refused:
        await Views(url.replace("{folder}", str(tmp_path))).check()
    assert SECRET not in refused.value.detail


@pytest.mark.parametrize("url", [POSTGRESQL, f"{POSTGRESQL}?ssl=require"])
async def test_a_database_that_is_not_there_is_no_wrong_setting(url: str) -> None:
    with pytest.raises(UnavailableError):
        await Views(url).check()


async def test_a_certificate_that_is_not_trusted_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError(1, "certificate verify failed")

    monkeypatch.setattr(asyncpg, "connect", refused)
    views = Views("postgresql+asyncpg://somebody@127.0.0.1:1/views?ssl=verify-full")
    try:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await views.check()
    finally:
        await views.close()
