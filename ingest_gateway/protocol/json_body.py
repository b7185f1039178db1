"""Strict JSON: a body that two parsers could read differently is refused (RFC 8259, RFC 7493)."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from artifact_store.documents.problem_details import FieldFault
from artifact_store.documents.shapes import Request
from artifact_store.errors import InvalidRequestError
from ingest_gateway.protocol.http_errors import InvalidFieldsError

Shape = TypeVar("Shape", bound=Request)

MAX_FAULTS = 64
"""Up to this number, all faulty fields are named. If there are more, only the first few are."""

_FIRST_FAULTS = 5
_MOST_FAULTS_READ = 10_000  # pydantic formats all or none; more than this are only counted


def parse_json(body: bytes, shape: type[Shape]) -> Shape:
    """The body in this shape.

    Raises InvalidRequestError: not UTF-8, not JSON, a repeated key, NaN or Infinity, nested too deeply, or more than
    MAX_FAULTS faulty fields. Raises InvalidFieldsError: a field is missing, unknown or mistyped. Takes a second or two
    for a body of 16 MiB.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except InvalidRequestError:
        raise
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None
    except ValueError as error:  # also an integer of thousands of digits, which Python does not read
        detail = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else "a number"
        raise InvalidRequestError(f"the body is not valid JSON: {detail}") from None
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _faulty(error) from None


def _faulty(error: ValidationError) -> InvalidRequestError:
    count = error.error_count()
    if count <= MAX_FAULTS:
        return InvalidFieldsError(_faults(error, count))
    first = InvalidFieldsError(_faults(error, _FIRST_FAULTS)).detail if count <= _MOST_FAULTS_READ else ""
    return InvalidRequestError(
        f"{count:,} fields of the body are missing, unknown or mistyped" + (f"; the first: {first}" if first else "")
    )


def _faults(error: ValidationError, most: int) -> tuple[FieldFault, ...]:
    found = error.errors(include_input=False, include_url=False)
    return tuple(FieldFault(field=_where(fault["loc"]), message=fault["msg"]) for fault in found[:most])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequestError("the body holds an object with the same key twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body holds {name}, which is not JSON")


def _where(location: tuple[int | str, ...]) -> str:
    # Names come from outside: they may hold anything, at any length.
    name = ".".join(str(part) for part in location) or "body"
    return name[:256].encode("utf-8", "backslashreplace").decode()
