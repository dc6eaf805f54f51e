"""The tree stays one that a stranger can draw: no import circle, no crowded folder, no long module."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from finqa.runtime.paths import REPOSITORY

FOLDERS = {"": REPOSITORY, "crosscoder": REPOSITORY / "crosscoder-model-diff"}
PACKAGES = ("finqa", "preprocessing", "mini", "study", "benchmarks", "crosscoder")
RECORDS = ("tests/", "data/", "docs/reference/", "benchmarks/results/")
"""Tests, rows and what was measured: not where a reader looks for code."""
MOST_FILES, MOST_LINES = 12, 320


def tracked() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git here")
    return [name for name in listed.splitlines() if (REPOSITORY / name).exists()]


def modules() -> dict[str, Path]:
    """Every module of the packages by its name."""
    found = {}
    for package in PACKAGES:
        folder = FOLDERS.get(package, REPOSITORY)
        for path in sorted((folder / package).rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that one imports, in whatever place: those for type checkers and those inside functions count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= whole & known.keys() or {node.module}
    return found & known.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, the first again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := walk(other, [*above, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    assert len(known) > 100
    assert circle({name: imports(path, known) - {name} for name, path in known.items()}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_library_imports_no_script_and_no_stage():
    known = modules()
    for name, path in known.items():
        stage = name.partition(".")[0]
        allowed = {
            "finqa": {"finqa"},
            "preprocessing": {"finqa", "preprocessing"},
            "crosscoder": {"finqa", "crosscoder"},
        }
        if stage in allowed:
            assert {other.partition(".")[0] for other in imports(path, known)} <= allowed[stage], name


def test_no_folder_is_crowded():
    names = [name for name in tracked() if not name.startswith(RECORDS)]
    crowded = {folder: n for folder, n in Counter(str(Path(name).parent) for name in names).items() if n > MOST_FILES}
    assert crowded == {}


def test_no_module_is_long():
    names = [name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")]
    lines = {name: len((REPOSITORY / name).read_text().splitlines()) for name in names}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
