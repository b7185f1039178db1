"""`tokens` and `policy`: static tokens and the policy file, which say who may use a gateway. Both work on files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from services.cli.command import answer, as_usage, common_options, invocation, remark, run, say, table
from services.core.access import Right

if TYPE_CHECKING:
    from services.core.access import Grant
    from services.identity.policy import Policy
    from services.identity.static_tokens import StaticToken

_RIGHTS = ", ".join(Right)
_COLUMNS = ("id", "name", "can", "producers", "subjects", "created", "expires")
_MOST_CLAIMS_BYTES = 64 << 10

Changed = TypeVar("Changed")


@click.group()
@common_options(shown=("tokens",))
def tokens() -> None:
    """Create, list and revoke static tokens, on the gateway's machine.

    The file that ARTIFACT_STORE_TOKENS names holds their hashes. A gateway notices a change within a second.
    """


@tokens.command()
@click.argument("name")
@click.argument("more", metavar="[RIGHT]...", nargs=-1)
@click.option("--can", multiple=True, metavar="RIGHT", help=f"A right of the token; may repeat: {_RIGHTS}.")
@click.option(
    "--producer",
    "producers",
    multiple=True,
    help="Only packages whose producer matches this pattern; `*` matches any text. May be repeated.",
)
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    help="Only packages whose subject matches this pattern; `*` matches any text. May be repeated.",
)
@click.option(
    "--expires",
    type=click.FloatRange(0, 36_500, min_open=True),
    metavar="DAYS",
    help="When it expires.  [default: never]",
)
@common_options(shown=("tokens",))
def create(
    name: str,
    more: tuple[str, ...],
    can: tuple[str, ...],
    producers: tuple[str, ...],
    subjects: tuple[str, ...],
    expires: float | None,
) -> None:
    """Create a token and print it. It is shown only once.

    In events, its holder is `token:NAME`. To replace a token, create another one with the same name, hand it out, and
    revoke the old one by its id. Without --can, the token has the rights that the policy gives to its name.
    """
    from services.identity.static_tokens import create_token

    rights = _rights([*can, *more])
    with as_usage():
        file = _tokens_file()
        made, token = _recorded(
            "tokens create",
            name,
            lambda: create_token(
                file,
                name,
                rights,
                producers=producers or ("*",),
                subjects=subjects or ("*",),
                days=expires,
                now=time.time(),
            ),
        )
    if not rights:
        remark(f"the token has no rights of its own, only those of [[principal]] {name} in the policy")
    answer({"id": made.id, "token": token, **_shown(made)})
    remark("save the token now: only its hash is stored")


@tokens.command(name="list")
@common_options(shown=("tokens",))
def list_() -> None:
    """List the tokens without their secrets."""
    from services.identity.static_tokens import read_tokens

    found = [{"id": token.id, **_shown(token)} for token in read_tokens(_tokens_file())]
    if invocation().as_json:
        for one in found:
            answer(one)
    elif found:
        rows = [[", ".join(v) if isinstance(v, list) else v for v in one.values()] for one in found]
        table(_COLUMNS, rows)
    else:
        remark("there is no token")


@tokens.command()
@click.argument("which", metavar="ID|NAME")
@common_options(shown=("tokens",))
def revoke(which: str) -> None:
    """Revoke the token with this id, or every token with this name."""
    from services.identity.static_tokens import revoke_tokens

    file = _tokens_file()
    revoked = _recorded("tokens revoke", which, lambda: revoke_tokens(file, which))
    answer(
        {"revoked": [token.id for token in revoked]},
        "\n".join(f"revoked {token.id} of {token.name}" for token in revoked),
    )


def _recorded(action: str, about: str, change: Callable[[], Changed]) -> Changed:
    """The result of `change`, which is also audited if the settings name an audit file. That file is opened first."""
    from services.identity.actors import local_actor
    from services.identity.audit import Audit

    async def work() -> Changed:
        async with Audit(invocation().settings().audit_file) as audit:
            done = change()
            audit.record(principal=local_actor(), action=action, allowed=True, client="localhost", target=about)
            return done

    return run(work())


def _tokens_file() -> Path:
    from artifact_store.errors import ConfigurationError

    found = invocation().settings().tokens
    if found is None:
        raise ConfigurationError("name the file of tokens with ARTIFACT_STORE_TOKENS or --tokens")
    return found


def _rights(names: list[str]) -> list[Right]:
    found = [name for text in names for name in text.split(",") if name]
    for name in found:
        if name not in list(Right):
            raise click.BadParameter(f"{name!r} is no right; known are {_RIGHTS}", param_hint="--can")
    return [Right(name) for name in found]


def _shown(token: StaticToken) -> dict[str, Any]:
    from artifact_store.documents.times import to_text

    return {
        "name": token.name,
        "can": list(token.can),
        "producers": list(token.producers),
        "subjects": list(token.subjects),
        "created_at": to_text(token.created_at * 1_000_000),
        "expires_at": None if token.expires_at is None else to_text(token.expires_at * 1_000_000),
    }


@click.group()
@common_options(shown=("policy",))
def policy() -> None:
    """Check the policy file, and explain what it allows a token."""


_FILE = click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))


@policy.command()
@_FILE
@common_options(shown=("policy",))
def check(file: Path | None) -> None:
    """Check FILE, or the policy that the settings name, as a gateway does. Exit code 2 if it is invalid."""
    found = _policy(file)
    counts = {"issuers": len(found.issuer), "rules": len(found.rule), "principals": len(found.principal)}
    answer({"valid": True, **counts}, f"valid: {', '.join(f'{count} {name}' for name, count in counts.items())}")


@policy.command()
@_FILE
@click.option("--issuer", metavar="ALIAS", help="The issuer of the claims.")
@click.option("--claims", metavar="JSON|FILE", help="The claims of a token: a JSON object, or a file that holds one.")
@click.option(
    "--token", "token_from", type=click.File("r"), metavar="FILE", help="A file with a token; `-` reads standard input."
)
@click.option("--name", help="The name of a static token, instead of claims.")
@click.option("--producer", help="Show whether each right holds for packages of this producer …")
@click.option("--subject", help="… and this subject; both or neither.")
@common_options(shown=("policy",))
def explain(
    file: Path | None,
    issuer: str | None,
    claims: str | None,
    token_from: Any,
    name: str | None,
    producer: str | None,
    subject: str | None,
) -> None:
    """Show which rules match a token, and the rights that it gets.

    The token is not verified. This shows what a token with these claims may do if the gateway accepts it.
    """
    from services.identity.actors import actor_of
    from services.identity.policy import STATIC_ALIAS

    if (producer is None) != (subject is None):
        raise click.UsageError("--producer and --subject belong together")
    found = _policy(file)
    if name is not None:
        if issuer or claims or token_from:
            raise click.UsageError("--name is for static tokens, which have neither issuer nor claims")
        entries = [
            ("principal", number, one.grant, None if one.name == name else f"it is for {one.name}")
            for number, one in enumerate(found.principal, 1)
        ]
        actor = actor_of(STATIC_ALIAS, name)
    else:
        alias, said = _claims(found, issuer, claims, token_from)
        entries = [
            ("rule", number, rule.grant, _why_not(rule.issuer == alias, rule.issuer, rule.mismatch(said)))
            for number, rule in enumerate(found.rule, 1)
        ]
        actor = actor_of(alias, str(said.get("sub", "")))
    _explain(actor, entries, producer, subject)


def _why_not(of_issuer: bool, issuer: str, mismatch: str | None) -> str | None:
    if not of_issuer:
        return f"it is for issuer {issuer}"
    return None if mismatch is None else f"the claim {mismatch} does not match"


def _explain(
    actor: str, entries: list[tuple[str, int, Grant, str | None]], producer: str | None, subject: str | None
) -> None:
    grants = [grant for *_, grant, why_not in entries if why_not is None]
    if producer is not None and subject is not None:
        grants = [grant for grant in grants if grant.packages.include(producer, subject)]
    rights = [right for right in Right if any(right in grant.rights for grant in grants)]
    if invocation().as_json:
        answer(
            {
                "actor": actor,
                "entries": [
                    {
                        "table": kind,
                        "number": number,
                        "matches": why_not is None,
                        "why_not": why_not,
                        "can": sorted(grant.rights),
                        "producers": list(grant.packages.producers),
                        "subjects": list(grant.packages.subjects),
                    }
                    for kind, number, grant, why_not in entries
                ],
                "rights": list(rights),
            }
        )
        return
    say(f"actor   {actor}")
    for kind, number, grant, why_not in entries:
        packages = f"producers {', '.join(grant.packages.producers)}; subjects {', '.join(grant.packages.subjects)}"
        gives = f"{', '.join(sorted(grant.rights))} on {packages}"
        say(f"[[{kind}]] {number}  {f'matches: {gives}' if why_not is None else f'does not match: {why_not}'}")
    where = "" if producer is None else f" on packages of {producer} about {subject}"
    say(f"rights{where}: {', '.join(rights) or 'none'}")


def _policy(file: Path | None) -> Policy:
    from artifact_store.errors import ConfigurationError
    from services.identity.policy import read_policy

    path = file or invocation().settings().policy
    if path is None:
        raise ConfigurationError("name the policy file, as an argument or with ARTIFACT_STORE_POLICY")
    return read_policy(path)


def _claims(policy: Policy, issuer: str | None, claims: str | None, token_from: Any) -> tuple[str, dict[str, Any]]:
    """The alias of the issuer, and the claims."""
    from services.cli.command import json_object

    if (claims is None) == (token_from is None):
        raise click.UsageError("give --claims, --token or --name")
    if token_from is not None:
        from artifact_store.errors import UnauthenticatedError
        from services.identity.oidc import unverified

        try:
            said = dict(unverified(token_from.read(_MOST_CLAIMS_BYTES).strip())[1])
        except UnauthenticatedError as error:
            raise click.BadParameter(error.detail, param_hint="--token") from None
    else:
        said = json_object(claims or "", "--claims")
    by_url = {one.url: one.alias for one in policy.issuer}
    alias = issuer or by_url.get(str(said.get("iss", "")))
    if alias is None or alias not in by_url.values():
        known = ", ".join(by_url.values()) or "none"
        raise click.UsageError(f"--issuer must be one of the policy's ({known}), or the claim iss the URL of one")
    return alias, said
