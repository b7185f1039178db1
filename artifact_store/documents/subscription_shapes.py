"""JSON shapes of subscriptions: requests of owners, answers to them, and the log of deliveries."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import Field

from artifact_store.documents.http import UUID_PATTERN
from artifact_store.documents.shapes import Answer, Request, SequenceNumber, TimeText
from artifact_store.models import EventFilter

Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=100)]

Since = Annotated[
    str,
    Field(
        max_length=4_096,
        description="A position, an RFC 3339 time, or `now`, as in `GET /v1/events`",
    ),
]


class Filters(Request):
    """Which events are wanted: those that match one value of each list that is not empty, by exact value."""

    package_id: str | None = Field(default=None, pattern=UUID_PATTERN)
    producer: Names = Field(default_factory=list)
    subject: Names = Field(default_factory=list)
    retention_class: Names = Field(default_factory=list)
    type: Names = Field(default_factory=list)

    @classmethod
    def of(cls, wanted: EventFilter) -> Self:
        """The shape of this filter."""
        return cls(
            package_id=None if wanted.package_id is None else str(wanted.package_id),
            producer=sorted(wanted.producers),
            subject=sorted(wanted.subjects),
            retention_class=sorted(wanted.retention_classes),
            type=sorted(wanted.types),
        )

    def to_filter(self) -> EventFilter:
        """The filter in this request."""
        return EventFilter(
            None if self.package_id is None else UUID(self.package_id),
            producers=frozenset(self.producer),
            subjects=frozenset(self.subject),
            retention_classes=frozenset(self.retention_class),
            types=frozenset(self.type),
        )


class SubscribeRequest(Request):
    """A subscription to make. It gets events after `since`; by default what happens from now on."""

    url: str = Field(min_length=1, max_length=2_048)
    filters: Filters = Field(default_factory=Filters)
    since: Since = "now"


class ChangeSubscriptionRequest(Request):
    """What to change; the rest stays. `paused: false` resumes, and tries at once what waits for its next attempt."""

    paused: bool | None = None
    url: str | None = Field(default=None, min_length=1, max_length=2_048)
    filters: Filters | None = None


class RedeliverRequest(Request):
    """What to deliver again: one event, or everything after a position or time. Exactly one of the two."""

    event_id: str | None = Field(default=None, pattern=UUID_PATTERN)
    since: Since | None = None


class SubscriptionAnswer(Answer):
    """A subscription. `cause` says why it is disabled, `trouble` why an active one delivers nothing now."""

    subscription_id: UUID
    owner: str
    url: str
    filters: Filters
    state: Literal["active", "paused", "disabled"]
    cause: str | None
    trouble: str | None
    created_at: TimeText
    position: str = Field(description="All events before this position are delivered, do not match, or are held back")


class HeldShape(Answer):
    """A package whose events wait, from this one on, because the receiver did not accept it."""

    package_id: UUID
    sequence: SequenceNumber | None
    attempts: int
    since: TimeText = Field(description="When the first attempt failed")
    next_at: TimeText | None = Field(description="When it is tried again; null once it is parked")
    parked: bool
    cause: str


class SubscriptionDetailAnswer(SubscriptionAnswer):
    """A subscription with the packages that it holds back, of which a hundred at most are listed."""

    held: list[HeldShape]


class SubscriptionPageAnswer(Answer):
    """A page of subscriptions."""

    items: list[SubscriptionAnswer]
    next: str | None


class SubscribedAnswer(SubscriptionAnswer):
    """A new subscription with the secret that signs its messages, which is shown only now."""

    secret: str


class SecretAnswer(Answer):
    """The new secret. Until `previous_until`, messages are signed with the previous one as well."""

    subscription_id: UUID
    secret: str
    previous_until: TimeText


class OrderedAnswer(Answer):
    """Something will be sent. The deliveries show the result; that of a test has this `event_id`."""

    subscription_id: UUID
    event_id: UUID | None = None
    position: str | None = None


class DeliveryShape(Answer):
    """One attempt. `answer` is the beginning of the receiver's body; null if the receiver is in a private network."""

    number: int
    kind: Literal["event", "repeat", "test"]
    event_id: UUID
    event_type: str
    package_id: UUID | None
    sequence: SequenceNumber | None
    attempt: int
    delivered: bool
    begun_at: TimeText
    milliseconds: int
    status: int | None
    answer: str | None
    error: str | None


class DeliveryPageAnswer(Answer):
    """A page of deliveries, the newest first."""

    items: list[DeliveryShape]
    next: str | None
