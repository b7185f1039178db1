"""The error for an S3 store with which TLS cannot be established."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestServer

from artifact_store.errors import UnavailableError
from services.blobs.s3.requests import Endpoint, StoreTroubleError
from services.blobs.s3.store import S3BlobStore

OF_NO_AUTHORITY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgGm+Jw9dFY/hlvfEZ
AmCCuO1WCF+KgoHlp/OCiJ634t2hRANCAAQRZPXnDWWon1gtx1jEn3xcDscEjkdA
wen4ww2NEmxZfAUxRxFKAaa9Mo4UGzcddITI9HLf2t7KM90wkR70Gwf7
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUSKm19PuKxZd6IgqbVDVvi35jnkwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjAxMjg0MFoYDzIxMjYxMTAy
MDEyODQwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQRZPXnDWWon1gtx1jEn3xcDscEjkdAwen4ww2NEmxZfAUxRxFKAaa9
Mo4UGzcddITI9HLf2t7KM90wkR70Gwf7o2QwYjAdBgNVHQ4EFgQUksG3CUx27Gr/
/3kfoBS7Rzw7m/AwHwYDVR0jBBgwFoAUksG3CUx27Gr//3kfoBS7Rzw7m/AwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IG3FnrANJc/70Bunf5Hays20en+j+j7aIrMfJiyEiJA5AiEAo2Ret0Ms50ZgYLuV
IiOFIoSzLuQ4sNZsi+xchsD6ElY=
-----END CERTIFICATE-----
"""
"""A key, which is nobody's secret, and the certificate that it signed for itself, for 127.0.0.1."""


async def refused_by(server: BaseTestServer) -> UnavailableError:
    at = Endpoint(f"{server.host}:{server.port}", "bucket", True, "user", "secret", "us-east-1")
    store = S3BlobStore(at)
    try:
        with pytest.raises(UnavailableError) as refused:
            await store.check()
    finally:
        await store.close()
    return refused.value


async def test_a_certificate_of_an_unknown_authority_is_named_as_such_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text(OF_NO_AUTHORITY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    server = TestServer(web.Application())
    await server.start_server(ssl=context)
    try:
        refused = await refused_by(server)
    finally:
        await server.close()
    assert "has a certificate that is not trusted" in refused.detail
    assert "SSL_CERT_FILE" in refused.detail
    assert not isinstance(refused, StoreTroubleError)


async def test_a_store_that_speaks_no_tls_is_told_apart_from_one_that_cannot_be_reached() -> None:
    async with TestServer(web.Application()) as server:
        refused = await refused_by(server)
    assert "makes no TLS connection" in refused.detail
    assert "s3+http:" in refused.detail
