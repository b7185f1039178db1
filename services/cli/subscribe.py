"""`subscriptions`: have a gateway's events sent to a URL, and see the deliveries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from services.cli.command import answer, as_usage, common_options, invocation, remark, run, say, table

if TYPE_CHECKING:
    from pydantic import BaseModel

    from artifact_store.client.subscribing import SubscriptionsClient
    from artifact_store.models import EventFilter

Result = TypeVar("Result")

_SHOWN = ("url", "token_file", "ca")
_COLUMNS = ("subscription", "state", "owner", "url", "trouble")
_DELIVERIES = ("number", "begun", "type", "sequence", "attempt", "status", "ms", "package", "event", "error")
_ID = click.argument("subscription_id", metavar="ID")


@click.group()
@common_options(shown=_SHOWN)
def subscriptions() -> None:
    """Have events sent to a URL as signed webhooks, at least once and in order per package.

    These commands talk to the gateway of --url. The process `webhooks` sends the events.
    """


def _filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, what in (
        ("--type", "events of this type, such as v1.package.finalized"),
        ("--retention-class", "packages of this retention class"),
        ("--subject", "packages about this subject"),
        ("--producer", "packages of this producer"),
    ):
        command = click.option(name, multiple=True, help=f"Only {what}; may repeat.")(command)
    return click.option("--package", metavar="PACKAGE_ID", help="Only events of this package.")(command)


@subscriptions.command()
@click.argument("target", metavar="TARGET")
@_filtered
@click.option("--since", default="now", show_default=True, metavar="POSITION|TIME|now", help="Where to begin.")
@common_options(shown=_SHOWN)
def create(target: str, since: str, **filters: Any) -> None:
    """Have events sent to the URL TARGET. Prints the secret that signs the messages; it is shown only once."""
    wanted = _filters(**filters)

    _answer(_asked(lambda on: on.create(target, wanted, since=since)))
    remark("save the secret now: it is not shown again. `subscriptions rotate` makes another")


@subscriptions.command(name="list")
@common_options(shown=_SHOWN)
def list_() -> None:
    """List your subscriptions. Operators see everyone's."""
    from artifact_store.models import MAX_PAGE, all_pages

    async def work(on: SubscriptionsClient) -> list[Any]:
        pages = all_pages(lambda cursor: on.list(limit=MAX_PAGE, cursor=cursor))
        return [one async for page in pages for one in page.items]

    found = _asked(work)
    if invocation().as_json:
        for one in found:
            say(one.model_dump_json())
    elif found:
        table(_COLUMNS, [(o.subscription_id, o.state, o.owner, o.url, o.cause or o.trouble or "") for o in found])
    else:
        remark("there is no subscription")


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def show(subscription_id: str) -> None:
    """Show a subscription, and the packages that it holds back."""
    _answer(_asked(lambda on: on.get(_id(subscription_id))))


@subscriptions.command()
@_ID
@click.option("--target", metavar="URL", help="Send events to this URL from now on.")
@_filtered
@common_options(shown=_SHOWN)
def change(subscription_id: str, target: str | None, **filters: Any) -> None:
    """Change where events go, or which ones. Filters that you give replace all earlier filters."""
    wanted = _filters(**filters) if any(filters.values()) else None
    if target is None and wanted is None:
        raise click.UsageError("give what to change: --target or a filter")
    _answer(_asked(lambda on: on.change(_id(subscription_id), url=target, where=wanted)))


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def pause(subscription_id: str) -> None:
    """Send nothing until `resume`. Events wait in the log."""
    _answer(_asked(lambda on: on.change(_id(subscription_id), paused=True)))


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def resume(subscription_id: str) -> None:
    """Go on after a pause or an answer 410, and retry at once what waits for its next attempt."""
    _answer(_asked(lambda on: on.change(_id(subscription_id), paused=False)))


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def rotate(subscription_id: str) -> None:
    """Make a new secret. For 24 hours, messages are signed with the previous one as well."""
    _answer(_asked(lambda on: on.rotate(_id(subscription_id))))


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def test(subscription_id: str) -> None:
    """Send a test message, once; `deliveries` shows the answer."""
    _answer(_asked(lambda on: on.test(_id(subscription_id))))


@subscriptions.command()
@_ID
@click.argument("event_id", required=False)
@click.option("--since", metavar="POSITION|TIME", help="Send everything after this instead.")
@common_options(shown=_SHOWN)
def redeliver(subscription_id: str, event_id: str | None, since: str | None) -> None:
    """Send one event again, by its id in `deliveries`, or everything after a position or time.

    If a package waits for this event, parked or not, the event is tried now, and later ones follow it.
    """
    if (event_id is None) == (since is None):
        raise click.UsageError("give either EVENT_ID or --since")
    event = None if event_id is None else _id(event_id)
    _answer(_asked(lambda on: on.redeliver(_id(subscription_id), event_id=event, since=since)))


@subscriptions.command()
@_ID
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="List at most this many.")
@common_options(shown=_SHOWN)
def deliveries(subscription_id: str, limit: int) -> None:
    """List attempts and the receiver's answers, the newest first."""
    found = _asked(lambda on: on.deliveries(_id(subscription_id), limit=limit)).items
    if invocation().as_json:
        for one in found:
            say(one.model_dump_json())
        return
    shown = ("number", "begun_at", "event_type", "sequence", "attempt", "status", "milliseconds")
    rows = [[getattr(one, name) for name in (*shown, "package_id", "event_id", "error")] for one in found]
    table(_DELIVERIES, [["" if value is None else value for value in row] for row in rows])


@subscriptions.command()
@_ID
@common_options(shown=_SHOWN)
def delete(subscription_id: str) -> None:
    """Delete a subscription with its deliveries."""
    _asked(lambda on: on.delete(_id(subscription_id)))
    answer({"deleted": subscription_id}, f"deleted {subscription_id}")


def _asked(work: Callable[[SubscriptionsClient], Awaitable[Result]]) -> Result:
    from artifact_store.client.subscribing import SubscriptionsClient
    from services.cli.login import open_transport

    async def asked() -> Result:
        async with open_transport(invocation().settings()) as transport:
            return await work(SubscriptionsClient(transport))

    return run(asked())


def _answer(found: BaseModel) -> None:
    answer(found.model_dump(mode="json"))


def _id(text: str) -> Any:
    from artifact_store.documents.http import parse_id

    with as_usage():
        return parse_id("ID", text)


def _filters(
    package: str | None,
    producer: tuple[str, ...],
    subject: tuple[str, ...],
    retention_class: tuple[str, ...],
    **types: tuple[str, ...],
) -> EventFilter:
    from artifact_store.models import EventFilter

    return EventFilter(
        None if package is None else _id(package),
        producers=frozenset(producer),
        subjects=frozenset(subject),
        retention_classes=frozenset(retention_class),
        types=frozenset(types["type"]),
    )
