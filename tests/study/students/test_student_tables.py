"""docs/finqa.md and docs/reference/finqa: no number is typed that the recorded answers do not give."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finqa.evaluation.metrics import mcnemar, wilson
from finqa.evaluation.predictions import Prediction, write_predictions
from finqa.evaluation.rows import EvalRow
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.records import Question, read_questions, write_questions
from study.markdown import BLOCK
from study.students import tables
from study.students.plan import MAIN, METHODS, Plan, dictionary_name, short
from study.students.results import judged_again, manifests, read_results

FIGURES = tables.read_metrics(tables.REFERENCE)
PUBLISHED = re.compile(r"## Published figures.*?(?=\n## )", re.DOTALL)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[dict[str, str]]]:
    """The lines of the recorded answers, by split."""
    found = {}
    for path in tables.REFERENCE.glob("predictions_*.csv.gz"):
        text = gzip.decompress(path.read_bytes()).decode()
        found[path.name.removeprefix("predictions_").removesuffix(".csv.gz")] = list(csv.DictReader(io.StringIO(text)))
    return found


def verdicts(answers: dict[str, list[dict[str, str]]], evaluation: dict[str, Any]) -> list[str]:
    words = (evaluation["student"], evaluation["run"], evaluation["evaluation"])
    return [row[f"{' '.join(filter(None, words))}: verdict"] for row in answers[evaluation["split"]]]


def test_every_accuracy_is_that_of_the_recorded_answers(answers: dict[str, list[dict[str, str]]]):
    assert len(FIGURES["evaluations"]) > 10
    for evaluation in FIGURES["evaluations"]:
        found, metrics = verdicts(answers, evaluation), evaluation["metrics"]
        strict, n = found.count("strict"), len(found)
        assert metrics["n"] == n
        assert metrics["accuracy"] == strict / n
        assert metrics["accuracy_relaxed"] == (strict + found.count("relaxed")) / n
        assert metrics["accuracy_interval"] == pytest.approx(wilson(strict, n))


def test_the_main_student_was_evaluated_in_all_three_ways_on_the_whole_test_split():
    for evaluation in ("zero-shot", "few-shot", "fine-tuned"):
        found = tables.metrics_of(FIGURES, short(MAIN), "", "test", evaluation)
        assert found is not None and found["n"] == 1147


def test_paired_tests_are_those_of_the_recorded_answers(answers: dict[str, list[dict[str, str]]]):
    for test in FIGURES["paired"]:
        right = ("strict",) if test["rule"] == "strict" else ("strict", "relaxed")
        first, second = (
            [verdict in right for verdict in verdicts(answers, {**test, "evaluation": test[name]})]
            for name in ("first", "second")
        )
        only_first = sum(a and not b for a, b in zip(first, second, strict=True))
        only_second = sum(b and not a for a, b in zip(first, second, strict=True))
        assert (test["only_first"], test["only_second"]) == (only_first, only_second)
        assert test["p"] == pytest.approx(mcnemar(only_first, only_second))


def test_the_tables_of_the_page_are_those_of_the_figures():
    text = tables.PAGE.read_text()
    assert tables.fill(text, tables.REFERENCE) == text


def test_every_figure_in_the_prose_is_in_a_table():
    text = tables.PAGE.read_text()
    shown = set(re.findall(r"\d+\.\d", "".join(block[3] for block in BLOCK.finditer(text))))
    readme = (tables.PAGE.parents[1] / "README.md").read_text()
    about_finqa = readme.split("<!-- figures of docs/finqa.md -->")[1]
    prose = BLOCK.sub("", PUBLISHED.sub("", text)) + about_finqa
    said = set(re.findall(r"(?<![\d.v])(\d{2}\.\d)(?!\d)", re.sub(r"```.*?```", "", prose, flags=re.DOTALL)))
    assert said and said <= shown


def test_no_text_of_a_question_and_no_folder_of_a_machine_is_recorded(answers: dict[str, list[dict[str, str]]]):
    cells = {cell for rows in answers.values() for row in rows for name, cell in row.items() if name.endswith("answer")}
    assert all(re.fullmatch(r"|yes|no|-?[\d.]+(e[+-]\d+)?", cell) for cell in cells)
    text = (tables.REFERENCE / "manifests.json").read_text()
    assert not re.search(r'["\s](/[\w.-]+){2,}', text)


def test_what_is_recorded_is_small():
    files = [path.stat().st_size for path in tables.REFERENCE.glob("predictions_*")]
    assert sum(files) < 1_000_000


# --- From results to tables -------------------------------------------------------------------------------------------


def prediction(id: str, answer: float | None, **other: Any) -> Prediction:
    none: dict[str, Any] = {
        "prompt_hash": "", "reply": "", "code": "", "expected": "", "error_message": "", "n_prompt_tokens": 1,
        "n_new_tokens": 1, "finish_reason": "stop", "program_steps": None, "teacher_solved": None,
        "correct": {"strict": False, "relaxed": False, "reported": False}, "error_kind": None,
    }  # fmt: skip
    return Prediction(id=id, answer=answer, **none | other)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two questions on each split, and one run of the main student, zero-shot and fine-tuned."""
    plan = Plan(Folders(tmp_path / "data", tmp_path / "results"), tmp_path / "dictionaries")
    questions = [
        Question(id, "", "", [["", "2009"], ["sales", "4"]], "what percent?", label, "divide(1, 4)", stated_answer=said)
        for id, label, said in (("a", "0.25", "25%"), ("b", "0.5", "70%"))
    ]
    for split in ("dev", "test"):
        write_questions(plan.folders.clean("FinQA", split), questions)
        for evaluation, replies in (("zero-shot", (25.0, None)), ("fine-tuned", (0.25, 0.5))):
            folder = plan.folders.evaluation("FinQA", f"{short(MAIN)}-peftq_proj-bs8-ne3", split, evaluation)
            folder.mkdir(parents=True)
            rows = [prediction(id, answer) for id, answer in zip("ab", replies, strict=True)]
            write_predictions(folder, [replace(r, error_kind=None if r.answer else "no-answer") for r in rows])
            (folder / "metrics.json").write_text('{"n": 2}')
            (folder / "run.json").write_text(json.dumps({"data": {"/some/where/finqa_test.csv": "0"}, "seed": 3}))
    trained = plan.folders.model("FinQA", f"{short(MAIN)}-peftq_proj-bs8-ne3")
    trained.mkdir(parents=True)
    (trained / "run.json").write_text(json.dumps({"rows": 7, "data": {"/some/where/else.csv": "0"}}))
    return plan


def test_answers_are_judged_again_by_the_rules_of_today(plan: Plan):
    zero_shot, fine_tuned = [one for one in read_results(plan) if one.split == "test"]
    assert [p.correct["relaxed"] for p in zero_shot.predictions] == [True, False]
    assert [p.correct["strict"] for p in zero_shot.predictions] == [False, False]
    assert [p.correct["strict"] for p in fine_tuned.predictions] == [True, True]
    assert [p.label_disputed for p in fine_tuned.predictions] == [False, True]
    assert {p.answer_kind for p in fine_tuned.predictions} == {"per cent"}


def test_a_row_that_is_judged_again_takes_its_label_from_the_data():
    row = EvalRow("a", "prompt\n###Question:\nhow much?\n###Python", "3", "add(1, 2)", None)
    found = judged_again(prediction("a", 3.0, expected="4"), row)
    assert (found.expected, found.correct["strict"], found.program_steps) == ("3", True, 1)


def test_a_reference_is_written_and_its_page_filled(plan: Plan, tmp_path: Path):
    for folder in (plan.folders.results / "FinQA", plan.folders.model("FinQA", "x").parent):
        student = folder / f"{short(MAIN)}-peftq_proj-bs8-ne3"
        shutil.copytree(student, student.with_name(f"{student.name}-named"))
    crosscoder, sae = (plan.dictionaries / dictionary_name("1k", "mlp", method) for method in METHODS)
    held = {"instruct": 0.7, "fine_tuned": 0.6, "difference": 0.5, "l0": 100.0}
    meets = {kind: {"meet": {"between": [3, 4], "shared": [5]}} for kind in ("instruct-only", "fine-tuned-only")}
    classes = {"instruct-only": 0, "shared": 10, "fine-tuned-only": 1, "between": 2}
    of_two = {"held_out": held, "classes": classes, "latent_scaling": meets}
    of_one = {"held_out": {**held, "instruct": None, "fine_tuned": None}, "classes": None, "latent_scaling": None}
    for folder, made in ((crosscoder, of_two), (sae, of_one)):
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(made | {"dead_share": 0.25, "n_held_out_documents": 3}))
    kinds = [{"kind": kind, "difference": 0.5} for kind in ("template", "passage", "table", "question", "program")]
    analysed = {"activations": {"folder": "/some/where/set"}, "explained_variance_by_kind": kinds}
    (sae / "analysis.json").write_text(json.dumps(analysed))
    (sae / "most_changed.csv").write_text("latent,example,frequency\n7,a sentence of the page,0.5\n")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end of table -->\n" for name in tables.TABLES))
    folder = tables.write_reference(plan, tmp_path / "reference", page)
    text = page.read_text()
    assert f"| {short(MAIN)} | fine-tuned | 100.0 [34.2, 100.0] |" in text
    assert "| 7 | 100.0 [34.2, 100.0] |" in text
    assert tables.NOT_RUN in text  # the search
    assert "| 1k | mlp | batchtopk | 0.700 | 0.600 | 0.500 | 100.0 | 25.0 | 0 | 1 | 2 | 3 / 3 |" in text
    assert "| 1k | mlp | difference-sae | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |" in text
    assert "| 1k | mlp | difference-sae | - | - | 0.500 | 100.0 | 25.0 | - | - | - | - / - |" in text
    assert tables.fill(text, folder) == text
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "manifests.json", "predictions_dev.csv.gz", "predictions_test.csv.gz", "accuracy.png",
        "learning_curve.png", "diff",
    }  # fmt: skip
    assert json.loads((folder / "diff/1k_mlp_difference-sae_analysis.json").read_text()) == {
        **analysed, "activations": {"folder": "set"}
    }  # fmt: skip
    assert (folder / "diff/1k_mlp_difference-sae_most_changed.csv").read_text() == "latent,frequency\n7,0.5\n"


def test_nothing_to_write_is_one_line(tmp_path: Path, plan: Plan):
    empty = Plan(Folders(plan.folders.data, tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        tables.write_reference(empty, tmp_path / "reference", tmp_path / "page.md")
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("left", [b"", b"half", b"line"])
def test_predictions_that_are_not_whole_are_named_with_a_remedy(left: bytes, plan: Plan):
    folder = plan.folders.evaluation("FinQA", f"{short(MAIN)}-peftq_proj-bs8-ne3", "dev", "fine-tuned")
    path = folder / "predictions.jsonl"
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    path.write_bytes({b"": b"", b"half": whole[:-20], b"line": whole[:first_line]}[left])
    with pytest.raises(UserError, match=r"dev/fine-tuned.*delete the run.json beside it and evaluate again"):
        read_results(plan)
    path.unlink()
    with pytest.raises(UserError, match=r"predictions.jsonl is missing"):
        read_results(plan)
    (folder / "run.json").unlink()
    assert len(read_results(plan)) == 3


def test_damaged_metrics_are_named_with_a_remedy(plan: Plan):
    folder = plan.folders.evaluation("FinQA", f"{short(MAIN)}-peftq_proj-bs8-ne3", "dev", "fine-tuned")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics.json is damaged; delete the run.json beside it"):
        read_results(plan)


def test_an_answer_to_a_row_that_is_gone_is_named(plan: Plan):
    path = plan.folders.clean("FinQA", "test")
    write_questions(path, read_questions(path)[:1])
    with pytest.raises(UserError, match=r"test/zero-shot has an answer to b, which is not in test of .*data"):
        read_results(plan)


def test_a_folder_of_another_form_is_passed_over(plan: Plan):
    (plan.folders.results / "FinQA" / f"{short(MAIN)}-peft-of-old").mkdir()
    assert len(read_results(plan)) == 4


def test_manifests_name_no_folder(plan: Plan):
    found = manifests(plan)
    assert found[short(MAIN)]["fine-tune"]["data"] == {"else.csv": "0"}
    assert found[short(MAIN)]["test/zero-shot"]["data"] == {"finqa_test.csv": "0"}
