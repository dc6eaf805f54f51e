"""What make sets up, whatever the shell that it is called from; the lock file and the citation."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from itertools import chain
from typing import Any

import pytest

from finqa.runtime.paths import REPOSITORY

PUBLIC_INDEXES = {"pypi.org", "files.pythonhosted.org", "download.pytorch.org"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_packages_go_into_the_project_s_environment_where_another_one_is_active():
    shown = ["make", "--no-print-directory", "--eval", "shown: ; @echo $$VIRTUAL_ENV", "shown"]
    elsewhere = os.environ | {"VIRTUAL_ENV": "/elsewhere"}
    told = subprocess.run(shown, cwd=REPOSITORY, env=elsewhere, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(REPOSITORY / ".venv")


def test_every_address_in_the_lock_file_is_public():
    hosts = set(re.findall(r"\w+://([^/\"]+)", (REPOSITORY / "uv.lock").read_text()))
    assert hosts and hosts <= PUBLIC_INDEXES


def test_the_lock_file_was_made_from_the_requirements_of_pyproject_toml(project: dict[str, Any]):
    packages = tomllib.loads((REPOSITORY / "uv.lock").read_text())["package"]
    [own] = [package for package in packages if package["name"] == project["name"]]
    asked = {(entry["name"], entry.get("specifier", "")) for entry in own["metadata"]["requires-dist"]}
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert asked == {named(requirement) for requirement in listed}
    assert own["version"] == project["version"]


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_make_installs_the_versions_of_the_lock_file(machine: str):
    dry = ["make", "--no-print-directory", "-n", f"install-{machine}"]
    steps = subprocess.run(dry, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    export = next(step for step in steps if step.startswith("uv export"))
    assert "--frozen" in export and f"--extra {machine}" in export and export.endswith("--output-file .venv/locked.txt")
    assert "--constraint .venv/locked.txt" in steps[-1] and f".[{machine},dev]" in steps[-1]


def named(requirement: str) -> tuple[str, str]:
    """`huggingface_hub>=1.0; marker` -> its name as indexes write it, and what it says of the version."""
    name, version = re.fullmatch(r"([\w.-]+?)((?:[<>=!~].*)?)", requirement.partition(";")[0].strip()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def test_the_citation_has_the_project_s_version_and_licence(project: dict[str, Any]):
    cited = dict(re.findall(r"^([\w-]+): (.+)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    readme = (REPOSITORY / "README.md").read_text()
    assert f"version = {{{project['version']}}}" in readme and project["name"] in readme


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ((), "python -m study.pocket"),
        (("QUICK=1",), "python -m study.pocket --quick"),
        (("MODEL=a/b", "QUICK=1"), 'python -m study.invented --model "a/b" --data-dir "data" --quick'),
    ],
)
def test_make_study_runs_the_study_that_is_asked_for(given: tuple[str, ...], command: str):
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "study", *given],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.splitlines()[-1].strip() == command
