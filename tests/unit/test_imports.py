"""Dependencies point one way, as the table of docs/architecture.md has them, and the core does no I/O."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
OURS = frozenset({"schemas", "services", "ingest_gateway", "projector"})
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
# fmt: on
"""What reads or writes anything, the clock and random sources included: not for the core."""

PURE_OF_OURS = (
    "schemas",
    "services.core",
    "services.errors",
    "services.manifest",
)
"""What the core may import of ours: none of it does I/O."""


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
        allowed = tuple(name if name in OURS else f"services.{name}" for name in names)
        found |= dict.fromkeys(row, tuple(OURS) if permitted == "everything" else (*row, *allowed))
    return found


ALLOWED = documented()
TOOLS = tuple(name for name, _ in modules("services") if name.count(".") == 1 and name not in ALLOWED)
"""The files in `services/` that are no part of their own."""


def test_the_table_names_what_is_there_and_every_folder() -> None:
    there = {name for package in OURS for name, _ in modules(package)}
    assert {name for allowed in ALLOWED.values() for name in allowed} - there == set()
    assert [name for name in TOOLS if (ROOT / name.replace(".", "/")).is_dir()] == []


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_module_imports_only_what_the_table_lets_it(package: str) -> None:
    wrong = []
    for name, path in modules(package):
        row = next((part for part in ALLOWED if within(name, (part,))), None)
        allowed = (*(ALLOWED[row] if row else ("schemas",)), *(TOOLS if package != "schemas" else ()))
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


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    module = tmp_path / "decide.py"
    module.write_text(
        "import os.path as p\nfrom . import state\nfrom .. import errors\nfrom ..log.port import Log\n"
        "def late():\n    from projector import replay\n"
    )
    found = imports("services.core.decide", module)
    assert {"os.path", "services.core.state", "services.errors", "services.log.port", "projector.replay"} <= found
