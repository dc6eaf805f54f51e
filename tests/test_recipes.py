"""The commands of the pages can be pasted, and those for the embedded default are run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import started

from finqa.runtime.paths import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SCRIPTS = [REPOSITORY / "main.py", REPOSITORY / "inference.py"]
for folder in ("crosscoder-model-diff", "preprocessing", "study", "mini", "benchmarks"):
    SCRIPTS += sorted((REPOSITORY / folder).rglob("*.py"))
COMMAND = re.compile(r"^ *(?:nohup |make \w+ && )?(?:python|torchrun|git|make|cd) .*", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The blocks of a page that hold commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind in ("", "bash") and COMMAND.match(block)]


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_command_has_a_placeholder_that_the_shell_would_take_for_a_redirection(path: Path):
    assert not [line for line in COMMAND.findall(path.read_text()) if re.search(r"<[\w ]+>", line)]
    assert "<HF_NAME>" not in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_read_by_the_shell(page: Path):
    for block in blocks(page):
        assert subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("page", ["README.md", "docs/reproduce.md"])
def test_every_block_for_finqa_is_followed_by_one_for_the_embedded_default(page: str):
    stages = [block for block in blocks(REPOSITORY / page) if "python " in block and "--base MODEL" not in block]
    assert len(stages) > 1
    for block, following in pairwise([*stages, ""]):
        assert "FinQA-mini" in block or "FinQA-mini" in following, block


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the tree with FinQA-mini cut to a few rows."""
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if not name.startswith(("tests/", "docs/", "benchmarks/")) and (REPOSITORY / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / name)
    for split, rows in (("train", 16), ("dev", 2), ("test", 12)):
        path = tmp_path / "data" / "FinQA-mini" / f"{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:rows]))
    return tmp_path


def paste(block: str, folder: Path) -> str:
    """Run a block as it is pasted into a shell in this copy of the tree; gives what its commands printed."""
    return started.paste(block, folder, os.environ | {"PYTHONPATH": f"{folder}:{folder / 'crosscoder-model-diff'}"})


@pytest.mark.slow
def test_the_blocks_of_the_readme_for_the_embedded_default_run(clone: Path):
    said = [paste(block, clone) for block in blocks(REPOSITORY / "README.md") if "FinQA-mini" in block]
    assert len(said) == 3
    assert "fine-tuned on dev: accuracy" in said[1] and said[1].count("\n--> ") == 2
    assert list((clone / "crosscoder-model-diff" / "results").glob("*/dashboard.html"))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["model-diff.md", "reproduce.md"])
def test_the_recipe_of_a_page_runs(page: str, clone: Path):
    [recipe] = [block for block in blocks(REPOSITORY / "docs" / page) if "--dataset FinQA-mini" in block]
    paste(recipe, clone)
