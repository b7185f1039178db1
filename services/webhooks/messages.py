"""Messages to receivers: an event as a CloudEvent in JSON, with signatures by the Standard Webhooks specification.

CloudEvents 1.0, JSON format, structured mode. `data` is the event as `GET /v1/events?manifests=false` gives it. The
signed content is `ID.TIMESTAMP.BODY`; the signature is `v1,` and the HMAC-SHA256 in base64. A message that is signed
with several secrets has several signatures, separated by spaces.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from uuid import UUID

from artifact_store.documents import times
from artifact_store.documents.event_lines import event_head, line_of
from artifact_store.events import RecordedEvent
from schemas.digests import event_digest
from schemas.headers import source
from services.views.queries import Origin

CONTENT_TYPE = "application/cloudevents+json"
SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets begin with, by the specification
_SECRET_BYTES = 32

TEST_TYPE = "v1.subscription.test"


def new_secret() -> str:
    """A secret for signatures, in the form that receivers' libraries take."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signed_headers(message_id: str, timestamp: int, body: bytes, signing: Iterable[str]) -> dict[str, str]:
    """The headers that prove who sent the body, and when (s since 1970), with a signature for each secret."""
    content = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    signatures = []
    for secret in signing:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
        signatures.append("v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode())
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def message_id(event: RecordedEvent) -> str:
    """The id of the event's message: the event's digest, which Kafka consumers find in `ce_id`."""
    return event_digest(event).hex()


def event_body(event: RecordedEvent, name: str, origin: Origin) -> bytes:
    """The event as a CloudEvent. `name` is its message id."""
    attributes = {
        "specversion": "1.0",
        "id": name,
        "source": source(event.position.log),
        "type": event.event_type,
        "subject": str(event.package_id),
        "time": times.to_text(event.created_at),
        "datacontenttype": "application/json",
        "actor": event.actor,
        "producer": origin.producer,
        "retentionclass": origin.retention_class,
        "sequence": str(event.sequence),
    }
    head = json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode()
    return b'%b,"data":%b}' % (head[:-1], line_of(event_head(event, manifest=False), str(event.position)))


def test_body(test_id: UUID, subscription_id: UUID, log: UUID, now: int) -> bytes:
    """A CloudEvent without an event, for owners to try a receiver. `now` is in µs since 1970."""
    return json.dumps(
        {
            "specversion": "1.0",
            "id": str(test_id),
            "source": source(log),
            "type": TEST_TYPE,
            "subject": str(subscription_id),
            "time": times.to_text(now),
            "datacontenttype": "application/json",
            "data": {"subscription_id": str(subscription_id)},
        },
        separators=(",", ":"),
    ).encode()
