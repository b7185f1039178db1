"""Messages: the specification's own library accepts their signatures, with one secret or two."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from services.webhooks.messages import new_secret, signed_headers
from services.webhooks.outbox import _seconds_of


def test_the_library_accepts_a_signature_by_any_of_the_secrets_and_no_other_body() -> None:
    old, new, body = new_secret(), new_secret(), '{"type":"täst"}'.encode()
    headers = signed_headers("message", int(time.time()), body, (new, old))
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers) == {"type": "täst"}
    for wrong_secret, wrong_body in ((new_secret(), body), (new, body + b" ")):
        with pytest.raises(WebhookVerificationError):
            Webhook(wrong_secret).verify(wrong_body, headers)


def test_retry_after_is_read_in_both_forms_and_bounded() -> None:
    now = 1_700_000_000_000_000
    in_a_minute = format_datetime(datetime.fromtimestamp(now / 1_000_000 + 60, UTC), usegmt=True)
    assert _seconds_of("120", now) == 120
    assert _seconds_of(in_a_minute, now) == 60
    assert _seconds_of("Thu, 01 Jan 1970 00:00:00 GMT", now) == 0
    assert _seconds_of("9" * 30, now) == 6 * 3600
    for nonsense in (None, "", "soon", "-1", "1.5", "²"):
        assert _seconds_of(nonsense, now) is None
