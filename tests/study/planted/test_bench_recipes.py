"""The two recipes see the same rows, begin at the same loss, and are compared record by record."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

import study.planted.bench_recipes as bench
from finqa.evaluation.evaluate import write_results
from finqa.evaluation.predictions import Prediction
from finqa.models.students import is_student
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.answers import RULES
from finqa.task.records import TeacherRow, write_teacher_rows
from finqa.training.fine_tuning import TrainingConfig, fine_tune

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


@pytest.fixture
def made_up(tmp_path: Path) -> Folders:
    """Logs and evaluations of two students of one seed: 30 updates, ten questions."""
    folders = Folders(data=tmp_path / "data", results=tmp_path / "results")
    for recipe, right, shift in (("plain", range(0, 6), 0.0), ("project", range(3, 10), 0.001)):
        run = bench.student(recipe, SEED, ROWS)
        records = [
            {"step": step, "loss": 1 / step + shift, "grad_norm": 1.0, "tokens_seen": 70 * step, "seconds": step / 2}
            for step in (1, 10, 20, 30)
        ]
        log = folders.model(bench.DATASET, run.model_id) / bench.LOG_FILE
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        (log.parent / "run.json").write_text("{}")
        where = bench.evaluation(run, folders)
        write_results(where, [prediction(n, n in right) for n in range(10)], {"generate": 1, "run": 1})
    return folders


@pytest.mark.slow
def test_the_plain_recipe_sees_the_rows_of_the_project_and_starts_where_it_starts(tmp_path: Path):
    folders = Folders(data=tmp_path)
    rows = [
        TeacherRow(f"###Question:\nsales {'and ' * (n % 9)}{n} ?\n###Python", f"ans = {n}", f"{n}", f"{n}", id=f"r{n}")
        for n in range(ROWS)
    ]
    write_teacher_rows(folders.filtered(bench.DATASET, "train"), rows)
    config = TrainingConfig(seed=SEED, max_rows=ROWS)
    bench.train_plainly(bench.student("plain", SEED, ROWS), config, folders)
    fine_tune(bench.student("project", SEED, ROWS), config, folders)
    trained = {r: folders.model(bench.DATASET, bench.student(r, SEED, ROWS).model_id) for r in bench.RECIPES}
    plain, project = (bench.read_log(trained[recipe]) for recipe in bench.RECIPES)
    assert [r["tokens_seen"] for r in plain] == [r["tokens_seen"] for r in project]
    assert plain[-1]["step"] == 11
    assert plain[0]["loss"] == pytest.approx(project[0]["loss"], rel=1e-2)
    assert plain[0]["grad_norm"] == pytest.approx(project[0]["grad_norm"], rel=5e-2)
    assert plain[-1]["loss"] < plain[0]["loss"] - 1
    assert is_student(trained["plain"])
    attention = [json.loads((trained[recipe] / "run.json").read_text())["attention"] for recipe in bench.RECIPES]
    assert attention[0] != attention[1]


def test_what_is_reported_follows_from_logs_and_answers(
    made_up: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "main_py", lambda *words: None)  # all is trained and evaluated
    args = Namespace(rows=ROWS, test_rows=None, seeds=[SEED], output_dir=tmp_path)
    found = {recipe: bench.measure(recipe, SEED, args, made_up) for recipe in bench.RECIPES}
    assert (found["plain"]["accuracy"], found["project"]["accuracy"]) == (0.6, 0.7)
    assert found["plain"]["loss_at_the_end"] == pytest.approx(1 / 30, abs=1e-5)
    found["pair"] = bench.pair(SEED, ROWS, made_up)
    assert (found["pair"]["only_plain_right"], found["pair"]["only_project_right"]) == (3, 4)
    for which in ("first", "mean", "largest"):
        assert found["pair"][f"{which}_loss_apart"] == pytest.approx(0.001, abs=1e-6)
    table = bench.report({str(SEED): found}, args)
    assert f"seed {SEED}, plain" in table and " 60.0% [" in table
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "recipes.json").read_text())["by_seed"][str(SEED)]["pair"] == found["pair"]


def test_logs_of_other_rows_are_not_compared(made_up: Folders):
    log = made_up.model(bench.DATASET, bench.student("plain", SEED, ROWS).model_id) / bench.LOG_FILE
    log.write_text(log.read_text().replace('"tokens_seen": 700', '"tokens_seen": 701'))
    with pytest.raises(UserError, match="did not see the same rows"):
        bench.pair(SEED, ROWS, made_up)
