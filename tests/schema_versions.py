"""Checks that each version of an event can be read by every other: `python -m tests.schema_versions`.

An event of an earlier version is read as one of the latest by adding the fields of later versions (`codec.UPCASTERS`).
So a version may only add fields: fields that two versions of an event share are equal in both, and every added field
has a value for earlier events. Schema registries call this FULL_TRANSITIVE. They cannot check it across versions here,
because each version is a record with a different namespace.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import schemas
from schemas.catalogue import catalogue
from schemas.codec import EVENT_TYPES, UPCASTERS, fingerprint_of, kind_and_version, schema_fingerprint

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "unit" / "schemas" / "golden"

_ABOUT_TEXT = ("doc", "namespace", "default", "aliases")


def released() -> dict[str, str]:
    """The text of every schema file, by event type."""
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(schemas.__file__).parent.glob("*.avsc"))
    }


def problems(
    texts: Mapping[str, str],
    golden: Path,
    catalogue_text: str,
    upcasters: Mapping[str, Mapping[str, Any]] = UPCASTERS,
) -> Iterator[str]:
    """What is wrong, each with the file and what mends it.

    `texts` is as `released` gives it. The folder `golden` holds a copy of each schema as it was released, and values
    that were written with it (`*.avro`). `catalogue_text` is docs/events.md.
    """
    for event_type in sorted({*texts, *EVENT_TYPES}):
        if event_type not in EVENT_TYPES:
            yield f"{event_type}: no decoder reads it; enter the type in `_DECODERS` of schemas/codec.py"
        elif event_type not in texts:
            yield f"{event_type}: it has no schema; write schemas/{event_type}.avsc"
        else:
            yield from _golden_problems(event_type, texts[event_type], golden)
    parsed = {event_type: json.loads(text) for event_type, text in texts.items()}
    for event_type, schema in parsed.items():
        yield from _name_problems(event_type, schema)
    kinds = sorted({kind_and_version(event_type)[0] for event_type in parsed})
    for kind in kinds:
        versions = sorted(version for k, version in map(kind_and_version, parsed) if k == kind)
        if versions != list(range(1, len(versions) + 1)):
            yield f"{kind}: its versions are {versions}; they count from 1 without gaps"
        for older, newer in combinations([f"v{version}.{kind}" for version in versions], 2):
            added = {
                field
                for event_type, fields in upcasters.items()
                if (found := kind_and_version(event_type))[0] == kind
                and kind_and_version(older)[1] < found[1] <= kind_and_version(newer)[1]
                for field in fields
            }
            for what in _incompatible(parsed[older], parsed[newer], added):
                yield f"{newer}: {what} (compared with {older})"
    if catalogue_text != catalogue():
        yield "docs/events.md: it is not what the schemas say; run `make docs`"


def _golden_problems(event_type: str, text: str, golden: Path) -> Iterator[str]:
    copy = golden / f"{event_type}.avsc"
    if not copy.exists():
        yield f"{event_type}: {golden} has no copy of its schema; put it there when the version is finished"
    elif copy.read_text(encoding="utf-8") != text:
        yield f"{event_type}: a released schema is never changed; restore it from {copy}, and make a new version"
    mark = schema_fingerprint(event_type)
    values = [path for path in golden.glob(f"*-{event_type}.avro") if fingerprint_of(path.read_bytes()) == mark]
    if not any(path.with_suffix(".json").exists() for path in values):
        yield f"{event_type}: {golden} has no value of it with its facts; write NN-{event_type}.avro and .json"


def _name_problems(event_type: str, schema: Mapping[str, Any]) -> Iterator[str]:
    _, version = kind_and_version(event_type)
    wanted = f"artifact_store.events.v{version}"
    if schema.get("namespace") != wanted:
        yield f"{event_type}: its namespace is {schema.get('namespace')}, not {wanted}"
    if not _is_record(schema):
        yield f"{event_type}: it is not a record"


def _incompatible(older: Any, newer: Any, added: set[str], path: str = "") -> Iterator[str]:
    """What keeps events of one version from being read as events of the other; `added` is what upcasters give."""
    if not (_is_record(older) and _is_record(newer)):
        if _essence(older) != _essence(newer):
            yield f"{path} has another type"
        return
    if older["name"] != newer["name"]:
        yield f"{path or 'the record'} has another name"
    before, after = ({field["name"]: field for field in record["fields"]} for record in (older, newer))
    for name, field in before.items():
        where = f"{path}.{name}".lstrip(".")
        if name not in after:
            yield f"it lacks the field {where}"
        else:
            yield from _incompatible(field["type"], after[name]["type"], added, where)
    for name in after:
        where = f"{path}.{name}".lstrip(".")
        if name not in before and where not in added:
            yield f"the field {where} has no value for earlier events: enter one in `UPCASTERS` of schemas/codec.py"


def _is_record(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "record"


def _essence(schema: Any) -> Any:
    """The schema without what says nothing about values."""
    match schema:
        case dict():
            return {name: _essence(value) for name, value in schema.items() if name not in _ABOUT_TEXT}
        case list():
            return [_essence(value) for value in schema]
    return schema


def main() -> int:
    """Print what is wrong; the exit code."""
    found = list(problems(released(), GOLDEN, (ROOT / "docs" / "events.md").read_text(encoding="utf-8")))
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    if not found:
        sys.stdout.write(f"{len(EVENT_TYPES)} versions of events can be read beside each other\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
