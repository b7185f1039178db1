"""Subscriptions: principals create them to get events sent to a URL, change and delete them, and read their deliveries.

Each belongs to its owner, the principal who created it. Operators see all of them, and may pause and delete them, but
they cannot redirect somebody else's events.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from aiohttp import web

from artifact_store.documents import times
from artifact_store.documents.http import UUID_PATTERN, parse_id
from artifact_store.documents.shapes import NothingRequest
from artifact_store.documents.subscription_shapes import (
    ChangeSubscriptionRequest,
    DeliveryPageAnswer,
    DeliveryShape,
    Filters,
    HeldShape,
    OrderedAnswer,
    RedeliverRequest,
    SecretAnswer,
    SubscribedAnswer,
    SubscribeRequest,
    SubscriptionAnswer,
    SubscriptionDetailAnswer,
    SubscriptionPageAnswer,
)
from artifact_store.errors import (
    CommandReusedError,
    ConflictError,
    InvalidPositionError,
    InvalidRequestError,
    LogIdentityError,
    NotFoundError,
    PushBackError,
    UnavailableError,
)
from artifact_store.models import DEFAULT_PAGE, EventFilter
from artifact_store.position import Position
from artifact_store.registry import NOW
from artifact_store.rules import check_text, parse_number
from ingest_gateway.gateway import Subscribing
from ingest_gateway.protocol.declaration import Body, Route, Success
from ingest_gateway.protocol.parameters import (
    CURSOR,
    DIGESTS,
    IDEMPOTENCY_KEY,
    LIMIT,
    OF_TYPE,
    SINCE,
    Parameter,
)
from ingest_gateway.protocol.request import (
    JSON,
    LOCATION,
    TEXT,
    Call,
    json_answer,
)
from ingest_gateway.routes.packages import READING, link_to_next
from services.core.access import Right
from services.webhooks.subscriptions import Delivery, HeldPackage, State, Subscription

_MOST_HELD = 100

SUBSCRIPTION_ID = Parameter(
    "subscription_id",
    "path",
    lambda text: parse_id("subscription_id", text),
    "The subscription",
    {"type": "string", "format": "uuid", "pattern": UUID_PATTERN},
    "6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11",
)


async def subscribe(call: Call) -> web.StreamResponse:
    """POST /v1/subscriptions."""
    call.require(Right.READ)
    wanted = await call.json(SubscribeRequest)
    here = _subscribing(call)
    here.targets.check(wanted.url)
    filters, position = _filter(wanted.filters), await _position(call, wanted.since)
    owner, basis, key = call.principal.actor, call.principal.basis, call.header(IDEMPOTENCY_KEY)
    made = await here.store.create(owner, basis, wanted.url, filters, position, key)
    secret = made.secrets[0].secret
    return json_answer(
        SubscribedAnswer(**_shown(made), secret=secret),
        status=201,
        headers={"Location": f"/v1/subscriptions/{made.subscription_id}"},
    )


async def list_subscriptions(call: Call) -> web.StreamResponse:
    """GET /v1/subscriptions."""
    limit, cursor = call.query(LIMIT) or DEFAULT_PAGE, call.query(CURSOR)
    after = None if cursor is None else parse_id("cursor", cursor)
    found = await _subscribing(call).store.page(_sees(call), limit + 1, after)
    more = len(found) > limit
    items = [SubscriptionAnswer(**_shown(one)) for one in found[:limit]]
    following = str(items[-1].subscription_id) if more else None
    return json_answer(SubscriptionPageAnswer(items=items, next=following), headers=link_to_next(call, following))


async def show_subscription(call: Call) -> web.StreamResponse:
    """GET /v1/subscriptions/{subscription_id}."""
    subscription_id = call.path(SUBSCRIPTION_ID)
    return json_answer(await _detail(call, await _subscribing(call).store.find(subscription_id, _sees(call))))


async def change_subscription(call: Call) -> web.StreamResponse:
    """PATCH /v1/subscriptions/{subscription_id}."""
    subscription_id, here = call.path(SUBSCRIPTION_ID), _subscribing(call)
    wanted = await call.json(ChangeSubscriptionRequest)
    if wanted.url is not None:
        here.targets.check(wanted.url)
    only_pauses = wanted.url is None and wanted.filters is None
    found = await here.store.find(subscription_id, _sees(call) if only_pauses else call.principal.actor)
    state = None if wanted.paused is None else State.PAUSED if wanted.paused else State.ACTIVE
    changed = await here.store.change(
        subscription_id,
        found.owner,
        state=state,
        url=wanted.url,
        wanted=None if wanted.filters is None else _filter(wanted.filters),
        basis=call.principal.basis if found.owner == call.principal.actor else None,
    )
    return json_answer(await _detail(call, changed))


async def delete_subscription(call: Call) -> web.StreamResponse:
    """DELETE /v1/subscriptions/{subscription_id}."""
    await _subscribing(call).store.remove(call.path(SUBSCRIPTION_ID), _sees(call))
    return web.Response(status=204)


async def rotate_secret(call: Call) -> web.StreamResponse:
    """POST /v1/subscriptions/{subscription_id}/rotate."""
    subscription_id = call.path(SUBSCRIPTION_ID)
    await call.json(NothingRequest)
    found = await _subscribing(call).store.rotate(subscription_id, call.principal.actor)
    new, previous, *_ = found.secrets
    until = times.to_text(previous.until or 0)
    return json_answer(SecretAnswer(subscription_id=subscription_id, secret=new.secret, previous_until=until))


async def test_subscription(call: Call) -> web.StreamResponse:
    """POST /v1/subscriptions/{subscription_id}/test."""
    subscription_id = call.path(SUBSCRIPTION_ID)
    await call.json(NothingRequest)
    test_id = await _subscribing(call).store.order_test(subscription_id, call.principal.actor)
    return json_answer(OrderedAnswer(subscription_id=subscription_id, event_id=test_id), status=202)


async def redeliver(call: Call) -> web.StreamResponse:
    """POST /v1/subscriptions/{subscription_id}/redeliver."""
    subscription_id, store = call.path(SUBSCRIPTION_ID), _subscribing(call).store
    wanted = await call.json(RedeliverRequest)
    if (wanted.event_id is None) == (wanted.since is None):
        raise InvalidRequestError("give either event_id or since")
    if wanted.event_id is not None:
        event_id = UUID(wanted.event_id)
        await store.order_repeat(subscription_id, call.principal.actor, event_id)
        return json_answer(OrderedAnswer(subscription_id=subscription_id, event_id=event_id), status=202)
    position = await _position(call, wanted.since or NOW)
    await store.rewind(subscription_id, call.principal.actor, position)
    return json_answer(OrderedAnswer(subscription_id=subscription_id, position=str(position)), status=202)


async def list_deliveries(call: Call) -> web.StreamResponse:
    """GET /v1/subscriptions/{subscription_id}/deliveries."""
    subscription_id, store = call.path(SUBSCRIPTION_ID), _subscribing(call).store
    limit, cursor = call.query(LIMIT) or DEFAULT_PAGE, call.query(CURSOR)
    before = None if cursor is None else parse_number(cursor)
    if cursor is not None and before is None:
        raise InvalidRequestError("cursor must be `next` of the previous page")
    await store.find(subscription_id, call.principal.actor)
    found = await store.deliveries(subscription_id, limit + 1, before)
    more = len(found) > limit
    items = [_delivery(one) for one in found[:limit]]
    following = str(items[-1].number) if more else None
    return json_answer(DeliveryPageAnswer(items=items, next=following), headers=link_to_next(call, following))


def _subscribing(call: Call) -> Subscribing:
    if call.gateway.subscribing is None:
        raise UnavailableError("this gateway does not serve subscriptions")
    return call.gateway.subscribing


def _sees(call: Call) -> str | None:
    """The owner whose subscriptions the sender sees; None for all owners."""
    return None if call.principal.may(Right.OPERATE) else call.principal.actor


async def _position(call: Call, since: str) -> Position:
    start, tail = SINCE.parse(since), call.gateway.tail
    if isinstance(start, Position):
        start.require_within(await tail.end(start))
        return start
    return await tail.at_time(start) if isinstance(start, int) else await tail.end()


def _filter(filters: Filters) -> EventFilter:
    for name in ("producer", "subject", "retention_class"):
        for value in getattr(filters, name):
            check_text(f"filters.{name}", value)
    for event_type in filters.type:
        OF_TYPE.parse(event_type)
    return filters.to_filter()


async def _detail(call: Call, found: Subscription) -> SubscriptionDetailAnswer:
    held = await _subscribing(call).store.held([found.subscription_id])
    shown = [_held(one) for one in held.get(found.subscription_id, [])[:_MOST_HELD]]
    return SubscriptionDetailAnswer(**_shown(found), held=shown)


def _shown(found: Subscription) -> dict[str, Any]:
    return {
        "subscription_id": found.subscription_id,
        "owner": found.owner,
        "url": found.url,
        "filters": Filters.of(found.wanted),
        "state": str(found.state),
        "cause": found.cause,
        "trouble": found.trouble,
        "created_at": times.to_text(found.created_at),
        "position": str(found.position),
    }


def _held(row: HeldPackage) -> HeldShape:
    return HeldShape(
        package_id=row.package_id,
        sequence=row.sequence,
        attempts=row.attempts,
        since=times.to_text(row.since),
        next_at=None if row.parked else times.to_text(row.next_at),
        parked=row.parked,
        cause=row.cause,
    )


def _delivery(made: Delivery) -> DeliveryShape:
    return DeliveryShape(
        number=made.number,
        kind=made.kind.value,
        event_id=made.event_id,
        event_type=made.event_type,
        package_id=made.package_id,
        sequence=made.sequence,
        attempt=made.attempt,
        delivered=made.status is not None and 200 <= made.status < 300,
        begun_at=times.to_text(made.begun_at),
        milliseconds=made.milliseconds,
        status=made.status,
        answer=made.answer,
        error=made.error,
    )


_ALL = "/v1/subscriptions"
_ONE = f"{_ALL}/{{subscription_id}}"
_PROBLEMS = (InvalidRequestError, NotFoundError, UnavailableError, PushBackError)
_SINCE_PROBLEMS = (InvalidPositionError, LogIdentityError)
_TAG = "subscriptions"

ROUTES = (
    Route(
        "POST",
        _ALL,
        subscribe,
        "Subscribe a URL to events",
        (Success(201, "The subscription, with its secret", {JSON: SubscribedAnswer}, {"Location": LOCATION}),),
        access=Right.SUBSCRIBE,
        parameters=(IDEMPOTENCY_KEY, *DIGESTS),
        body=Body(
            {JSON: SubscribeRequest},
            example={
                "url": "https://receiver.example/packages",
                "filters": {"producer": ["ci"], "type": ["v1.package.finalized"]},
            },
        ),
        problems=(*_PROBLEMS, *_SINCE_PROBLEMS, ConflictError, CommandReusedError, *READING),
        description="Events are sent at least once and in order per package, as CloudEvents that are signed as the "
        "Standard Webhooks specification says. Only events of packages that the owner may read and subscribe to are "
        "sent, and none once these rights are gone.",
        tag=_TAG,
    ),
    Route(
        "GET",
        _ALL,
        list_subscriptions,
        "List your subscriptions; operators see everyone's",
        (Success(200, "A page", {JSON: SubscriptionPageAnswer}, {"Link": TEXT}),),
        access=Right.SUBSCRIBE,
        parameters=(LIMIT, CURSOR),
        problems=(InvalidRequestError, UnavailableError),
        tag=_TAG,
    ),
    Route(
        "GET",
        _ONE,
        show_subscription,
        "Show a subscription, and the packages that it holds back",
        (Success(200, "The subscription", {JSON: SubscriptionDetailAnswer}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID,),
        problems=_PROBLEMS,
        tag=_TAG,
    ),
    Route(
        "PATCH",
        _ONE,
        change_subscription,
        "Pause, resume or change a subscription",
        (Success(200, "The subscription as it is now", {JSON: SubscriptionDetailAnswer}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID, *DIGESTS),
        body=Body({JSON: ChangeSubscriptionRequest}, example={"paused": True}),
        problems=(*_PROBLEMS, *READING),
        description="If the owner changes it, their rights follow from the token of this request from now on. "
        "New filters apply to events after the change.",
        tag=_TAG,
    ),
    Route(
        "DELETE",
        _ONE,
        delete_subscription,
        "Delete a subscription with its deliveries",
        (Success(204, "The subscription is gone"),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID,),
        problems=_PROBLEMS,
        tag=_TAG,
    ),
    Route(
        "POST",
        f"{_ONE}/rotate",
        rotate_secret,
        "Make a new secret",
        (Success(200, "The secret", {JSON: SecretAnswer}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID, *DIGESTS),
        body=Body({JSON: NothingRequest}, required=False),
        problems=(*_PROBLEMS, *READING),
        description="For 24 hours, messages have a signature with each of the two secrets.",
        tag=_TAG,
    ),
    Route(
        "POST",
        f"{_ONE}/test",
        test_subscription,
        "Send a test message, once",
        (Success(202, "It will be sent; the deliveries show the answer", {JSON: OrderedAnswer}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID, *DIGESTS),
        body=Body({JSON: NothingRequest}, required=False),
        problems=(*_PROBLEMS, *READING),
        tag=_TAG,
    ),
    Route(
        "POST",
        f"{_ONE}/redeliver",
        redeliver,
        "Deliver one event again, or everything after a position or time",
        (Success(202, "It will be sent; the deliveries show the answers", {JSON: OrderedAnswer}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID, *DIGESTS),
        body=Body({JSON: RedeliverRequest}, example={"since": "2026-01-31T12:00:00Z"}),
        problems=(*_PROBLEMS, *_SINCE_PROBLEMS, *READING),
        description="A single event is sent once, regardless of order. If its package waits for it, parked or not, it "
        "is tried now, and later events follow it.",
        tag=_TAG,
    ),
    Route(
        "GET",
        f"{_ONE}/deliveries",
        list_deliveries,
        "List a subscription's deliveries, the newest first",
        (Success(200, "A page", {JSON: DeliveryPageAnswer}, {"Link": TEXT}),),
        access=Right.SUBSCRIBE,
        parameters=(SUBSCRIPTION_ID, LIMIT, CURSOR),
        problems=_PROBLEMS,
        description="Each attempt with the receiver's answer, visible about a second later. The last 500 are kept.",
        tag=_TAG,
    ),
)
