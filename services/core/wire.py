"""Commands, acknowledgements and errors as CBOR, as the gateways of one deployment send them to each other.

The format is internal but versioned: during an upgrade, gateways of two adjacent releases forward commands to each
other. A message is the list of the values of its class's fields, in order. A field that was added later has a default,
and messages of earlier versions leave it out. A reader refuses a version that it does not know, and never guesses.
Identifiers are CBOR tag 37 (binary UUID).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import UUID

import cbor2

from artifact_store.errors import (
    ArtifactStoreError,
    InvalidRequestError,
    PushBackError,
    RangeNotSatisfiableError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement, IngestedFile
from artifact_store.position import Position
from artifact_store.rules import MAX_NUMBER, MAX_TEXT_CHARACTERS, PathPair
from schemas.runs import StoredFile
from services.core.access import EVERYTHING, Grant, Grants, Packages, Right
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestCheck, IngestFiles

VERSION = 5
"""The newest version that this release reads and writes. Raise it when a field is added, and enter that in `_ADDED`."""

OLDEST = 1
"""The oldest version that this release reads and writes, which is the newest one that the previous release knows.

Stored messages have this version, and so do messages to gateways whose newest version is not known yet.
"""

MAX_DETAIL_CHARACTERS = 4_096
MAX_RETRY_SECONDS = 3_600.0
"""The most that is read of an error's text (characters), and the longest wait that it may ask for (s)."""

LAST_TIME = 253_402_300_799_999_999
"""The last µs of the year 9999, after which times cannot be written."""

_ADDED: dict[tuple[str, str], int] = {
    ("Acknowledgement", "unportable_count"): 2,
    ("Acknowledgement", "unportable_paths"): 2,
    **{(command, "grants"): 3 for command in ("CreatePackage", "IngestFiles", "FinalizePackage")},
    **{(command, "principal"): 4 for command in ("CreatePackage", "IngestFiles", "FinalizePackage")},
    ("Acknowledgement", "position"): 5,
}
"""The version that added a field, by class name and field name. All other fields are in version 1."""

_ADDED_PROBLEMS = {"path-conflict": 2, "answer-expired": 2, "package-abandoned": 2, "forbidden": 3}
"""The version that added an error, by its problem type."""

_COMMANDS: dict[str, type[Command]] = {
    "create-package": CreatePackage,
    "ingest-files": IngestFiles,
    "finalize-package": FinalizePackage,
}
_KINDS = {cls: kind for kind, cls in _COMMANDS.items()}
_TYPES: dict[str, tuple[type, ...]] = {
    "UUID": (UUID,),
    "str": (str,),
    "int": (int,),
    "bytes": (bytes,),
    "bytes | None": (bytes, type(None)),
    "str | None": (str, type(None)),
}
_PARTS: dict[str, type] = {
    "tuple[StoredFile, ...]": StoredFile,
    "tuple[IngestedFile, ...]": IngestedFile,
    "tuple[PathPair, ...]": PathPair,
}
_GRANTS = "Grants"
_POSITION = "Position | None"

SAYS_GRANTS = 3
"""The first version whose messages hold the sender's grants."""

SAYS_PRINCIPAL = 4
"""The first version whose messages name a principal beside the actor."""

_Shape = TypeVar("_Shape")


def encode_command(command: Command, version: int = VERSION) -> bytes:
    """The command as CBOR. A version before SAYS_GRANTS leaves out the grants, one before SAYS_PRINCIPAL the principal.

    So never send a command with a principal in an earlier version: the event would not say who sent it.
    """
    return _dumps([_KINDS[type(command)], _values(command, version)])


def decode_command(data: bytes, version: int = VERSION) -> Command:
    """Read a command. Raises InvalidRequestError if it is not a command of this version, or the version is unknown."""
    kind, values = _pair(_loads(data))
    shape = _COMMANDS.get(kind) if isinstance(kind, str) else None
    if shape is None:
        raise InvalidRequestError("the forwarded command is of an unknown kind")
    return _build(shape, values, version)


def encode_check(asked: IngestCheck, version: int = VERSION) -> bytes:
    """The question as CBOR, without the fields that the version does not know: see `encode_command`."""
    values = [_plain(asked.package_id), list(asked.relative_paths), _plain(asked.command_id)]
    if version >= SAYS_GRANTS:
        values.append(_plain_grants(asked.grants))
    if version >= SAYS_PRINCIPAL:
        values.append(asked.principal)
    return _dumps(values)


def decode_check(data: bytes) -> IngestCheck:
    """Read the question. Raises InvalidRequestError if the message holds something else.

    A message without grants comes from a gateway of a release that lets everybody do everything.
    """
    match _loads(data):
        case [UUID() as package_id, [*paths], (UUID() | None) as command_id, *added] if all(
            isinstance(p, str) for p in paths
        ):
            match added:
                case []:
                    return IngestCheck(package_id, paths, command_id)
                case [grants]:
                    return IngestCheck(package_id, paths, command_id, _read_grants(grants))
                case [grants, (str() | None) as principal]:
                    return IngestCheck(package_id, paths, command_id, _read_grants(grants), principal)
    raise InvalidRequestError("the forwarded question has another form")


def encode_acknowledgement(acknowledgement: Acknowledgement, version: int = VERSION) -> bytes:
    """The acknowledgement as CBOR."""
    return _dumps(_values(acknowledgement, version))


def decode_acknowledgement(data: bytes, version: int = VERSION) -> Acknowledgement:
    """Read an acknowledgement. Raises as `decode_command`."""
    return _build(Acknowledgement, _loads(data), version)


def encode_error(error: ArtifactStoreError, version: int = VERSION) -> bytes:
    """The error's problem, text, numbers and facts as CBOR.

    An error that the version does not know is sent as its nearest base class that it knows.
    """
    known = (getattr(kind, "problem", ArtifactStoreError.problem) for kind in type(error).__mro__)
    problem = next(name for name in known if _ADDED_PROBLEMS.get(name, OLDEST) <= max(version, OLDEST))
    values = [problem, error.detail, getattr(error, "retry_after", None), getattr(error, "size", None)]
    return _dumps([*values, dict(error.facts)] if version > 1 else values)


def decode_error(data: bytes) -> ArtifactStoreError:
    """Rebuild an error from its problem type; UnavailableError if that is unknown or the bytes cannot be read.

    Numbers and facts that such an error cannot have are left out.
    """
    try:
        found = _loads(data)
    except InvalidRequestError:
        found = None
    match found:
        case [str() as problem, str() as detail, retry_after, size, *more]:
            pass
        case _:
            return UnavailableError("the owner of the partition gave an answer that cannot be read")
    shape = next((cls for cls in _error_classes() if cls.__dict__.get("problem") == problem), UnavailableError)
    detail = detail[:MAX_DETAIL_CHARACTERS]
    if shape is RangeNotSatisfiableError:
        return RangeNotSatisfiableError(detail, size if type(size) is int and 0 <= size <= MAX_NUMBER else 0)
    if shape is PushBackError:
        waits = type(retry_after) in (int, float) and 0 < retry_after <= MAX_RETRY_SECONDS
        return PushBackError(detail, float(retry_after) if waits else 1.0)
    error = shape(detail)
    facts = more[0] if more and isinstance(more[0], dict) else {}
    error.facts = {name: facts[name] for name, check in _FACTS.items() if name in facts and check(facts[name])}
    return error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARACTERS


def _is_time(value: object) -> bool:
    return type(value) is int and 0 <= value <= LAST_TIME


_FACTS: dict[str, Callable[[object], bool]] = {
    "package_id": _is_text,
    "finalized_at": _is_time,
    "manifest_digest": _is_text,
}
"""The facts that errors may have, and the check for their values."""


def _error_classes(root: type[ArtifactStoreError] = ArtifactStoreError) -> Iterator[type[ArtifactStoreError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _error_classes(cls)


def _values(value: Any, version: int) -> list[Any]:
    """The values of the fields in their order. A tuple of our own classes becomes a list of such lists."""
    found: list[Any] = []
    for name, kind in _fields(type(value), version):
        part = getattr(value, name)
        if kind == _GRANTS:
            found.append(_plain_grants(part))
        elif kind == _POSITION:
            found.append(None if part is None else str(part))
        else:
            found.append([_values(each, version) for each in part] if kind in _PARTS else _plain(part))
    return found


def _plain_grants(grants: Grants) -> list[Any]:
    """For each grant its rights, producers and subjects."""
    return [[sorted(grant.rights), list(grant.packages.producers), list(grant.packages.subjects)] for grant in grants]


def _read_grants(values: Any) -> Grants:
    """Read grants. A right that this release does not know is ignored. Raises InvalidRequestError."""
    grants: list[Grant] = []
    for value in values if isinstance(values, list) else [values]:
        match value:
            case [[*rights], [*producers], [*subjects]] if all(
                isinstance(text, str) for text in (*rights, *producers, *subjects)
            ):
                known = frozenset(right for right in Right if right in rights)
                grants.append(Grant(known, Packages(tuple(producers), tuple(subjects))))
            case _:
                raise InvalidRequestError("the forwarded rights have another form")
    return EVERYTHING if tuple(grants) == EVERYTHING else tuple(grants)


def _fields(shape: Any, version: int) -> list[tuple[str, str]]:
    """Names and types of a class's fields in this version, in order. It is a dataclass or a named tuple."""
    return [
        (name, getattr(kind, "__forward_arg__", kind))
        for name, kind in shape.__annotations__.items()
        if _ADDED.get((shape.__name__, name), OLDEST) <= version
    ]


def _plain(value: Any) -> Any:
    """Make a plain UUID of a subclass, such as database drivers return: cbor2 encodes only UUID itself."""
    return UUID(int=value.int) if isinstance(value, UUID) and type(value) is not UUID else value


def _build(shape: type[_Shape], values: Any, version: int) -> _Shape:
    if not OLDEST <= version <= VERSION:
        raise InvalidRequestError(f"version {version} of what gateways forward is not known here")
    expected = _fields(shape, version)
    if not isinstance(values, list) or len(values) != len(expected):
        raise InvalidRequestError(f"the forwarded {shape.__name__} has another form")
    built: dict[str, Any] = {}
    for (name, kind), value in zip(expected, values, strict=True):
        if kind == _GRANTS:
            built[name] = _read_grants(value)
        elif kind == _POSITION and isinstance(value, str | None):
            built[name] = None if value is None else Position.parse(value)
        elif kind in _PARTS and isinstance(value, list):
            built[name] = tuple(_build(_PARTS[kind], part, version) for part in value)
        elif isinstance(value, _TYPES.get(kind, ())) and not isinstance(value, bool):
            built[name] = value
        else:
            raise InvalidRequestError(f"the forwarded {shape.__name__} has another form at {name}")
    return shape(**built)


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise InvalidRequestError("the forwarded command has another form")
    return value[0], value[1]


def _dumps(value: Any) -> bytes:
    return cbor2.dumps(value, default=_plain_uuid)


def _plain_uuid(encoder: Any, value: Any) -> None:
    """Encode a subclass of UUID as a UUID: cbor2 encodes only that type itself."""
    if not isinstance(value, UUID):
        raise TypeError(f"{type(value).__name__} cannot be forwarded")
    encoder.encode(UUID(int=value.int))


def _loads(data: bytes) -> Any:
    try:
        return cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError, OverflowError):
        raise InvalidRequestError("what was forwarded is not CBOR") from None
