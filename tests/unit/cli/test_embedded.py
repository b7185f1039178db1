"""The commands on the embedded parts: JSON shapes, exit codes, and separate streams for results and remarks."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from artifact_store.manifest import decode
from services.cli.verify import progress_line
from services.config import Settings
from services.core import decide
from services.verify import Report
from services.views.projections import PROJECTIONS
from tests.unit.cli.conftest import Run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b.txt").write_bytes(b"hello")
    (folder / "sub" / "%41#?.csv").write_bytes(b"1,2\n")
    return folder


ABOUT = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")


@pytest.fixture
def package(run: Run, tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("push", tree, *ABOUT, "--metadata", "k=v", "--json").stdout)
    return found


def test_push_tells_what_it_made(package: dict[str, Any]) -> None:
    assert list(package) == ["package_id", "manifest_digest", "sequence", "files", "bytes"]
    assert (package["sequence"], package["files"], package["bytes"]) == (4, 2, 9)
    assert package["manifest_digest"].startswith("blake3:")


def test_push_and_finalize_warn_of_paths_that_are_one_name_elsewhere(run: Run, tree: Path) -> None:
    (tree / "A B.TXT").write_bytes(b"shout")
    pushed = run("push", tree, *ABOUT, "--json")
    assert json.loads(pushed.stdout)["unportable_count"] == 1
    (clash,) = json.loads(pushed.stdout)["unportable_paths"]
    assert sorted(clash) == ["other", "path"]
    assert sorted(clash.values()) == ["A B.TXT", "a b.txt"]
    assert "'A B.TXT'" in pushed.stderr
    package = json.loads(run("push", tree, *ABOUT, "--no-finalize", "--json").stdout)["package_id"]
    frozen = run("finalize", package)
    assert "warning: some paths differ only by case" in frozen.stderr
    assert "unportable count" in frozen.stdout


def test_pull_renames_a_file_that_lies_in_the_place_of_a_folder_if_told_to(
    run: Run, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = json.loads(run("push", tree, *ABOUT, "--no-finalize", "--json").stdout)["package_id"]
    with monkeypatch.context() as before_the_rule:
        before_the_rule.setattr(decide, "_check_tree", lambda *_: None)
        run("add", package, tree / "a b.txt", "--path", "sub")
    run("finalize", package)
    out = tmp_path / "out"
    assert "--rename" in run("pull", package, out, code=1).stderr
    pulled = json.loads(run("pull", package, out, "--rename", "--json").stdout)
    assert pulled["renamed"] == {"sub": "sub.file"}
    assert (out / "sub.file").read_bytes() == b"hello"


def test_push_without_finalizing_leaves_the_package_open(run: Run, tree: Path) -> None:
    pushed = json.loads(run("push", tree, *ABOUT, "--no-finalize", "--json").stdout)
    assert pushed["manifest_digest"] is None
    assert json.loads(run("show", pushed["package_id"], "--json").stdout)["status"] == "created"
    refused = run("pull", pushed["package_id"], "out", "--json", code=1)
    assert json.loads(refused.stderr)["type"].endswith(":illegal-package-state")


def test_an_open_package_is_filled_and_finalized_step_by_step(run: Run, tree: Path, tmp_path: Path) -> None:
    package = json.loads(run("push", tree, *ABOUT, "--no-finalize", "--json").stdout)["package_id"]
    added = json.loads(run("add", package, tree / "a b.txt", "--path", "twice.txt", "--json").stdout)
    assert (added["sequence"], added["size_bytes"]) == (4, 5)
    assert added["content_address"] == f"blake3:{blake3(b'hello').hexdigest()}"
    assert "already" in run("add", package, tree / "a b.txt", code=1).stderr
    assert "--path" in run("add", package, "-", code=2).stderr
    frozen = json.loads(run("finalize", package, "--json").stdout)
    assert frozen["sequence"] == 5
    assert "finalized" in run("finalize", package, code=1).stderr
    pulled = json.loads(run("pull", frozen["manifest_digest"], tmp_path / "out", "--json").stdout)
    assert (pulled["package_id"], pulled["files"]) == (package, 3)


@pytest.mark.parametrize("by", ["package_id", "manifest_digest"])
def test_pull_gives_the_tree_back(run: Run, tree: Path, tmp_path: Path, package: dict[str, Any], by: str) -> None:
    pulled = json.loads(run("pull", package[by], tmp_path / "out", "--json").stdout)
    assert pulled == {
        "package_id": package["package_id"],
        "manifest_digest": package["manifest_digest"],
        "files": 2,
        "bytes": 9,
        "kept": 0,
    }
    assert (tmp_path / "out" / "sub" / "%41#?.csv").read_bytes() == b"1,2\n"
    assert (tmp_path / "out" / "a b.txt").read_bytes() == b"hello"


def test_pull_warns_of_what_programs_read_unasked(run: Run, tree: Path, tmp_path: Path) -> None:
    (tree / ".envrc").write_bytes(b"rm -r ~")
    package = json.loads(run("push", tree, *ABOUT, "--json").stdout)["package_id"]
    pulled = run("pull", package, tmp_path / "back", "--json")
    assert json.loads(pulled.stdout)["read_by_programs"] == [".envrc"]
    assert "may run commands that these contain: '.envrc'" in pulled.stderr


def test_pull_does_not_replace_what_is_different_unless_it_must(
    run: Run, tmp_path: Path, package: dict[str, Any]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a b.txt").write_bytes(b"mine")
    assert "a b.txt" in run("pull", package["package_id"], tmp_path / "out", code=1).stderr
    run("pull", package["package_id"], tmp_path / "out", "--force")
    assert (tmp_path / "out" / "a b.txt").read_bytes() == b"hello"


def test_json_may_stand_before_the_command_as_well(run: Run, package: dict[str, Any]) -> None:
    assert run("--json", "packages").stdout == run("packages", "--json").stdout


def test_packages_are_one_a_line_and_can_be_chosen(run: Run, tree: Path, package: dict[str, Any]) -> None:
    run("push", tree, *ABOUT[:-1], "report", "--producer", "q")
    lines = [json.loads(line) for line in run("packages", "--json").stdout.splitlines()]
    assert [line["producer"] for line in lines] == ["q", "p"]
    assert lines[1]["package_id"] == package["package_id"]
    assert lines[1]["metadata"] == {"k": "v"}
    assert len(run("packages", "--producer", "p", "--json").stdout.splitlines()) == 1
    assert len(run("packages", "--status", "created", "--json").stdout.splitlines()) == 0
    assert len(run("packages", "--limit", "1").stdout.splitlines()) == 1


def test_usage_is_one_total_a_line_and_can_be_chosen(run: Run, tree: Path, package: dict[str, Any]) -> None:
    run("push", tree, *ABOUT[:-1], "report", "--producer", "q")
    totals = [json.loads(line) for line in run("usage", "--json").stdout.splitlines()]
    assert [(t["producer"], t["packages"], t["files"], t["bytes"]) for t in totals] == [("p", 1, 2, 9), ("q", 1, 2, 9)]
    assert list(totals[0]) == ["producer", "retention_class", "day", "packages", "files", "bytes"]
    chosen = run("usage", "--producer", "q", "--json").stdout
    assert [json.loads(line) for line in chosen.splitlines()] == totals[1:]
    assert run("usage", "--retention-class", "permanent", "--json").stdout == ""
    assert len(run("usage").stdout.splitlines()) == 2


def test_show_is_one_object_with_its_files(run: Run, package: dict[str, Any]) -> None:
    shown = json.loads(run("show", package["manifest_digest"], "--json").stdout)
    assert shown["package_id"] == package["package_id"]
    assert [file["relative_path"] for file in shown["files"]] == ["a b.txt", "sub/%41#?.csv"]
    assert "a b.txt" in run("show", package["package_id"]).stdout


def test_the_manifest_is_written_byte_for_byte(run: Run, package: dict[str, Any]) -> None:
    cbor = run("manifest", package["package_id"]).stdout_bytes
    assert [file.relative_path for file in decode(cbor).files] == ["a b.txt", "sub/%41#?.csv"]
    text = run("manifest", package["package_id"], "--format", "json").stdout
    assert text.startswith("{")
    assert '"manifest_version":1' in text
    assert run("manifest", package["package_id"], "--json").stdout == text
    assert decode(text.encode()) == decode(cbor)


def test_events_are_filtered_and_put_in_order(run: Run, tree: Path, package: dict[str, Any]) -> None:
    about = ("--name", "n", "--producer", "q", "--subject", "t", "--retention-class", "report")
    other = json.loads(run("push", tree, *about, "--json").stdout)["package_id"]

    def seen(*options: str) -> list[tuple[str, int]]:
        events = [json.loads(line) for line in run("tail", "--json", *options).stdout.splitlines()]
        return [(event["package_id"], event["sequence"]) for event in events]

    ours = package["package_id"]
    for option, value in (("--producer", "q"), ("--subject", "t"), ("--retention-class", "report")):
        assert seen(option, value) == [(other, number) for number in range(1, 5)]
    created = "v1.package.created"
    assert seen("--producer", "p", "--producer", "q", "--type", created) == [(ours, 1), (other, 1)]
    assert seen("--package", ours, "--producer", "q") == []
    assert seen("--order", "time") == seen() == seen("--since", "2000-01-01T00:00:00Z")
    assert seen("--since", "now") == []
    assert run("tail", "--order", "time", "--follow", code=2).stdout == ""
    assert run("tail", "--since", "yesterday", code=2).stdout == ""


def test_events_are_one_a_line_and_go_on_behind_a_position(run: Run, package: dict[str, Any]) -> None:
    events = [json.loads(line) for line in run("tail", "--json").stdout.splitlines()]
    assert [event["sequence"] for event in events] == [1, 2, 3, 4]
    rest = run("tail", "--json", "--since", events[1]["position"], "--package", package["package_id"]).stdout
    assert [json.loads(line)["sequence"] for line in rest.splitlines()] == [3, 4]
    for_people = run("tail")
    assert len(for_people.stdout.splitlines()) == 4
    assert events[3]["position"] in for_people.stderr
    assert run("tail", "--quiet").stderr == ""


def test_a_replay_gives_the_same_digest(run: Run, package: dict[str, Any]) -> None:
    run("packages")
    before = json.loads(run("digest", "registry", "--json").stdout)
    assert list(before) == ["projection", "digest", "position", "rows"]
    replayed = json.loads(run("replay", "registry", "--json").stdout)
    assert replayed["events"] == 4
    assert replayed["digest"] == before["digest"]
    assert json.loads(run("digest", "registry", "--json").stdout) == before


def test_verify_is_exit_code_1_when_a_blob_is_gone(run: Run, tmp_path: Path, package: dict[str, Any]) -> None:
    clean = json.loads(run("verify", "--bytes", "--json").stdout)
    assert (clean["events"], clean["violation_count"], clean["violations"]) == (4, 0, [])
    next(path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and b"hello" in path.read_bytes()).unlink()
    broken = json.loads(run("verify", "--json", code=1).stdout)
    assert broken["violation_count"] == len(broken["violations"]) > 0
    assert {"kind", "place", "detail"} == set(broken["violations"][0])


def test_verify_tells_of_bytes_only_when_it_read_them(run: Run, package: dict[str, Any]) -> None:
    assert "bytes" not in run("verify").stdout
    assert "bytes" not in json.loads(run("verify", "--json").stdout)
    assert json.loads(run("verify", "--bytes", "--json").stdout)["bytes"] > 0
    assert "bytes" in run("verify", "--bytes").stdout


def test_the_progress_of_a_verification_tells_of_blobs_and_of_bytes_and_their_rate() -> None:
    report = Report(events=1_234, blobs=3, expected_blobs=5)
    assert progress_line(report, 2.0) == "1,234 events, 3 of 5 blobs"
    report.bytes, report.expected_bytes = 3 << 20, 8 << 20
    report.add("chain", "package", "broken")
    assert progress_line(report, 2.0) == "1,234 events, 3 of 5 blobs, 3.0 of 8.0 MiB, 1.5 MiB/s, 1 violations"


def test_status_says_how_far_each_projection_is_behind(run: Run, package: dict[str, Any]) -> None:
    run("replay", "registry")
    run("replay", "retention")
    status = json.loads(run("status", "--json").stdout)
    assert {p["projection"]: p["behind"] for p in status["projections"]} == dict.fromkeys(PROJECTIONS, 0)
    assert {p["committed_behind"] for p in status["projections"]} == {None}  # nobody commits to a file
    assert status["writers"] is None
    assert "registry" in run("status").stdout


@pytest.mark.parametrize(
    ("offset", "text"), [(0, "empties the view and folds it again"), (1, "artifact-store replay registry")]
)
def test_status_says_what_a_projector_does_about_a_group_that_other_tools_have_set(
    run: Run, package: dict[str, Any], embedded_settings: Settings, offset: int, text: str
) -> None:
    run("replay", "registry")
    with closing(sqlite3.connect(embedded_settings.log_url.removeprefix("sqlite:///"))) as file, file:
        file.execute("INSERT INTO progress VALUES ('registry', 0, ?, '')", (offset,))
    found = {p["projection"]: p["group"] for p in json.loads(run("status", "--json").stdout)["projections"]}
    assert text in found.pop("registry")
    assert set(found.values()) == {None}
    assert text in run("status").stdout
    doctor = json.loads(run("doctor", "--json", code=1 if offset else 0).stdout)
    (groups,) = (finding for finding in doctor["findings"] if finding["part"] == "groups")
    assert groups["ok"] is (offset == 0)
    assert text in groups["cause"]

    run("replay", "registry")
    assert {p["group"] for p in json.loads(run("status", "--json").stdout)["projections"]} == {None}


def test_doctor_names_every_group_that_other_tools_have_set(
    run: Run, package: dict[str, Any], embedded_settings: Settings
) -> None:
    run("replay", "registry")
    run("replay", "retention")
    with closing(sqlite3.connect(embedded_settings.log_url.removeprefix("sqlite:///"))) as file, file:
        file.execute("INSERT INTO progress VALUES ('registry', 0, 1, ''), ('retention', 0, 1, '')")
    doctor = json.loads(run("doctor", "--json", code=1).stdout)
    (groups,) = (finding for finding in doctor["findings"] if finding["part"] == "groups")
    assert not groups["ok"]
    for name in ("registry", "retention"):
        assert f"artifact-store replay {name}" in groups["cause"]


def test_doctor_finds_nothing_wrong_before_and_after_the_parts_are_made(run: Run, tree: Path) -> None:
    assert json.loads(run("doctor", "--json").stdout)["ok"]
    run("push", tree, *ABOUT)
    found = json.loads(run("doctor", "--json").stdout)
    assert {finding["part"] for finding in found["findings"]} == {
        *("python", "settings", "identity", "log", "blobs", "views", "projections", "groups", "disk"),
    }


def test_doctor_names_what_is_wrong(run: Run, tmp_path: Path) -> None:
    run("migrate")
    (tmp_path / "log.db").write_bytes(b"this is no log")
    found = json.loads(run("doctor", "--json", code=1).stdout)
    wrong = {finding["part"]: finding["cause"] for finding in found["findings"] if not finding["ok"]}
    assert list(wrong) == ["log"]
    assert wrong["log"]
    assert "settings" in run("doctor", "--kafka-partitions", "0", code=1).stdout


@pytest.mark.slow
def test_doctor_says_which_setting_names_a_part_that_gives_no_answer(run: Run) -> None:
    nowhere = ("--views-url", "postgresql+asyncpg://u@127.0.0.1:1/d", "--url", "http://127.0.0.1:1")
    found = json.loads(run("doctor", *nowhere, "--json", code=1).stdout)
    wrong = {finding["part"]: finding["cause"] for finding in found["findings"] if not finding["ok"]}
    assert set(wrong) == {"views", "gateway"}
    assert wrong["views"].endswith("is it running, and is ARTIFACT_STORE_VIEWS_URL right?")
    assert wrong["gateway"].endswith("is it running, and is ARTIFACT_STORE_URL right?")


@pytest.mark.parametrize("command", [("verify", "--bytes"), ("replay", "registry")])
def test_a_command_that_takes_long_writes_metrics(
    run: Run, package: dict[str, Any], tmp_path: Path, command: tuple[str, ...]
) -> None:
    file = tmp_path / "run.prom"
    run(*command, "--metrics-file", file)
    text = file.read_text(encoding="utf-8")
    assert f'artifact_store_run_active{{run="{" ".join(command)}"}} 0.0' in text
    assert f'artifact_store_run_problems{{run="{" ".join(command)}"}} 0.0' in text
    assert f'artifact_store_run_progress_ratio{{run="{" ".join(command)}"}} 1.0' in text


def test_migrating_twice_is_harmless(run: Run) -> None:
    assert run("migrate", "--json").stdout == run("migrate", "--json").stdout


def test_migrating_names_what_must_be_replayed_and_succeeds(run: Run, tree: Path, tmp_path: Path) -> None:
    run("push", tree, *ABOUT)
    with closing(sqlite3.connect(tmp_path / "views.db")) as views, views:
        views.execute("UPDATE projection_generations SET layout = 0 WHERE projection = 'usage'")
    migrated = run("migrate", "--json")
    assert json.loads(migrated.stdout)["replay"] == ["usage"]
    assert migrated.stderr.startswith("warning: the tables of usage have layout 0")
    assert "`artifact-store replay usage`" in migrated.stderr
    assert "`artifact-store replay usage`" in run("packages", code=2).stderr
    run("replay", "usage")
    migrated = run("migrate", "--json")
    assert (json.loads(migrated.stdout)["replay"], migrated.stderr) == ([], "")


def test_nothing_is_parked(run: Run) -> None:
    run("migrate")
    assert run("parked", "--json").stdout == ""


def test_a_refusal_is_exit_code_1_and_a_problem(run: Run, tree: Path) -> None:
    refused = run("push", tree, *ABOUT[:-1], "no-such-class", "--json", code=1)
    assert refused.stdout == ""
    problem = json.loads(refused.stderr)
    assert problem["type"].endswith(":unknown-retention-class")
    assert problem["status"] == 422
    assert "unknown retention class" in problem["detail"]


@pytest.mark.parametrize("document", ['{"a": NaN}', '{"a": 1e400}', '{"a": "\\ud800"}', '{"a": 99999999999999999999}'])
def test_metadata_that_the_registry_refuses_is_refused_with_its_reason(run: Run, tree: Path, document: str) -> None:
    refused = run("push", tree, *ABOUT, "--metadata-json", document, code=1)
    assert refused.stderr.startswith("error: metadata: ")
    assert run("packages").stdout == ""


def test_a_push_that_is_interrupted_says_how_to_go_on(run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import services.registry.direct

    async def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(services.registry.direct.DirectRegistry, "finalize", interrupted)
    stopped = run("push", tree, *ABOUT, code=1)
    assert "run the same command again" in stopped.stderr
    assert stopped.stderr.endswith("error: interrupted\n")


def test_a_push_that_fails_says_how_to_go_on_and_goes_on(
    run: Run, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import services.registry.direct
    from artifact_store.errors import UnavailableError

    async def out_of_reach(*_: object, **__: object) -> None:
        raise UnavailableError("the log is out of reach")

    with monkeypatch.context() as broken:
        broken.setattr(services.registry.direct.DirectRegistry, "finalize", out_of_reach)
        failed = run("push", tree, *ABOUT, code=1)
    assert "run the same command again" in failed.stderr
    again = run("push", tree, *ABOUT, "--json")
    assert "continuing with its package" in again.stderr
    assert json.loads(again.stdout)["sequence"] == 4
    assert len(run("packages").stdout.splitlines()) == 1
    assert [path for path in (tmp_path / "state home").rglob("*") if path.is_file()] == []
