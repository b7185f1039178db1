"""Adding a version of an event: one command says what is missing and what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.catalogue import catalogue
from schemas.codec import UPCASTERS
from tests.schema_versions import GOLDEN, ROOT, main, problems, released

NEW = "v3.file.ingested"


def found(schemas: dict[str, str], **added: Any) -> list[str]:
    """What is wrong with these schemas beyond what every unfinished version lacks."""
    upcasters = {**UPCASTERS, NEW: added}
    about = [problem.removeprefix(f"{NEW}: ") for problem in problems(schemas, GOLDEN, catalogue(), upcasters)]
    return [problem for problem in about if not problem.startswith("no decoder")]


def version_3(change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """The schemas, and a third version of `file.ingested`: the second with this change."""
    schema = json.loads(released()["v2.file.ingested"])
    schema["namespace"] = "artifact_store.events.v3"
    change(schema)
    return {**released(), NEW: json.dumps(schema)}


def payload(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of its payload."""
    fields: list[dict[str, Any]] = schema["fields"][-1]["type"]["fields"]
    return fields


def test_all_versions_can_be_read_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "8 versions" in capsys.readouterr().out


def test_a_version_may_add_a_field_that_has_a_value_for_earlier_events() -> None:
    schemas = version_3(lambda schema: payload(schema).append({"name": "origin", "type": "string"}))
    assert found(schemas, **{"payload.origin": ""}) == []
    assert found(schemas) == [
        f"the field payload.origin has no value for earlier events: enter one in `UPCASTERS` of schemas/codec.py "
        f"(compared with {older})"
        for older in ("v1.file.ingested", "v2.file.ingested")
    ]


def drop_media_type(schema: dict[str, Any]) -> None:
    del payload(schema)[2]


def widen(schema: dict[str, Any]) -> None:
    schema["fields"][8]["type"] = "long"


def rename_record(schema: dict[str, Any]) -> None:
    payload(schema)[-1]["type"]["name"] = "Receipt"


def optional(schema: dict[str, Any]) -> None:
    payload(schema)[1]["type"] = ["null", "string"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (drop_media_type, "it lacks the field payload.media_type"),
        (widen, "command_index has another type"),
        (rename_record, "payload.receipt has another name"),
        (optional, "payload.relative_path has another type"),
    ],
)
def test_whatever_else_a_version_changes_is_refused(change: Callable[[dict[str, Any]], None], wrong: str) -> None:
    problems_found = found(version_3(change))
    assert f"{wrong} (compared with v1.file.ingested)" in problems_found
    assert f"{wrong} (compared with v2.file.ingested)" in problems_found


def test_a_version_is_compared_with_all_before_it() -> None:
    """A field that version 2 added and version 3 lacks is missed by a comparison of version 3 with version 1 alone."""
    schemas = version_3(
        lambda schema: schema["fields"].remove(next(f for f in schema["fields"] if f["name"] == "principal"))
    )
    assert found(schemas) == ["it lacks the field principal (compared with v2.file.ingested)"]


def test_gaps_and_foreign_namespaces_are_refused() -> None:
    schemas = released()
    schemas["v3.package.created"] = schemas["v2.package.created"]
    del schemas["v2.package.created"]
    told = list(problems(schemas, GOLDEN, catalogue()))
    assert "package.created: its versions are [1, 3]; they count from 1 without gaps" in told
    assert "v3.package.created: its namespace is artifact_store.events.v2, not artifact_store.events.v3" in told
    assert "v2.package.created: it has no schema; write schemas/v2.package.created.avsc" in told


def test_a_changed_schema_and_a_stale_catalogue_are_refused() -> None:
    schemas = released()
    schemas["v1.log.skipped"] += "\n"
    first, second = problems(schemas, GOLDEN, "yesterday's")
    assert first.startswith("v1.log.skipped: a released schema is never changed")
    assert "make docs" in second


def test_a_version_without_golden_files_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "v1.log.skipped.avsc").unlink()
    (tmp_path / "08-v1.log.skipped.json").unlink()
    told = [problem.partition(tmp_path.name)[2] for problem in problems(released(), tmp_path, catalogue())]
    assert told == [
        " has no copy of its schema; put it there when the version is finished",
        " has no value of it with its facts; write NN-v1.log.skipped.avro and .json",
    ]


def test_the_command_fails_for_a_schema_that_was_only_copied(tmp_path: Path) -> None:
    """As somebody begins: a file beside the others, and `make schemas` says what comes next."""
    shutil.copytree(ROOT / "schemas", tmp_path / "schemas", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(tmp_path / "schemas" / "v2.file.ingested.avsc", tmp_path / "schemas" / f"{NEW}.avsc")
    command = [sys.executable, "-m", "tests.schema_versions"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # behind the folder that it runs in
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{NEW}: no decoder reads it; enter the type in `_DECODERS` of schemas/codec.py",
        f"{NEW}: its namespace is artifact_store.events.v2, not artifact_store.events.v3",
    ]
