"""Which services on other machines may be used without TLS: none, unless a setting says so."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from artifact_store.errors import ConfigurationError, UnavailableError
from services.config import Settings
from services.views.database import Views
from services.wiring import open_blobs, open_log, open_views

KEYS = {"s3_access_key": "a", "s3_secret_key": "b"}
TLS = {"security.protocol": "SASL_SSL"}
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("kafka", {"log_url": "kafka://broker.example:9092/x"}),
    ("kafka", {"log_url": "kafka://127.0.0.1:9092,192.0.2.1:9092/x"}),
    ("kafka", {"log_url": "kafka://b:1/x", "kafka_options": {"security.protocol": "sasl_plaintext"}}),
    ("kafka", {"log_url": "kafka://b:1/x", "kafka_options": {**TLS, "enable.ssl.certificate.verification": False}}),
    ("kafka", {"log_url": "kafka://b:1/x", "kafka_options": {**TLS, "ssl.endpoint.identification.algorithm": "none"}}),
    ("s3", {"blobs_url": "s3+http://store.example:9000/bucket", **KEYS}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@db.example/x?ssl=prefer"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@db.example/x?ssl=disable"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@/x?host=db.example&ssl=allow"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@[2001:db8::1]:5432/x?ssl=prefer"}),
]
PRIVATE: list[tuple[str, dict[str, Any]]] = [
    ("kafka", {"log_url": "kafka://127.0.0.1:9092,[::1]:9092,localhost:1/x"}),
    ("kafka", {"log_url": "kafka://b:1/x", "kafka_options": TLS}),
    ("s3", {"blobs_url": "s3://store.example/bucket", **KEYS}),
    ("s3", {"blobs_url": "s3+http://[::1]:9000/bucket", **KEYS}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@db.example/x"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@db.example/x?ssl=verify-full"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@127.0.0.1/x?ssl=prefer"}),
    ("postgresql", {"views_url": "postgresql+asyncpg://u@/x?host=/run/postgresql&ssl=disable"}),
]


async def opened(service: str, settings: Settings) -> None:
    """Open what the settings name; nothing is connected to yet."""
    makers: dict[str, Callable[..., Any]] = {"kafka": open_log, "s3": open_blobs, "postgresql": open_views}
    await makers[service](settings).close()


@pytest.mark.parametrize(("service", "values"), PLAIN)
async def test_another_machine_is_not_asked_without_tls_unless_that_is_meant(
    service: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=f"{service} .* ARTIFACT_STORE_PLAINTEXT={service}"):
        await opened(service, Settings(**values))
    await opened(service, Settings(**values, plaintext=service))


@pytest.mark.parametrize(("service", "values"), PRIVATE)
async def test_tls_and_this_machine_need_no_setting(service: str, values: dict[str, Any]) -> None:
    await opened(service, Settings(**values))


@pytest.mark.parametrize(("host", "checked"), [("db.example", True), ("127.0.0.1", False)])
async def test_the_database_of_another_machine_is_asked_by_tls_that_does_not_fall_back(
    host: str, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def connect(*_: object, **options: Any) -> None:
        asked.append(options.get("ssl"))
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncpg, "connect", connect)
    views = Views(f"postgresql+asyncpg://u@{host}/x")
    try:
        with pytest.raises(UnavailableError):
            await views.check()
    finally:
        await views.close()
    assert asked != []
    for context in asked:
        if checked:
            assert isinstance(context, ssl.SSLContext)
            assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        else:
            assert context is None
