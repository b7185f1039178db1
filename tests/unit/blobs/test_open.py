"""A blobs URL names a store, or is refused with the accepted forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifact_store.errors import ConfigurationError
from services.blobs.open import open_blobs
from services.config import Settings

KEYS = {"s3_access_key": "user", "s3_secret_key": "a-secret-key"}


@pytest.mark.parametrize("form", ["file:{}/b", "file://{}/b", "file://localhost{}/b", "file:{}/b%20c"])
async def test_a_folder_is_made_where_the_url_says(form: str, tmp_path: Path) -> None:
    store = open_blobs(Settings(blobs_url=form.format(tmp_path)))
    assert store.backend_id == "local"
    await store.migrate()
    await store.check()
    await store.close()
    assert (tmp_path / ("b c" if "%20" in form else "b")).is_dir()


async def test_a_relative_folder_is_below_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_blobs(Settings(blobs_url="file:./var/blobs"))
    await store.migrate()
    await store.close()
    assert (tmp_path / "var/blobs").is_dir()


@pytest.mark.parametrize(
    "url",
    [
        "s3://store.example:9000/bucket",
        "s3+http://127.0.0.1:9000/bucket/",
        "s3://store.example/b.u-cket",
        "s3://[::1]:9000/bucket",
    ],
)
async def test_a_bucket_is_named_by_host_and_path(url: str) -> None:
    store = open_blobs(Settings(blobs_url=url, **KEYS))
    assert store.backend_id == "s3"
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "var/blobs",
        "file:",
        "file://elsewhere/blobs",
        "http://store.example/bucket",
        "s3://store.example",
        "s3:///bucket",
        "s3://store.example:port/bucket",
        "s3://store.example/bucket/folder",
        "s3://store.example/UPPER",
        "s3://store.example/bucket?versionId=1",
        "s3://user:a-secret-key@store.example/bucket",
    ],
)
def test_other_urls_are_refused_with_the_accepted_forms_and_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"file:FOLDER, s3://host:port/BUCKET") as refused:
        open_blobs(Settings(blobs_url=url, **KEYS))
    assert "a-secret-key" not in str(refused.value)


@pytest.mark.parametrize("missing", ["s3_access_key", "s3_secret_key", "s3_region"])
def test_a_bucket_needs_credentials_and_a_region(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=missing.upper()):
        open_blobs(Settings(blobs_url="s3://store.example/bucket", **{**KEYS, missing: ""}))
