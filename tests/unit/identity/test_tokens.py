"""Authentication: tokens of an issuer and static ones, each bad one refused, and the cache of good ones."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as property_tests
from hypothesis import strategies as st
from joserfc import jwk
from prometheus_client import CollectorRegistry

from artifact_store.errors import ConfigurationError, UnauthenticatedError, UnavailableError
from services.config import Settings
from services.core.access import Principal, Right
from services.identity import oidc
from services.identity.actors import actor_of
from services.identity.authenticator import LOOK_SECONDS, Authenticator
from services.identity.policy import parse_policy
from services.identity.static_tokens import PREFIX, create_token, is_static, revoke_tokens
from tests.certificates import Authority
from tests.oidc_provider import AUDIENCE, Provider, new_key, provider

POLICY = """
[[issuer]]
alias = "ci"
url = "{url}"
audience = ["{audience}"]
{more}

[[rule]]
issuer = "ci"
claims = {{ sub = "job-*" }}
can = ["read", "write"]
producers = ["team-*"]
"""


class Ticks:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def look_again(self) -> None:
        """So much time that files are looked at again."""
        self.now += LOOK_SECONDS


@pytest.fixture
async def issuer() -> AsyncIterator[Provider]:
    async with provider() as made:
        yield made


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


def write_policy(folder: Path, issuer: Provider, more: str = "") -> Path:
    path = folder / "policy.toml"
    path.write_text(POLICY.format(url=issuer.url, audience=AUDIENCE, more=more))
    return path


@pytest.fixture
async def gate(tmp_path: Path, issuer: Provider, ticks: Ticks) -> AsyncIterator[Authenticator]:
    async with Authenticator(
        policy=write_policy(tmp_path, issuer), tokens=tmp_path / "tokens.json", ticks=ticks
    ) as made:
        yield made


async def refused(gate: Authenticator, authorization: str | None) -> UnauthenticatedError:
    with pytest.raises(UnauthenticatedError) as caught:
        await gate.authenticate(authorization)
    for part in (authorization or "").split(".") if authorization else ():
        assert part.strip() not in caught.value.detail or len(part) < 8
    return caught.value


def rights(principal: Principal) -> set[Right]:
    return {right for right in Right if principal.may(right)}


async def test_a_sound_token_is_the_subject_with_the_rights_of_its_claims(
    gate: Authenticator, issuer: Provider
) -> None:
    principal = await gate.authenticate(f"Bearer {issuer.token()}")
    assert principal.actor == "ci:job-7"
    assert rights(principal) == {Right.READ, Right.WRITE}
    assert principal.scope(Right.READ).includes("team-a", "x")
    assert not principal.scope(Right.READ).includes("other", "x")
    assert principal.expires_at == pytest.approx(time.time() + 300, abs=5)
    other = await gate.authenticate(f"bearer  {issuer.token(sub='somebody')} ")
    assert (other.actor, rights(other)) == ("ci:somebody", set())


async def test_each_issuer_vouches_for_its_own_subjects_alone(tmp_path: Path, issuer: Provider) -> None:
    async with provider() as company:
        path = write_policy(tmp_path, issuer)
        mapped = '[[rule]]\nissuer = "sso"\nclaims = { sub = "job-7" }\ncan = ["operate"]\n'
        path.write_text(
            f'{path.read_text()}[[issuer]]\nalias = "sso"\nurl = "{company.url}"\naudience = ["{AUDIENCE}"]\n{mapped}'
        )
        async with Authenticator(policy=path) as gate:
            of_ci, of_company = [await gate.authenticate(f"Bearer {one.token()}") for one in (issuer, company)]
            assert (of_ci.actor, rights(of_ci)) == ("ci:job-7", {Right.READ, Right.WRITE})
            assert (of_company.actor, rights(of_company)) == ("sso:job-7", {Right.OPERATE})
            for signs, other in ((issuer, company), (company, issuer)):
                await refused(gate, f"Bearer {signs.token(iss=other.url)}")


async def test_an_expiry_beyond_all_calendars_is_the_last_second(gate: Authenticator, issuer: Provider) -> None:
    principal = await gate.authenticate(f"Bearer {issuer.token(exp=10**400)}")
    assert principal.expires_at == 253_402_300_799.0


def part(value: Any) -> str:
    """A part of a compact token."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unsigned(header: Any, claims: Any) -> str:
    """A token whose signature is wrong, for what joserfc does not sign."""
    return f"{part(header)}.{part(claims)}.AAAA"


def hmac_with_public_key(issuer: Provider) -> str:
    """What fools a verifier that lets the token choose the algorithm."""
    assert not isinstance(issuer.key, jwk.OctKey)
    signed = f"{part({'alg': 'HS256', 'kid': issuer.key.kid})}.{part(issuer.claims())}"
    secret = issuer.key.as_pem(private=False)
    return f"{signed}.{part(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def changed(issuer: Provider) -> str:
    """A sound token, but for its subject, which was changed after it was signed."""
    head, _, signature = issuer.token().split(".")
    return f"{head}.{part(issuer.claims(sub='job-8'))}.{signature}"


BAD: dict[str, tuple[Callable[[Provider], str], str]] = {
    "expired": (lambda p: p.token(exp=int(time.time()) - 31), "has expired"),
    "not yet valid": (lambda p: p.token(nbf=int(time.time()) + 90), "nbf"),
    "issued in the future": (lambda p: p.token(iat=int(time.time()) + 90), "iat"),
    "without expiry": (lambda p: p.token(exp=None), "exp"),
    "an expiry that is text": (lambda p: p.token(exp="never"), "exp"),
    "an expiry that is no number": (lambda p: p.token(exp=float("nan")), "no JSON Web Token"),
    "an endless expiry": (lambda p: p.token(exp=float("inf")), "no JSON Web Token"),
    "without subject": (lambda p: p.token(sub=None), "sub"),
    "an empty subject": (lambda p: p.token(sub=""), "sub"),
    "a subject that is no text": (lambda p: p.token(sub=7), "sub"),
    "forged by another key": (lambda p: p.token(new_key("first")), "signature"),
    "changed after it was signed": (changed, "signature"),
    "wrong audience": (lambda p: p.token(aud="elsewhere"), "aud"),
    "without audience": (lambda p: p.token(aud=None), "aud"),
    "an audience that is an object": (lambda p: p.token(aud={AUDIENCE: 1}), "aud"),
    "wrong issuer": (lambda p: p.token(iss="https://other.example"), "not trusted"),
    "an issuer with a slash more": (lambda p: p.token(iss=p.url + "/"), "not trusted"),
    "without issuer": (lambda p: p.token(iss=None), "not trusted"),
    "an issuer that is a list": (lambda p: p.token(iss=[p.url]), "not trusted"),
    "alg none": (lambda p: f"{part({'alg': 'none', 'kid': p.key.kid})}.{part(p.claims())}.", "signs by"),
    "HMAC with the public key": (hmac_with_public_key, "signs by"),
    "an algorithm that the policy lacks": (
        lambda p: unsigned({"alg": "ES384", "kid": "first"}, p.claims()),
        "signs by",
    ),
    "unknown key": (lambda p: p.token(new_key("unknown")), "no such key"),
    "a critical extension": (lambda p: unsigned({"alg": "ES256", "crit": ["b64"], "b64": True}, p.claims()), "crit"),
    "wrong typ": (lambda p: p.token(header={"typ": "logout+jwt"}), "typ"),
    "a typ that is no text": (lambda p: unsigned({"alg": "ES256", "typ": 7}, p.claims()), "typ"),
    "huge": (lambda p: p.token(padding="x" * oidc.MAX_TOKEN_BYTES), "longer than"),
    "nested too deeply": (lambda _: unsigned({"alg": "ES256"}, b"[" * 9000), "no JSON Web Token"),
    "a claim that comes twice": (
        lambda _: unsigned({"alg": "ES256"}, b'{"iss":"a","iss":"b"}'),
        "no JSON Web Token",
    ),
    "a header that is a list": (lambda p: unsigned(["alg"], p.claims()), "no JSON Web Token"),
    "a header that is text": (lambda p: unsigned("alg", p.claims()), "no JSON Web Token"),
    "a key id that is a list": (lambda p: unsigned({"alg": "ES256", "kid": ["first"]}, p.claims()), "key id"),
    "no token of any kind": (lambda _: "hunter2hunter2", "no JSON Web Token"),
    "an unknown static token": (lambda _: "artst_" + "0" * 64, "not known"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_token_is_refused_and_not_repeated(kind: str, gate: Authenticator, issuer: Provider) -> None:
    make, cause = BAD[kind]
    error = await refused(gate, f"Bearer {make(issuer)}")
    assert cause in error.detail
    assert (error.status, error.code) == (401, "invalid_token")
    assert error.challenge.startswith('Bearer realm="artifact-store", error="invalid_token", error_description="')


@pytest.mark.parametrize("header", ["", "Basic YTpi", "Bearer", "Bearer a b", "Bearer a\nb", "Bearer ä", "x" * 70_000])
async def test_a_header_of_another_form_is_refused(header: str, gate: Authenticator) -> None:
    assert (await refused(gate, header)).code == "invalid_token"


async def test_no_token_at_all_gets_a_challenge_without_an_error(gate: Authenticator) -> None:
    assert (await refused(gate, None)).challenge == 'Bearer realm="artifact-store"'


@pytest.mark.parametrize(("kind", "algorithm"), [("RSA", "RS256"), ("RSA", "PS256"), ("OKP", "EdDSA")])
async def test_the_other_algorithms_work_by_default(
    kind: str, algorithm: str, gate: Authenticator, issuer: Provider
) -> None:
    issuer.key = new_key("other", kind)
    issuer.published = [issuer.key]
    principal = await gate.authenticate(f"Bearer {issuer.token(header={'alg': algorithm})}")
    assert principal.actor == "ci:job-7"


@pytest.mark.parametrize(
    ("more", "header", "accepted"),
    [
        ("", {}, True),
        ("", {"typ": "AT+jwt"}, True),
        ("", {"typ": "application/at+jwt"}, True),
        ('typ = "at+jwt"', {"typ": "at+JWT"}, True),
        ('typ = "at+jwt"', {"typ": "JWT"}, False),
        ('typ = "special+jwt"', {"typ": "special+jwt"}, True),
        ('algorithms = ["RS256"]', {}, False),
    ],
)
async def test_typ_and_algorithms_are_those_of_the_policy(
    more: str, header: dict[str, str], accepted: bool, tmp_path: Path, issuer: Provider
) -> None:
    gate = Authenticator(policy=write_policy(tmp_path, issuer, more))
    token = f"Bearer {issuer.token(header=header)}"
    if accepted:
        assert (await gate.authenticate(token)).actor == "ci:job-7"
    else:
        await refused(gate, token)


async def test_a_verified_token_is_remembered_until_the_keys_change(
    gate: Authenticator, issuer: Provider, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"Bearer {issuer.token()}"
    first = await gate.authenticate(token)
    monkeypatch.setattr(oidc.Issuer, "verify", None)  # nothing is verified any more
    assert await gate.authenticate(token) is first
    monkeypatch.undo()
    issuer.rotate("second")
    ticks.now += oidc.FRESH_SECONDS + 1
    assert await gate.authenticate(token) is first  # the keys are renewed in the background meanwhile
    await asyncio.wait([task for task in asyncio.all_tasks() if task is not asyncio.current_task()], timeout=5)
    await refused(gate, token)
    assert (await gate.authenticate(f"Bearer {issuer.token()}")).actor == "ci:job-7"


async def test_a_token_that_was_remembered_is_refused_once_it_has_expired(tmp_path: Path, issuer: Provider) -> None:
    clock = Ticks()
    clock.now = time.time()
    gate = Authenticator(policy=write_policy(tmp_path, issuer), clock=clock)
    token = f"Bearer {issuer.token()}"
    await gate.authenticate(token)
    clock.now += issuer.lifetime + oidc.LEEWAY_SECONDS + 1
    assert "expired" in (await refused(gate, token)).detail


async def test_only_so_many_tokens_are_remembered(
    gate: Authenticator, issuer: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.identity.authenticator.MAX_REMEMBERED", 2)
    tokens = [f"Bearer {issuer.token(jti=name)}" for name in "abc"]
    first = [await gate.authenticate(token) for token in (tokens[0], tokens[1], tokens[0], tokens[2])]
    assert await gate.authenticate(tokens[0]) is first[0]
    assert await gate.authenticate(tokens[1]) is not first[1]  # the one that was used longest ago


async def test_a_new_key_is_fetched_once_for_all_and_not_again_at_once(
    gate: Authenticator, issuer: Provider, ticks: Ticks
) -> None:
    await gate.authenticate(f"Bearer {issuer.token()}")
    issuer.rotate("second", keep=True)
    ticks.now += oidc.RETRY_SECONDS
    tokens = [f"Bearer {issuer.token(jti=str(number))}" for number in range(20)]
    assert {p.actor for p in await asyncio.gather(*map(gate.authenticate, tokens))} == {"ci:job-7"}
    assert issuer.asked["/keys"] == 2
    for number in range(20):
        await refused(gate, f"Bearer {issuer.token(new_key(f'bogus-{number}'))}")
    assert issuer.asked["/keys"] == 2
    ticks.now += oidc.RETRY_SECONDS
    await refused(gate, f"Bearer {issuer.token(new_key('bogus'))}")
    assert issuer.asked["/keys"] == 3


async def test_an_issuer_that_is_away_refuses_nobody_for_good(
    gate: Authenticator, issuer: Provider, ticks: Ticks
) -> None:
    issuer.away = True
    token = f"Bearer {issuer.token()}"
    for _ in range(3):
        with pytest.raises(UnavailableError, match="status 503") as caught:
            await gate.authenticate(token)
        assert caught.value.retry_after == oidc.RETRY_SECONDS
    assert issuer.asked["/.well-known/openid-configuration"] == 1
    issuer.away = False
    ticks.now += oidc.RETRY_SECONDS
    assert (await gate.authenticate(token)).actor == "ci:job-7"
    issuer.away = True
    ticks.now += oidc.STALE_SECONDS - 60
    assert (await gate.authenticate(token)).actor == "ci:job-7"  # a known key goes on to count
    ticks.now += 120
    with pytest.raises(UnavailableError):
        await gate.authenticate(token)


async def test_one_who_gives_up_does_not_end_the_fetch_of_the_others(gate: Authenticator, issuer: Provider) -> None:
    issuer.proceed.clear()
    waiting = [asyncio.create_task(gate.authenticate(f"Bearer {issuer.token(jti=str(n))}")) for n in range(3)]
    await issuer.came.wait()
    waiting[0].cancel()
    issuer.proceed.set()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert all(isinstance(one, Principal) for one in done[1:])


async def test_an_issuer_that_does_not_answer_is_given_up(
    gate: Authenticator, issuer: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_FETCH_SECONDS", 0.05)
    issuer.proceed.clear()
    with pytest.raises(UnavailableError, match="no answer within"):
        await gate.authenticate(f"Bearer {issuer.token()}")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"issuer": "https://other.example"}, "another issuer"),
        ({"jwks_uri": "http://keys.example/keys"}, "must be https"),
        ({"jwks_uri": None}, "jwks_uri"),
        ({"padding": "x" * (513 << 10)}, "more than 512 KiB"),
    ],
)
async def test_a_discovery_document_that_cannot_be_right_is_not_used(
    changes: dict[str, Any], cause: str, gate: Authenticator, issuer: Provider
) -> None:
    issuer.discovery = changes
    with pytest.raises(UnavailableError, match=cause):
        await gate.authenticate(f"Bearer {issuer.token()}")
    assert issuer.asked["/keys"] == 0


@pytest.mark.parametrize(("more", "known"), [('ca = "authority.pem"', True), ("", False), ('ca = "other.pem"', False)])
async def test_an_issuer_is_believed_only_by_its_certificate(more: str, known: bool, tmp_path: Path) -> None:
    Authority(tmp_path, "other")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*Authority(tmp_path).issue("issuer", "127.0.0.1"))
    async with provider(tls) as issuer:
        gate = Authenticator(policy=write_policy(tmp_path, issuer, more))
        if known:
            assert (await gate.authenticate(f"Bearer {issuer.token()}")).actor == "ci:job-7"
        else:
            with pytest.raises(UnavailableError, match="certificate verify failed"):
                await gate.authenticate(f"Bearer {issuer.token()}")
            assert not issuer.asked


async def test_keys_in_a_file_need_no_issuer_and_are_read_again(tmp_path: Path, issuer: Provider, ticks: Ticks) -> None:
    keys = tmp_path / "keys.json"

    def publish() -> None:
        keys.write_text(json.dumps({"keys": [issuer.key.as_dict(private=False)]}))

    publish()
    gate = Authenticator(policy=write_policy(tmp_path, issuer, 'jwks = "keys.json"'), ticks=ticks)
    old = f"Bearer {issuer.token()}"
    await gate.authenticate(old)
    issuer.rotate("a-second-one")
    publish()
    ticks.look_again()
    await refused(gate, old)
    await gate.authenticate(f"Bearer {issuer.token()}")
    assert not issuer.asked


async def test_keys_that_prove_little_or_are_not_for_signatures_are_not_used(issuer: Provider) -> None:
    good = new_key("good").as_dict(private=False)
    listed: list[Any] = [
        None,
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        {"kty": "RSA", "n": "a" * 171, "e": "AQAB", "kid": "short"},
        {"kty": "RSA", "n": "a" * 9000, "e": "AQAB", "kid": "long"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "off the curve"},
        {"kty": "XX", "kid": "new"},
        {**good, "kty": ["EC"], "kid": "of no type"},
        {**good, "kid": ["a list"]},
        {**good, "use": "enc", "kid": "for encryption"},
        {**good, "alg": "HS256", "kid": "as a secret"},
    ]
    with pytest.raises(ValueError, match="no public key"):
        oidc.read_keys({"keys": listed}, ["ES256", "RS256"])
    keys = oidc.read_keys({"keys": [*listed, good]}, ["ES256", "RS256"])
    assert {key_id for key_id, _ in keys.thumbprints} == {"good"}


@given(
    st.text(alphabet=st.characters(codec="ascii"), max_size=200)
    | st.binary(max_size=100).map(
        lambda b: ".".join(base64.urlsafe_b64encode(b).decode().rstrip("=") for _ in range(3))
    )
)
def test_no_text_does_anything_but_be_refused(text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        oidc.unverified(text)


@property_tests(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "keys", "kty"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_as_header_or_keys_is_refused_in_words(value: Any) -> None:
    try:
        header, claims = oidc.unverified(unsigned(value, {"iss": "x"}))
    except UnauthenticatedError:
        pass
    else:
        assert isinstance(header, dict)
        assert claims == {"iss": "x"}
    with pytest.raises(ValueError, match="key"):
        oidc.read_keys(value, ["ES256"])


TOML_KEYS = st.sampled_from(
    ["issuer", "rule", "principal", "alias", "url", "audience", "claims", "can", "jwks", "ca", "name", "typ"]
)
TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.sampled_from(["ci", "read", "*", "https://a.example", "a\u0000", "[::1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TOML_KEYS, inner, max_size=3),
    max_leaves=8,
)


def toml(value: Any) -> str:
    """A value as TOML has it inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@property_tests(max_examples=60)
@given(st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=3) | st.binary(max_size=60))
def test_any_policy_is_taken_or_refused_by_an_error_of_ours(value: Any) -> None:
    raw = value if isinstance(value, bytes) else "\n".join(f"{k} = {toml(v)}" for k, v in value.items()).encode()
    with suppress(ConfigurationError):
        assert not parse_policy(raw, Path("policy.toml")).rule  # a whole issuer is not made by chance


# --- static tokens ---


async def test_a_static_token_works_until_it_is_revoked(tmp_path: Path, gate: Authenticator, ticks: Ticks) -> None:
    path = tmp_path / "tokens.json"
    made, token = create_token(path, "backup", [Right.READ], producers=["team-*"], now=time.time())
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    ticks.look_again()
    principal = await gate.authenticate(f"Bearer {token}")
    assert (principal.actor, rights(principal)) == ("token:backup", {Right.READ})
    assert not principal.scope(Right.READ).includes("other", "x")
    second, other = create_token(path, "backup", [Right.READ], now=time.time())
    ticks.look_again()
    assert (await gate.authenticate(f"Bearer {other}")).actor == principal.actor  # rotation keeps the actor
    assert revoke_tokens(path, made.id) == (made,)
    ticks.look_again()
    await refused(gate, f"Bearer {token}")
    assert (await gate.authenticate(f"Bearer {other}")).actor == "token:backup"
    assert [one.id for one in revoke_tokens(path, "backup")] == [second.id]
    path.unlink()
    ticks.look_again()
    await refused(gate, f"Bearer {other}")


def test_no_part_of_a_static_token_can_be_guessed(tmp_path: Path) -> None:
    made = [create_token(tmp_path / "tokens.json", "n", [], now=0)[1] for _ in range(40)]
    assert all(is_static(token) for token in made)
    assert all(len(set(digits)) > 1 for digits in zip(*(token[len(PREFIX) :] for token in made), strict=True))
    assert len(made[0]) == len(PREFIX) + 256 // 4


async def test_a_static_token_expires(tmp_path: Path) -> None:
    clock = Ticks()
    path = tmp_path / "tokens.json"
    _, token = create_token(path, "visitor", [Right.READ], days=2, now=clock.now)
    gate = Authenticator(tokens=path, clock=clock)
    assert (await gate.authenticate(f"Bearer {token}")).expires_at == clock.now + 2 * 86_400
    clock.now += 2 * 86_400
    await refused(gate, f"Bearer {token}")


async def test_the_policy_adds_to_a_static_token_of_its_name(tmp_path: Path) -> None:
    policy, path = tmp_path / "policy.toml", tmp_path / "tokens.json"
    policy.write_text('[[principal]]\nname = "ops"\ncan = ["operate"]\n')
    _, token = create_token(path, "ops", [Right.READ], now=time.time())
    gate = Authenticator(policy=policy, tokens=path)
    assert rights(await gate.authenticate(f"Bearer {token}")) == {Right.READ, Right.OPERATE}


async def test_a_file_that_became_invalid_changes_nothing_and_shows(
    tmp_path: Path, issuer: Provider, ticks: Ticks, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = CollectorRegistry()
    policy, path = write_policy(tmp_path, issuer), tmp_path / "tokens.json"
    _, static = create_token(path, "backup", [Right.READ], now=time.time())
    gate = Authenticator(policy=policy, tokens=path, metrics=metrics, ticks=ticks)
    tokens = [f"Bearer {issuer.token()}", f"Bearer {static}"]

    def shown(file: str) -> float | None:
        return metrics.get_sample_value("artifact_store_identity_file_invalid", {"file": file})

    sound = policy.read_text()
    policy.write_text(sound + '[[rule]]\nissuer = "nobody"\nclaims = { sub = "*" }\ncan = ["read"]\n')
    path.write_text("{}")
    for _ in range(3):
        ticks.look_again()
        for token in tokens:
            await gate.authenticate(token)
    assert (shown("policy"), shown("tokens")) == (1, 1)
    assert sum("nobody" in record.getMessage() for record in caplog.records) == 1
    policy.write_text(sound.replace('"write"', '"dispose"'))
    revoke = path.with_name("other.json")
    create_token(revoke, "else", [Right.READ], now=time.time())
    revoke.replace(path)
    ticks.look_again()
    assert rights(await gate.authenticate(tokens[0])) == {Right.READ, Right.DISPOSE}
    await refused(gate, tokens[1])
    assert (shown("policy"), shown("tokens")) == (0, 0)


@pytest.mark.parametrize("name", ["policy.toml", "tokens.json"])
async def test_a_file_that_others_may_write_gives_nobody_rights(name: str, tmp_path: Path, issuer: Provider) -> None:
    policy, tokens = write_policy(tmp_path, issuer), tmp_path / "tokens.json"
    create_token(tokens, "backup", [Right.READ], now=time.time())
    (tmp_path / name).chmod(0o646)
    with pytest.raises(ConfigurationError, match=rf"others may write .*{name}: chmod o-w"):
        Authenticator(policy=policy, tokens=tokens)


# --- who everyone is without settings ---


async def test_on_loopback_everyone_is_the_local_user_with_all_rights() -> None:
    gate = Authenticator.open(Settings())
    principal = await gate.authenticate(None)
    assert principal.actor.startswith("local:")
    assert rights(principal) == set(Right)
    assert await gate.authenticate("Bearer whatever") is principal


async def test_beyond_loopback_nobody_is_let_in_unless_it_is_said_aloud() -> None:
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_POLICY"):
        Authenticator.open(Settings(listen="0.0.0.0:8080"))
    everyone = await Authenticator.open(Settings(listen="0.0.0.0:8080", insecure=True)).authenticate(None)
    assert (everyone.actor, rights(everyone)) == ("anonymous", set(Right))


async def test_insecure_does_not_switch_tokens_off(tmp_path: Path) -> None:
    gate = Authenticator.open(Settings(listen="0.0.0.0:1", insecure=True, tokens=tmp_path / "tokens.json"))
    await refused(gate, None)


@pytest.mark.parametrize(
    ("subject", "plain"),
    [
        ("repo:team/app:ref:refs/heads/main", True),
        ("x" * 253, True),
        ("x" * 254, False),
        ("ada@example.org", False),
        ("system:serviceaccount:store:gateway", True),
        ("a\nb", False),
        ("\ud800", False),
        ("~" + "0" * 64, False),
    ],
)
def test_the_actor_names_the_subject_or_its_digest(subject: str, plain: bool) -> None:
    actor = actor_of("ci", subject)
    assert (actor == f"ci:{subject}") is plain
    assert actor.startswith("ci:")
    assert len(actor) <= 256
    if not plain:
        assert len(actor) == len("ci:~") + 64
        assert actor_of("ci", actor.removeprefix("ci:")) != actor  # nobody takes the name by having it as subject
