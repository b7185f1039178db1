"""`tokens`, `policy` and the part of `doctor` about identity."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from joserfc import jwk

from services.cli import main
from services.identity.actors import local_actor
from services.identity.authenticator import Authenticator

POLICY = """
[[issuer]]
alias = "ci"
url = "https://issuer.example"
audience = ["artifact-store"]
jwks = "keys.json"

[[rule]]  # everyone of the team
issuer = "ci"
claims = { repository = ["team/*", "shared"], kubernetes = { namespace = "store" } }
can = ["read", "write"]
producers = ["team-*"]

[[rule]]
issuer = "ci"
claims = { sub = "admin" }
can = ["operate"]

[[principal]]
name = "backup"
can = ["read"]
"""


@pytest.fixture(autouse=True)
def folder(elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a policy, named by the settings."""
    (tmp_path / "policy.toml").write_text(POLICY)
    key = jwk.ECKey.generate_key("P-256", {"kid": "one"})
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key.as_dict(private=False)]}))
    monkeypatch.setenv("ARTIFACT_STORE_POLICY", "policy.toml")
    monkeypatch.setenv("ARTIFACT_STORE_TOKENS", "tokens.json")
    return tmp_path


def call(*arguments: str, code: int = 0, **options: Any) -> Result:
    done = CliRunner().invoke(main, arguments, **options)
    assert done.exit_code == code, done.output
    return done


def shown(*arguments: str, **options: Any) -> Any:
    return json.loads(call(*arguments, "--json", **options).stdout)


def test_a_token_is_made_shown_once_listed_and_revoked(folder: Path) -> None:
    made = shown(
        "tokens", "create", "robot", "--can", "read", "--can", "write", "--producer", "team-*", "--expires", "1"
    )
    assert made["token"].startswith("artst_")
    assert made["can"] == ["read", "write"]
    gate = Authenticator(tokens=folder / "tokens.json")
    principal = asyncio.run(gate.authenticate(f"Bearer {made['token']}"))
    assert principal.actor == "token:robot"
    listed = call("tokens", "list", "--json").stdout
    assert made["token"] not in listed
    assert json.loads(listed) == {name: value for name, value in made.items() if name != "token"}
    assert "robot" in call("tokens", "list").stdout
    assert shown("tokens", "revoke", made["id"]) == {"revoked": [made["id"]]}
    assert call("tokens", "list").stdout == ""
    call("tokens", "revoke", made["id"], code=1)


def test_the_audit_stream_has_who_made_and_revoked_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("tokens", "create", "unrecorded", "read")
    monkeypatch.setenv("ARTIFACT_STORE_AUDIT_FILE", "audit.jsonl")
    token = shown("tokens", "create", "robot", "read")["token"]
    call("tokens", "revoke", "robot")
    call("tokens", "revoke", "robot", code=1)  # there is none any more
    text = (folder / "audit.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [(one["action"], one["target"]) for one in found] == [("tokens create", "robot"), ("tokens revoke", "robot")]
    assert {one["principal"] for one in found} == {local_actor()}
    assert token not in text


@pytest.mark.parametrize("rights", [["--can", "read,write"], ["--can", "read", "write"]])
def test_rights_may_be_given_together(rights: list[str]) -> None:
    assert shown("tokens", "create", "robot", *rights)["can"] == ["read", "write"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["create", "robot", "--can", "fly"], "known are read, write"),
        (["create", "no name", "--can", "read"], "name: a name has"),
        (["create", "robot", "--can", "read", "--producer", ""], "producers: an empty pattern"),
        (["create", "robot", "--can", "read", "--expires", "0"], "--expires"),
    ],
)
def test_a_token_that_makes_no_sense_is_wrong_usage(arguments: list[str], cause: str, folder: Path) -> None:
    assert cause in call("tokens", *arguments, code=2).stderr
    assert not (folder / "tokens.json").exists()


def test_tokens_need_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTIFACT_STORE_TOKENS")
    assert "ARTIFACT_STORE_TOKENS" in call("tokens", "list", code=2).stderr


def test_a_valid_policy_is_counted() -> None:
    assert shown("policy", "check") == {"valid": True, "issuers": 1, "rules": 2, "principals": 1}


BROKEN = {
    "no TOML": ("[[issuer]\n", "it is not TOML: "),
    "endless number": (f"a = {'9' * 5_000}\n", "it is not TOML: "),
    "unknown key": (
        POLICY.replace("audience =", "audiences ="),
        "[[issuer]] 1 (line 2), audience: this key is missing",
    ),
    "unknown key of a rule": (POLICY + "actor = 1\n", "[[principal]] 1 (line 19), actor: there is no such key"),
    "unknown table": (POLICY + "[[rules]]\n", "rules: there is no such key"),
    "wrong type": (POLICY.replace('"ci"\nurl', "7\nurl"), "[[issuer]] 1 (line 2), alias: "),
    "unknown right": (POLICY.replace('"operate"', '"rule"'), "[[rule]] 2 (line 14), can: 'rule' is no right"),
    "no claims": (POLICY.replace('{ sub = "admin" }', "{}"), "[[rule]] 2 (line 14), claims: "),
    "claim that is a number": (POLICY.replace('"store"', "7"), "claims: kubernetes.namespace must be a text"),
    "empty pattern": (POLICY.replace('"shared"', '""'), "claims: repository: an empty pattern"),
    "many stars": (POLICY.replace("team-*", "*a" * 9), "producers.1: a pattern may have at most 8"),
    "plain http": (POLICY.replace("https:", "http:"), "url: it must be https"),
    "no URL": (POLICY.replace("https://issuer.example", "https://[::1"), "url: it is no URL"),
    "HMAC": (POLICY.replace("jwks", 'algorithms = ["HS256"]\njwks'), "algorithms: 'HS256' is not accepted"),
    "none": (POLICY.replace("jwks", 'algorithms = ["none"]\njwks'), "algorithms: 'none' is not accepted"),
    "reserved alias": (POLICY.replace('"ci"', '"local"'), "alias: local, token are reserved aliases"),
    "alias twice": (POLICY + POLICY.split("[[rule]]")[0], "[[issuer]] 2 (line 23): alias 'ci' comes twice"),
    "unknown issuer": (POLICY.replace('"ci"\nclaims = { sub', '"cd"\nclaims = { sub'), "there is no issuer 'cd'"),
    "client that is no audience": (POLICY.replace("jwks", 'client_id = "cli"\njwks'), "client_id must be one of"),
    "authorities that are not there": (POLICY.replace("jwks", 'ca = "ca.pem"\njwks'), "ca.pem cannot be used"),
    "authorities that are no PEM": (POLICY.replace("jwks", 'ca = "policy.toml"\njwks'), "policy.toml cannot be used"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_policy_is_refused_by_file_and_place(kind: str, folder: Path) -> None:
    text, cause = BROKEN[kind]
    (folder / "policy.toml").write_text(text)
    for arguments in (["policy", "check"], ["policy", "check", "policy.toml"]):
        message = call(*arguments, code=2).stderr
        assert "policy.toml is invalid: " in message
        assert cause in message


def test_a_policy_that_is_not_there_or_too_large_is_refused(folder: Path) -> None:
    assert "No such file" in call("policy", "check", "none.toml", code=2).stderr
    (folder / "policy.toml").write_text("#" * (257 << 10))
    assert "larger than 256 KiB" in call("policy", "check", code=2).stderr


def test_explain_says_which_rules_match_and_why_others_do_not() -> None:
    claims = {"iss": "https://issuer.example", "sub": "x", "repository": "team/a", "kubernetes": {"namespace": "store"}}
    found = shown("policy", "explain", "--claims", json.dumps(claims))
    assert found["actor"] == "ci:x"
    assert [(one["number"], one["matches"], one["why_not"]) for one in found["entries"]] == [
        (1, True, None),
        (2, False, "the claim sub does not match"),
    ]
    assert found["rights"] == ["read", "write"]
    there = shown("policy", "explain", "--claims", json.dumps(claims), "--producer", "team-a", "--subject", "s")
    elsewhere = shown("policy", "explain", "--claims", json.dumps(claims), "--producer", "other", "--subject", "s")
    assert (there["rights"], elsewhere["rights"]) == (["read", "write"], [])
    claims["kubernetes"] = {"namespace": "other"}
    assert shown("policy", "explain", "--claims", json.dumps(claims))["entries"][0]["why_not"] == (
        "the claim kubernetes.namespace does not match"
    )
    text = call("policy", "explain", "--issuer", "ci", "--claims", '{"sub": "admin"}').stdout
    assert "rights: operate" in text
    assert "[[rule]] 1  does not match: the claim repository does not match" in text


def test_explain_takes_a_token_or_the_name_of_a_static_one(folder: Path) -> None:
    from joserfc import jwt

    key = jwk.OctKey.generate_key(256)
    token = jwt.encode({"alg": "HS256"}, {"iss": "https://issuer.example", "sub": "admin"}, key)
    found = shown("policy", "explain", "--token", "-", input=token + "\n")
    assert (found["actor"], found["rights"]) == ("ci:admin", ["operate"])
    assert shown("policy", "explain", "--name", "backup")["rights"] == ["read"]
    assert shown("policy", "explain", "--name", "other")["rights"] == []
    for wrong in ([], ["--claims", "{}"], ["--issuer", "x", "--claims", "{}"], ["--name", "a", "--issuer", "ci"]):
        call("policy", "explain", *wrong, code=2)
    bad = call("policy", "explain", "--token", "-", input="sesame.open.now", code=2)
    assert "sesame" not in bad.output


def doctor() -> dict[str, Any]:
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]
    return next(one for one in found if one["part"] == "identity")


def test_doctor_looks_at_policy_and_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor() == {"part": "identity", "ok": True, "cause": "1 issuers, 2 rules, 0 static tokens"}
    call("tokens", "create", "robot", "--can", "read")
    (folder / "tokens.json").chmod(0o640)
    assert "chmod 600" in doctor()["cause"]
    (folder / "tokens.json").chmod(0o600)
    (folder / "policy.toml").write_text(
        POLICY.replace('jwks = "keys.json"\n', "").replace("https://issuer.example", "http://127.0.0.1:1")
    )
    assert "the keys of issuer ci cannot be had" in doctor()["cause"]
    (folder / "policy.toml").write_text("x = 1")
    assert "there is no such key" in doctor()["cause"]
    monkeypatch.delenv("ARTIFACT_STORE_POLICY")
    monkeypatch.delenv("ARTIFACT_STORE_TOKENS")
    assert "may do everything" in doctor()["cause"]


def test_on_embedded_parts_the_actor_is_the_local_user_unless_another_is_named(folder: Path) -> None:
    about = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
    call("push", "policy.toml", *about)
    call("push", "policy.toml", *about, "--actor", "ada")
    actors = [json.loads(line)["actor"] for line in call("tail", "--json").stdout.splitlines()]
    me = shown("whoami")["actor"]
    assert me.startswith("local:")
    assert actors == [me] * 3 + ["ada"] * 3
