"""Dependencies point one way, as in the table of docs/architecture.md, and the core does no I/O."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
OURS = frozenset({"artifact_store", "schemas", "services", "ingest_gateway", "projector"})
NOT_SHIPPED = frozenset({"tests", "benchmarks"})
OUTWARDS = ("services.cli", "services.wiring")
"""The command line and the wiring, which alone may import outwards."""

# fmt: off
IO_MODULES = frozenset({
    "aiohttp", "aiosqlite", "asyncio", "asyncpg", "confluent_kafka", "datetime", "fcntl", "http", "io", "logging",
    "minio", "multiprocessing", "os", "pathlib", "prometheus_client", "queue", "random", "secrets", "select",
    "selectors", "shutil", "signal", "socket", "sqlalchemy", "sqlite3", "ssl", "subprocess", "sys", "tempfile",
    "threading", "time", "urllib", "urllib3", "zoneinfo",
})
"""What reads or writes anything, the clock and random sources included: not for the core."""

PURE_OF_THE_CLIENT = (
    "artifact_store.canonical",
    "artifact_store.errors",
    "artifact_store.events",
    "artifact_store.manifest",
    "artifact_store.models",
    "artifact_store.position",
    "artifact_store.rules",
)
"""The modules of `artifact_store` that do no I/O, which the core and the log's language may import."""

PURE_OF_OURS = (*PURE_OF_THE_CLIENT, "schemas", "services.core")
"""What the core may import of ours: none of it does I/O."""

SERVER_ONLY = frozenset({
    "aiosqlite", "asyncpg", "click", "confluent_kafka", "dotenv", "fastavro", "ingest_gateway", "minio", "projector",
    "prometheus_client", "rich", "schemas", "services", "sqlalchemy", "uvloop",
})
# fmt: on
"""What a program that only talks to a gateway neither needs nor has."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of one of our packages."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> set[str]:
    """Dotted names that the module imports, wherever in the file; relative ones made absolute."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        match node:
            case ast.Import():
                found.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=module, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                source = ".".join([*above, *([module] if module else [])])
                found.update({source, *(f"{source}.{alias.name}" for alias in node.names)})
    return found


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether the module is one of these packages or below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def documented() -> dict[str, tuple[str, ...]]:
    """What each module or package of the table in docs/architecture.md may import, itself and its row's others too."""
    found: dict[str, tuple[str, ...]] = {}
    for where, permitted in re.findall(r"^\| (`.*?) \| .* \| (.*) \|$", ARCHITECTURE, re.MULTILINE):
        row = tuple(name.strip("/").removesuffix(".py").replace("/", ".") for name in re.findall(r"`(.*?)`", where))
        names = re.findall(r"`(.*?)`", permitted)
        allowed = tuple(name if name.split(".")[0] in OURS else f"services.{name}" for name in names)
        found |= dict.fromkeys(row, tuple(OURS) if permitted == "everything" else (*row, *allowed))
    return found


ALLOWED = documented()
FILES = tuple(name for name, _ in modules("services") if name.count(".") == 1 and name not in ALLOWED)
TOOLS = (*FILES, "services.runtime")
"""The files in `services/` that are no part of their own, and what every process needs."""

TOOLLESS = ("artifact_store", "schemas")
"""The packages that import nothing of `services`, not even those files."""


def test_the_table_names_what_is_there_and_every_folder() -> None:
    there = {name for package in OURS for name, _ in modules(package)}
    assert {name for allowed in ALLOWED.values() for name in allowed} - there == set()
    assert [name for name in FILES if (ROOT / name.replace(".", "/")).is_dir()] == []


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_module_imports_only_what_the_table_lets_it(package: str) -> None:
    wrong = []
    for name, path in modules(package):
        row = next((part for part in ALLOWED if within(name, (part,))), None)
        allowed = (*(ALLOWED[row] if row else ("artifact_store", "schemas")), *(() if package in TOOLLESS else TOOLS))
        wrong += [
            f"{name} imports {imported}"
            for imported in imports(name, path)
            if imported.split(".")[0] in OURS and imported != "services" and not within(imported, allowed)
        ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(OURS))
def test_no_package_imports_the_tests(package: str) -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules(package)
        for imported in imports(name, path)
        if imported.split(".")[0] in NOT_SHIPPED
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["ingest_gateway"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    there = dict(modules(package))
    graph = {name: imports(name, path) & there.keys() for name, path in there.items()}
    for name in graph:
        graph[name] -= {name, *(above for above in there if name.startswith(f"{above}."))}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a circle


def test_only_the_command_line_and_outer_packages_import_the_wiring() -> None:
    allowed = ("services.cli", "services.registry", "services.wiring", "ingest_gateway", "projector")
    wrong = [
        name
        for package in OURS
        for name, path in modules(package)
        if not within(name, allowed) and any(within(imported, OUTWARDS) for imported in imports(name, path))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "harmless"),
    [
        ("services.core", set()),
        # Times that it is given are formatted, bytes in memory are read, and the catalogue can be printed as a command.
        ("schemas", {"datetime", "io", "sys"}),
        *((module, set[str]()) for module in PURE_OF_THE_CLIENT),
    ],
)
def test_the_core_and_its_language_do_no_io(package: str, harmless: set[str]) -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules(package.split(".")[0])
        if within(name, (package,))
        for imported in imports(name, path)
        if imported.split(".")[0] in IO_MODULES - harmless
    ]
    assert wrong == []


def test_the_core_imports_nothing_of_ours_that_does_io() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules("services")
        if within(name, ("services.core",))
        for imported in imports(name, path)
        if imported.split(".")[0] in OURS and imported != "services" and not within(imported, PURE_OF_OURS)
    ]
    assert wrong == []


def test_the_language_of_the_log_imports_nothing_of_the_client_that_does_io() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules("schemas")
        for imported in imports(name, path)
        if within(imported, ("artifact_store",)) and imported != "artifact_store"
        if not within(imported, PURE_OF_THE_CLIENT)
    ]
    assert wrong == []


def test_what_both_logs_can_use_imports_no_adapter() -> None:
    shared = ("services.log.port", "services.log.records", "services.log.sequencer")
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules("services/log")
        if within(name, (*shared, "services.log.state"))
        for imported in imports(name, path)
        if within(imported, ("services.log.kafka", "services.log.sqlite", "confluent_kafka"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "busy"),
    [
        ("artifact_store", "client.client"),
        ("services.log", "kafka.writer"),
        ("services.views", "engine.apply"),
        ("projector", "rebuild"),
    ],
)
def test_no_modules_of_a_package_import_each_other_in_a_circle(package: str, busy: str) -> None:
    there = {name: path for name, path in modules(package.replace(".", "/")) if path.name != "__init__.py"}
    graph = {name: imports(name, path) & there.keys() for name, path in there.items()}
    assert graph[f"{package}.{busy}"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_a_file_s_name_says_which_file_it_is() -> None:
    """Adapters of one port have files of the same names, and ports and drivers are called that everywhere."""
    adapters = ("services.log.kafka", "services.log.sqlite")
    public = "services.manifest"  # which programs import beside `artifact_store.manifest`
    places: dict[str, set[str]] = {}
    for name, path in (found for package in OURS for found in modules(package)):
        if path.stem not in ("__init__", "__main__", "port", "driver", "errors") and name != public:
            folder = "services.log" if within(name, adapters) else name.rpartition(".")[0]
            places.setdefault(path.stem, set()).add(folder)
    assert {name: folders for name, folders in places.items() if len(folders) > 1} == {}


def test_the_folders_of_unit_tests_are_those_of_what_they_test() -> None:
    """Two are of their own: `project` tests documents and structure, `harness` what tests and benchmarks run on."""
    there = {name.removeprefix("services.") for package in OURS for name, _ in modules(package)}
    folders = {name for name, path in modules("tests/unit") if path.name == "__init__.py"} - {"tests.unit"}
    assert {name.removeprefix("tests.unit.") for name in folders} - there == {"project", "harness"}


def test_the_client_loads_nothing_that_only_the_server_needs() -> None:
    names = sorted(name for name, _ in modules("artifact_store"))
    code = (
        "import importlib, json, sys, artifact_store\n"
        "for name in artifact_store.__all__: getattr(artifact_store, name)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout))
    assert loaded & SERVER_ONLY == set()
    assert {"aiohttp", "artifact_store", "pydantic"} <= loaded


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    module = tmp_path / "decide.py"
    module.write_text(
        "import os.path as p\nfrom . import state\nfrom .. import errors\nfrom ..log.port import Log\n"
        "def late():\n    from projector import replay\n"
    )
    found = imports("services.core.decide", module)
    assert {"os.path", "services.core.state", "services.errors", "services.log.port", "projector.replay"} <= found
