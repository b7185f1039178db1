"""Confluent's framing of record values, and the schema registry whose ids are in it.

Everywhere else in the project an event's bytes are in single-object encoding (`schemas.codec`). A topic that was
created with a schema registry carries the same Avro after another header: 00 and the registry's four-byte id of the
schema. The header is exchanged only where records are sent and received.

The registry speaks Confluent's REST interface, which Karapace and Apicurio also offer. A process asks it when it
starts, and does not need it afterwards.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from artifact_store.errors import ConfigurationError, CorruptError, UnavailableError
from schemas.codec import EVENT_TYPES, HEAD_BYTES, SINGLE_OBJECT, framing, schema_text

COMPATIBILITY = "FULL_TRANSITIVE"
"""What the registry checks before it takes another schema under one of our subjects."""

_HEAD = 5
_MAGIC = b"\0"

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_ANSWER_SECONDS = 10.0
_MAX_ANSWER_BYTES = 1 << 20


class ConfluentFraming:
    """Exchanges the headers of values. `received` is the inverse of `sent`, and no two values become the same."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        """`ids`: the registry's id of each event type's schema."""
        self._sent = {framing(event_type): _MAGIC + id_.to_bytes(4) for event_type, id_ in ids.items()}
        self._received = {head: mark for mark, head in self._sent.items()}

    def sent(self, value: bytes) -> bytes:
        """The value as the topic holds it, so that `received` returns the original.

        Raises CorruptError for a value of another log that is not an event there but would be one here, or vice versa.
        """
        head = self._sent.get(value[:HEAD_BYTES])
        if head is not None:
            return head + value[HEAD_BYTES:]
        found = value[len(_MAGIC) :] if value.startswith(_MAGIC + SINGLE_OBJECT) else value
        if self.received(found) != value:
            raise CorruptError("a value is ambiguous in Confluent's framing")
        return found

    def received(self, value: bytes) -> bytes:
        """The value in single-object encoding. A value with another framing or an unknown id cannot be decoded."""
        mark = self._received.get(value[:_HEAD])
        if mark is not None:
            return mark + value[_HEAD:]
        # If a value in the other framing were passed on, readers would accept it, and the topic would hold both.
        return _MAGIC + value if value.startswith(SINGLE_OBJECT) else value


class SchemaRegistry:
    """The schemas of one topic in a registry, each under its own subject. Every method blocks.

    A subject is the topic, `-` and the full name of the record: Confluent's TopicRecordNameStrategy. A topic with
    several record types needs it, and Connect's converter looks for it.

    All raise UnavailableError if the registry gives no answer, and ConfigurationError if it refuses.
    """

    def __init__(self, url: str, topic: str) -> None:
        """`url` may contain a user and a password. Raises ConfigurationError for an invalid URL."""
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts, self._host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise ConfigurationError(
                "ARTIFACT_STORE_SCHEMA_REGISTRY_URL must be http://host:port or https://host:port, with the path that "
                "the registry's /subjects lies below"
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": _CONTENT_TYPE, "Accept": _CONTENT_TYPE}
        if parts.username is not None:
            who = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(who.encode()).decode()}"
        self._topic = topic
        self._ids: dict[str, int] | None = None

    def subject(self, event_type: str) -> str:
        """The subject of this event type's schema."""
        schema = json.loads(schema_text(event_type))
        return f"{self._topic}-{schema['namespace']}.{schema['name']}"

    def register(self) -> None:
        """Register the schemas that are missing, and have the registry check compatibility. Safe to repeat."""
        for event_type in EVENT_TYPES:
            subject = self.subject(event_type)
            if self._id(event_type) is None:
                self._ask("POST", f"/subjects/{_quoted(subject)}/versions", _document(event_type))
            if self._compatibility(subject) != COMPATIBILITY:
                self._ask("PUT", f"/config/{_quoted(subject)}", {"compatibility": COMPATIBILITY})

    def ids(self) -> dict[str, int]:
        """The id of each event type's schema, asked once. Raises ConfigurationError if one is not registered."""
        if self._ids is not None:
            return self._ids
        found = {event_type: self._id(event_type) for event_type in EVENT_TYPES}
        missing = [self.subject(event_type) for event_type, id_ in found.items() if id_ is None]
        if missing:
            raise ConfigurationError(
                f"the schema registry lacks the schemas of {', '.join(missing)}: run `artifact-store migrate`, with "
                "ARTIFACT_STORE_SCHEMA_REGISTRY_URL as it was when the topic was created"
            )
        self._ids = {event_type: id_ for event_type, id_ in found.items() if id_ is not None}
        return self._ids

    def trouble(self) -> str | None:
        """How the subjects differ from the state that `register` leaves, and how to fix it. Raises as `ids`."""
        self.ids()
        loose = {s: level for t in EVENT_TYPES if (level := self._compatibility(s := self.subject(t))) != COMPATIBILITY}
        if not loose:
            return None
        shown = ", ".join(f"{subject} ({level or 'the default'})" for subject, level in loose.items())
        return (
            f"the schema registry does not check for {COMPATIBILITY} under {shown}, so that others can register what "
            "consumers cannot read: run `artifact-store migrate`"
        )

    def _id(self, event_type: str) -> int | None:
        found = self._ask("POST", f"/subjects/{_quoted(self.subject(event_type))}", _document(event_type), missing=True)
        if found is None:
            return None
        id_ = found.get("id")
        if not isinstance(id_, int) or not 0 <= id_ < 1 << 32:
            raise ConfigurationError("the schema registry gives a schema no id that fits Confluent's framing")
        return id_

    def _compatibility(self, subject: str) -> object:
        """The level that is set for the subject itself; None if it follows the registry's default."""
        found = self._ask("GET", f"/config/{_quoted(subject)}", missing=True)
        return None if found is None else found.get("compatibilityLevel")

    def _ask(
        self, method: str, target: str, document: Mapping[str, str] | None = None, *, missing: bool = False
    ) -> dict[str, Any] | None:
        """The answer; None for a 404 if `missing` allows it. Follows no redirects."""
        body = None if document is None else json.dumps(document)
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_SECONDS)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=_ANSWER_SECONDS, context=self._tls)
        try:
            connection.request(method, self._path + target, body, self._headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"the schema registry at {self._host} gives no answer ({type(error).__name__}); is it running, and is "
                "ARTIFACT_STORE_SCHEMA_REGISTRY_URL right?"
            ) from error
        finally:
            connection.close()
        if status == http.HTTPStatus.NOT_FOUND and missing:
            return None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if status == http.HTTPStatus.OK and isinstance(found, dict):
            return found
        said = found.get("message") if isinstance(found, dict) else None
        told = f"the schema registry answers {method} {target} with {status}" + (f": {said}" if said else "")
        if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR or status == http.HTTPStatus.TOO_MANY_REQUESTS:
            raise UnavailableError(told)
        raise ConfigurationError(f"{told}. Mend ARTIFACT_STORE_SCHEMA_REGISTRY_URL, its credentials or the subject")


def _quoted(subject: str) -> str:
    return quote(subject, safe="")


def _document(event_type: str) -> dict[str, str]:
    return {"schema": json.dumps(json.loads(schema_text(event_type)), separators=(",", ":"))}
