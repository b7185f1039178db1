"""Subscriptions over HTTP, by which events are sent to a URL."""

from __future__ import annotations

from uuid import UUID, uuid4

from artifact_store.client.transport import Answer, Transport, read_answer
from artifact_store.documents import http
from artifact_store.documents.subscription_shapes import (
    DeliveryPageAnswer,
    DeliveryShape,
    Filters,
    OrderedAnswer,
    SecretAnswer,
    SubscribedAnswer,
    SubscriptionAnswer,
    SubscriptionDetailAnswer,
    SubscriptionPageAnswer,
)
from artifact_store.models import DEFAULT_PAGE, EventFilter, Page

_PATH = "/v1/subscriptions"


class SubscriptionsClient:
    """The subscriptions of one gateway; see `Client.subscriptions`.

    Calls raise InvalidRequestError, ForbiddenError, NotFoundError, and UnavailableError after the policy's time.
    Calls that must not happen twice (`rotate`, `test`, `redeliver`) are not retried.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(
        self,
        url: str,
        where: EventFilter | None = None,
        *,
        since: str = "now",
    ) -> SubscribedAnswer:
        """Subscribe `url` to matching events after `since`: a position, an RFC 3339 time, or `now`.

        Keep the answer's `secret`: it is shown only once, and proves the sender to the receiver.
        """
        filters = Filters.of(where or EventFilter())
        return read_answer(
            SubscribedAnswer,
            await self._transport.call(
                "POST",
                _PATH,
                headers={http.IDEMPOTENCY_KEY: str(uuid4())},
                json={"url": url, "since": since, "filters": filters.model_dump()},
            ),
        )

    async def list(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[SubscriptionAnswer]:
        """A page of your subscriptions; operators see everyone's."""
        query = {"limit": limit, "cursor": cursor}
        found = read_answer(SubscriptionPageAnswer, await self._transport.call("GET", _PATH, query=query))
        return Page(tuple(found.items), found.next)

    async def get(self, subscription_id: UUID) -> SubscriptionDetailAnswer:
        """The subscription, with the packages that it holds back."""
        return read_answer(SubscriptionDetailAnswer, await self._transport.call("GET", _of(subscription_id)))

    async def change(
        self,
        subscription_id: UUID,
        *,
        paused: bool | None = None,
        url: str | None = None,
        where: EventFilter | None = None,
    ) -> SubscriptionDetailAnswer:
        """Change the given values. `paused=False` resumes, and retries at once what waits for its next attempt."""
        wanted = {"paused": paused, "url": url, "filters": None if where is None else Filters.of(where).model_dump()}
        changes = {name: value for name, value in wanted.items() if value is not None}
        return read_answer(
            SubscriptionDetailAnswer, await self._transport.call("PATCH", _of(subscription_id), json=changes)
        )

    async def delete(self, subscription_id: UUID) -> None:
        """Delete it with its deliveries. Raises NotFoundError."""
        await self._transport.call("DELETE", _of(subscription_id))

    async def rotate(self, subscription_id: UUID) -> SecretAnswer:
        """Make a new secret. For 24 hours, messages are signed with the previous one as well."""
        return read_answer(SecretAnswer, await self._post(subscription_id, "rotate", {}))

    async def test(self, subscription_id: UUID) -> OrderedAnswer:
        """Ask for a test message. `deliveries` shows the receiver's answer under the `event_id` that this returns."""
        return read_answer(OrderedAnswer, await self._post(subscription_id, "test", {}))

    async def redeliver(
        self, subscription_id: UUID, *, event_id: UUID | None = None, since: str | None = None
    ) -> OrderedAnswer:
        """Ask for one event again, or for everything after a position or an RFC 3339 time."""
        wanted = {"event_id": None if event_id is None else str(event_id), "since": since}
        asked = {name: value for name, value in wanted.items() if value is not None}
        return read_answer(OrderedAnswer, await self._post(subscription_id, "redeliver", asked))

    async def deliveries(
        self, subscription_id: UUID, *, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[DeliveryShape]:
        """A page of attempts and the receiver's answers, the newest first."""
        query = {"limit": limit, "cursor": cursor}
        answer = await self._transport.call("GET", f"{_of(subscription_id)}/deliveries", query=query)
        found = read_answer(DeliveryPageAnswer, answer)
        return Page(tuple(found.items), found.next)

    async def _post(self, subscription_id: UUID, what: str, body: dict[str, str]) -> Answer:
        return await self._transport.attempt("POST", f"{_of(subscription_id)}/{what}", json=body)


def _of(subscription_id: UUID) -> str:
    return f"{_PATH}/{subscription_id}"
