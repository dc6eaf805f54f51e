"""The two recipes see the same rows, begin at the same loss, and are compared record by record."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

import benchmarks.bench_recipes as bench
from finqa.answers import RULES
from finqa.errors import UserError
from finqa.evaluation import write_results
from finqa.manifest import write_json
from finqa.paths import Folders
from finqa.records import TeacherRow, write_teacher_rows
from finqa.scoring.predictions import Prediction
from finqa.students import is_student
from finqa.training import TrainingConfig, fine_tune

ROWS, SEED = 84, 5


def prediction(number: int, right: bool) -> Prediction:
    verdicts = dict.fromkeys(RULES, right)
    return Prediction(
        id=f"q{number}",
        prompt_hash="",
        reply="",
        code="",
        answer=1.0,
        expected="1",
        correct=verdicts,
        error_kind=None,
        error_message="",
        n_prompt_tokens=9,
        n_new_tokens=3,
        finish_reason="stop",
        program_steps=None,
        teacher_solved=True,
        family="f",
        family_kind="new",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Both students of one seed, trained on short rows, each with an evaluation of ten questions."""
    path = tmp_path_factory.mktemp("recipes")
    folders = Folders(data=path / "data", results=path / "results")
    rows = [
        TeacherRow(f"###Question:\nsales {'and ' * (n % 9)}{n} ?\n###Python", f"ans = {n}", f"{n}", f"{n}", id=f"r{n}")
        for n in range(ROWS)
    ]
    write_teacher_rows(folders.filtered(bench.DATASET, "train"), rows)
    config = TrainingConfig(seed=SEED, max_rows=ROWS)
    bench.train_plainly(bench.student("plain", SEED, ROWS), config, folders)
    fine_tune(bench.student("project", SEED, ROWS), config, folders)
    for recipe, right in (("plain", range(0, 6)), ("project", range(3, 10))):
        where = bench.evaluation(bench.student(recipe, SEED, ROWS), folders)
        write_results(where, [prediction(n, n in right) for n in range(10)], {"generate": 1, "run": 1})
        write_json(where / "run.json", {})
    return folders


@pytest.mark.slow
def test_the_plain_recipe_sees_the_rows_of_the_project_and_starts_where_it_starts(folders: Folders):
    plain, project = (
        bench.read_log(folders.model(bench.DATASET, bench.student(recipe, SEED, ROWS).model_id))
        for recipe in bench.RECIPES
    )
    assert [r["tokens_seen"] for r in plain] == [r["tokens_seen"] for r in project]
    assert plain[-1]["step"] == 10
    assert plain[0]["loss"] == pytest.approx(project[0]["loss"], rel=1e-2)
    assert plain[0]["grad_norm"] == pytest.approx(project[0]["grad_norm"], rel=5e-2)
    assert plain[-1]["loss"] < plain[0]["loss"] - 1
    folder = folders.model(bench.DATASET, bench.student("plain", SEED, ROWS).model_id)
    assert is_student(folder) and json.loads((folder / "run.json").read_text())["attention"] != "block_causal"


@pytest.mark.slow
def test_what_is_reported_follows_from_logs_and_answers(folders: Folders, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "main_py", lambda *words: None)  # both are trained and evaluated
    args = Namespace(rows=ROWS, test_rows=None, seeds=[SEED], output_dir=tmp_path)
    found = {recipe: bench.measure(recipe, SEED, args, folders) for recipe in bench.RECIPES}
    assert (found["plain"]["accuracy"], found["project"]["accuracy"]) == (0.6, 0.7)
    found["pair"] = bench.pair(SEED, ROWS, folders)
    assert (found["pair"]["only_plain_right"], found["pair"]["only_project_right"]) == (3, 4)
    losses = [[record["loss"] for record in found[recipe]["log"]] for recipe in bench.RECIPES]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert found["pair"]["largest_loss_apart"] == pytest.approx(max(apart), abs=1e-6)
    table = bench.report({str(SEED): found}, args)
    assert f"seed {SEED}, plain" in table and "| 60.0% [" in table
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "recipes.json").read_text())["by_seed"][str(SEED)]["pair"] == found["pair"]


@pytest.mark.slow
def test_logs_of_other_rows_are_not_compared(folders: Folders, tmp_path: Path):
    log = folders.model(bench.DATASET, bench.student("plain", SEED, ROWS).model_id) / bench.LOG_FILE
    whole = log.read_text()
    try:
        log.write_text(whole.replace('"step": 10', '"step": 9'))
        with pytest.raises(UserError, match="did not see the same rows"):
            bench.pair(SEED, ROWS, folders)
    finally:
        log.write_text(whole)
