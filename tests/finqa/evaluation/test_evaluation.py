from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MistralConfig

from finqa.evaluation.engines.caches import Extent
from finqa.evaluation.evaluate import extents, summary, write_results
from finqa.evaluation.generation import GenerationConfig, Reply, all_replies
from finqa.evaluation.judging import judge
from finqa.evaluation.metrics import compare, mcnemar, metrics, wilson
from finqa.evaluation.predictions import Prediction, read_predictions, write_predictions
from finqa.evaluation.report import write_report
from finqa.evaluation.rows import EvalRow, read_rows
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import Folders
from finqa.sandbox.results import ERROR_KINDS
from finqa.sandbox.running import Sandbox
from finqa.task.datasets import dataset
from finqa.task.records import Question, TeacherRow, write_questions, write_teacher_rows

MINI = dataset("FinQA-mini")


def row(number: int, expected: str, **more) -> EvalRow:
    return EvalRow(f"q{number}", f"prompt {number}", expected, more.pop("program", "add(1, 2)"), **more)


ROWS = [
    row(0, "3.0", teacher_solved=True, family="sum", family_kind="known"),
    row(1, "0.25", teacher_solved=True, family="share", family_kind="new", program="divide(1, 4), add(#0, 0)",
        stated_answer="25%"),
    row(2, "yes", teacher_solved=False, family="share", family_kind="new"),
    row(3, "7", teacher_solved=False, family="sum", family_kind="known", program="", stated_answer="8.5"),
    row(4, "1", teacher_solved=True, family="sum", family_kind="known"),
]  # fmt: skip
REPLIES = [
    Reply("\nans = 1 + 2\n###End Python", 10, 5, "stop"),
    Reply("```python\nans = 25.01\n```\n", 10, 9, "stop"),
    Reply("ans = 2 > 1", 10, 4, "stop"),
    Reply("ans = nothing", 10, 160, "length"),
    Reply("", 5000, 0, "prompt_too_long"),
]


def last_first(prompts: list[list[int]], done: Collection[int] = ()) -> Iterator[tuple[int, Reply]]:
    """A `Generate` that finishes with the first prompt."""
    return reversed([(place, REPLIES[place]) for place in range(len(prompts)) if place not in done])


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    with Sandbox() as sandbox:
        prompts = [[1, n] for n in range(5)]
        return judge(ROWS, prompts, all_replies(last_first, prompts), sandbox)


def test_each_reply_is_run_and_judged_under_each_rule(predictions: list[Prediction]):
    assert [p.id for p in predictions] == ["q0", "q1", "q2", "q3", "q4"]
    assert [p.answer for p in predictions] == [3.0, 25.01, True, None, None]
    assert [p.correct["strict"] for p in predictions] == [True, False, True, False, False]
    assert [p.correct["relaxed"] for p in predictions] == [True, True, True, False, False]
    assert [p.error_kind for p in predictions] == [None, None, None, "runtime", "prompt-too-long"]
    assert [p.program_steps for p in predictions] == [1, 2, 1, None, 1]
    assert [p.answer_kind for p in predictions] == ["amount", "per cent", "yes/no", "amount", "amount"]
    assert [p.label_disputed for p in predictions] == [None, False, None, True, None]
    assert len({p.prompt_hash for p in predictions}) == 5


def test_the_metrics_follow_from_the_predictions_file_alone(predictions: list[Prediction], tmp_path: Path):
    found = write_results(tmp_path, predictions, {"generate": 1.5, "run": 0.1})
    again = read_predictions(tmp_path)
    assert again == predictions
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert found["accuracy"] == sum(p.correct["strict"] for p in again) / 5 == 0.4
    assert found["accuracy_relaxed"] == 0.6
    assert found["share_runs"] == 0.6
    assert found["errors_by_kind"] == {"runtime": 1, "prompt-too-long": 1}
    assert found["accuracy_teacher_solved"] == 1 / 3 and found["n_teacher_solved"] == 3
    assert found["accuracy_by_family"] == {"share": 0.5, "sum": 1 / 3}
    assert found["by_family"]["share"]["kind"] == "new" and found["by_family"]["share"]["n"] == 2
    assert found["accuracy_by_family_kind"] == {"known": 1 / 3, "new": 0.5}
    assert found["accuracy_by_steps"] == {"1": 2 / 3, "2": 0.0}
    assert found["tokens"] == {"prompt": 5040, "new": 178}
    line = summary("zero-shot on dev", found)
    assert "accuracy 40.0% [11.8%, 76.9%] strict, 60.0% [23.1%, 88.2%] relaxed, of 5" in line
    assert "without 1 disputed labels 50.0% and 75.0%" in line


def test_both_headlines_are_given_of_groups_and_of_the_rows_whose_label_is_not_disputed(predictions: list[Prediction]):
    found = metrics(predictions)
    assert found["accuracy_by_answer_kind"] == {"amount": 1 / 3, "per cent": 0.0, "yes/no": 1.0}
    group = found["by_answer_kind"]["per cent"]
    assert (group["n"], group["accuracy"], group["accuracy_relaxed"]) == (1, 0.0, 1.0)
    assert group["accuracy_interval"] == list(wilson(0, 1)) and group["accuracy_relaxed_interval"] == list(wilson(1, 1))
    assert found["by_family"]["share"]["accuracy_relaxed"] == 1.0
    assert found["n_undisputed"] == 4
    assert (found["accuracy_undisputed"], found["accuracy_relaxed_undisputed"]) == (0.5, 0.75)
    assert found["accuracy_relaxed_undisputed_interval"] == list(wilson(3, 4))


def test_predictions_from_before_the_kind_and_the_dispute_were_recorded_are_read(
    predictions: list[Prediction], tmp_path: Path
):
    write_predictions(tmp_path, predictions)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k not in ("answer_kind", "label_disputed")} for line in lines]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    again = read_predictions(tmp_path)
    assert [(p.id, p.answer_kind, p.label_disputed) for p in again] == [(f"q{n}", "", None) for n in range(5)]
    assert not {"by_answer_kind", "n_undisputed"} & set(metrics(again))


def test_a_reply_with_text_that_no_file_can_hold_is_still_written(predictions: list[Prediction], tmp_path: Path):
    odd = Prediction(**{**predictions[0].__dict__, "reply": "half \ud800 a pair and a\u2028 separator"})
    write_results(tmp_path, [odd], {"generate": 0, "run": 0})
    assert read_predictions(tmp_path) == [odd]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, table I, method 3; and the two ends.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(right: int, n: int, low: float, high: float):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_the_exact_sign_test_of_the_rows_that_differ():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(2, 10) == mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert 0 < mcnemar(40, 900) < 1e-200
    assert not math.isnan(mcnemar(3000, 3100))


def test_two_evaluations_are_compared_on_the_rows_they_share(predictions: list[Prediction]):
    wrong = dict.fromkeys(predictions[0].correct, False)
    other = [Prediction(**{**p.__dict__, "correct": wrong}) for p in predictions[:3]]
    assert compare(predictions, other) == (3, 2, 0, 0.5)
    assert compare(other, predictions, "relaxed") == (3, 0, 3, 0.25)


def teacher(number: int, actual: str, expected: str) -> TeacherRow:
    return TeacherRow(f"p{number}", "ans = 1", actual, expected, id=f"t{number}", program="add(1, 1)")


def test_every_labelled_row_is_scored_and_those_the_teacher_solved_are_marked(tmp_path: Path):
    folders = Folders(data=tmp_path)
    solved, failed, unlabelled = teacher(0, "2.0", "2"), teacher(1, "", "3"), teacher(2, "1", "")
    write_teacher_rows(folders.generated("FinQA-mini", "dev"), [solved, failed, unlabelled])
    path, rows = read_rows(folders, MINI, "dev")
    assert path == folders.generated("FinQA-mini", "dev")
    assert [(r.id, r.teacher_solved) for r in rows] == [("t0", True), ("t1", False)]
    assert rows[0].label_disputed is None
    write_teacher_rows(folders.generated("FinQA-mini", "dev"), [replace(solved, stated_answer="3")])
    assert read_rows(folders, MINI, "dev")[1][0].label_disputed


def test_without_a_teachers_file_the_clean_rows_are_scored_and_else_the_filtered_which_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    folders = Folders(data=tmp_path)
    with pytest.raises(UserError, match=r"no rows of FinQA-mini dev.*preprocess_finqa --dataset FinQA-mini"):
        read_rows(folders, MINI, "dev")
    write_teacher_rows(folders.filtered("FinQA-mini", "dev"), [teacher(0, "2", "2")])
    path, rows = read_rows(folders, MINI, "dev")
    assert path == folders.filtered("FinQA-mini", "dev") and rows[0].teacher_solved
    assert "only the rows that the teacher solved" in capsys.readouterr().out
    write_questions(
        folders.clean("FinQA-mini", "dev"), [Question("", "page", "", [["a", "1"]], "what % ?", "5", "", "5%")]
    )
    path, rows = read_rows(folders, MINI, "dev")
    assert path == folders.clean("FinQA-mini", "dev")
    assert rows[0].id == "row-0" and rows[0].teacher_solved is None
    assert rows[0].prompt.endswith("what % ?\n###Python")
    assert (rows[0].answer_kind, rows[0].label_disputed) == ("per cent", False)


def test_no_teacher_means_no_figure_for_the_rows_it_solved(predictions: list[Prediction]):
    assert "accuracy_teacher_solved" not in metrics(
        [Prediction(**{**p.__dict__, "teacher_solved": None}) for p in predictions]
    )


def sampled(texts: list[list[str]]) -> list[Prediction]:
    """Predictions for the first rows, each with these replies."""
    replies = [Reply(text, 10, 5, "stop") for of_row in texts for text in of_row]
    with Sandbox() as sandbox:
        return judge(ROWS[: len(texts)], [[1, n] for n in range(len(texts))], replies, sandbox, sampled=True)


VOTED = [["ans = 5", "ans = 3", "a = 1\nans = a + 2"], ["ans = nothing", "ans = 1 / 4", "ans = 2"], ["x", "y", "z"]]


def test_samples_vote_and_keep_their_own_figures(tmp_path: Path):
    voted = sampled(VOTED)
    assert [p.answer for p in voted] == [3.0, 0.25, None]
    assert [p.code for p in voted] == ["ans = 3", "ans = 1 / 4", "x"]
    assert [p.correct["strict"] for p in voted] == [True, True, False]
    assert [[s.correct for s in p.samples or ()] for p in voted] == [
        [False, True, True], [False, True, False], [False, False, False]
    ]  # fmt: skip
    assert [p.error_kind for p in voted] == [None, None, "runtime"]
    found = write_results(tmp_path, voted, {"generate": 0, "run": 0})
    assert read_predictions(tmp_path) == voted
    assert found["accuracy"] == 2 / 3 and found["samples_per_row"] == 3
    assert found["accuracy_per_sample"] == 3 / 9
    assert found["any_sample_right"] == 2 / 3
    assert found["share_runs_per_sample"] == 5 / 9
    assert found["tokens"] == {"prompt": 30, "new": 45}


def test_the_answer_most_samples_gave_is_judged_under_both_rules_and_a_sample_under_the_strict():
    """Two samples give per cent and one the fraction: per cent wins, which is right under the relaxed rule alone."""
    voted = sampled([["ans = 3"] * 3, ["ans = 25", "ans = 0.25", "ans = 50 / 2"]])[1]
    assert voted.answer == 25
    assert (voted.correct["strict"], voted.correct["relaxed"]) == (False, True)
    assert [sample.correct for sample in voted.samples or ()] == [False, True, False]
    found = metrics([voted])
    assert (found["accuracy"], found["accuracy_relaxed"], found["any_sample_right"]) == (0.0, 1.0, 1.0)


def test_every_rule_has_its_figure_and_interval_and_every_error_kind_is_a_known_one(predictions: list[Prediction]):
    found = metrics(predictions)
    for name, right in (("accuracy", 2), ("accuracy_relaxed", 3), ("accuracy_reported_rule", 3)):
        assert found[name] == right / 5
        assert found[f"{name}_interval"] == list(wilson(right, 5))
    assert set(found["errors_by_kind"]) <= {*ERROR_KINDS, "prompt-too-long"}
    odd = Prediction(**{**predictions[0].__dict__, "error_kind": "odd"})
    with pytest.raises(ValueError, match="unknown error kind odd"):
        metrics([odd])


def test_a_batch_takes_room_for_its_rows_and_for_what_the_model_reads_at_once():
    tasks: Any = [
        SimpleNamespace(prompt_tokens=[list(range(first, first + n)) for first, n in prompts], samples=samples)
        for prompts, samples in ((((0, 5), (100, 90), (1000, 30)), 2), (((0, 40),), 1))
    ]
    model = MistralConfig(num_hidden_layers=2, sliding_window=None)
    whole = GenerationConfig(vllm=False, batch_size=100, max_new_tokens=10)
    # Each prompt twice: the 90 tokens are read as 89 that two share, and the others up to them; then at most 1 of each.
    assert list(extents(tasks, whole, model)) == [Extent(6, 90, 3 * 89), Extent(1, 40, 40)]
    small = replace(whole, batch_size=4, max_model_len=50)
    assert list(extents(tasks, small, model)) == [Extent(4, 30, 2 * 29), Extent(1, 40, 40)]
    assert list(extents(tasks, replace(small, max_model_len=12), model)) == []
    few: Any = [SimpleNamespace(prompt_tokens=[[*range(100), 200 + n, 300] for n in range(8)], samples=1)]
    assert list(extents(few, whole, model)) == [Extent(8, 102, 100)], "one beginning, then two tokens of each"
    assert list(extents(few, whole, MistralConfig(sliding_window=64))) == [Extent(8, 102, 8 * 102)]


def test_an_evaluation_that_was_killed_while_it_was_written_is_not_reported(
    predictions: list[Prediction], tmp_path: Path
):
    student = tmp_path / "FinQA-mini" / "some-student"
    for eval_type in ("zero-shot", "few-shot"):
        write_results(student / "test" / eval_type, predictions, {"generate": 1, "run": 1})
    write_json(student / "test" / "few-shot" / "run.json", {})
    text = write_report(student).read_text()
    assert "| few-shot | 5 |" in text and "zero-shot" not in text


def test_the_report_has_each_type_its_pairs_its_families_and_a_figure(predictions: list[Prediction], tmp_path: Path):
    student = tmp_path / "FinQA-mini" / "some-student"
    wrong = dict.fromkeys(predictions[0].correct, False)
    for eval_type, rows in (
        ("fine-tuned", predictions),
        ("zero-shot", [Prediction(**{**p.__dict__, "correct": wrong}) for p in predictions]),
        ("fine-tuned-12-samples", sampled(VOTED)),
        ("fine-tuned-3-samples", sampled(VOTED)),
    ):
        write_results(student / "test" / eval_type, rows, {"generate": 1, "run": 1})
        write_json(student / "test" / eval_type / "run.json", {})
    text = write_report(student).read_text()
    assert "# some-student on FinQA-mini" in text and "## test" in text and "## dev" not in text
    assert "| zero-shot | 5 | **0.0 [0.0, 43.4]** | **0.0 [0.0, 43.4]** |" in text
    assert "| fine-tuned | 5 | **40.0 [11.8, 76.9]** | **60.0 [23.1, 88.2]** | 60.0" in text
    assert "| fine-tuned | 1 | 4 | 50.0 [15.0, 85.0] | 75.0 [30.1, 95.4] |" in text
    assert "| zero-shot | fine-tuned | strict | 5 | 2 | 0 | 2 | 0.5 |" in text
    assert "| zero-shot | fine-tuned | relaxed | 5 | 3 | 0 | 3 | 0.25 |" in text
    assert "| zero-shot | fine-tuned-3-samples | strict | 3 | 2 | 0 | 2 | 0.5 |" in text
    assert "| fine-tuned-3-samples | 3 | 33.3 | 66.7 | 66.7 | 55.6 |" in text
    assert "| share | new | 2 | 0.0 / 0.0 | 50.0 / 100.0 | 50.0 / 50.0 | 50.0 / 50.0 |" in text
    assert "| 2 | 1 | 0.0 / 0.0 | 0.0 / 100.0 | 100.0 / 100.0 | 100.0 / 100.0 |" in text
    assert "| per cent | 1 | 0.0 / 0.0 | 0.0 / 100.0 | 100.0 / 100.0 | 100.0 / 100.0 |" in text
    assert text.index("| fine-tuned | 5") < text.index("| fine-tuned-3-samples") < text.index("| fine-tuned-12-samples")
    assert text.index("| zero-shot | 5") < text.index("| fine-tuned | 5")
    assert (student / "accuracy.png").read_bytes().startswith(b"\x89PNG")
