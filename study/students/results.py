"""What the jobs left: every evaluation, its verdicts given anew, and the figures of all in one JSON.

Answers are held against the labels again when they are read, by the rules of today's code, so that a rule that changes
needs no GPU.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

from finqa.evaluation.finished import read_evaluations
from finqa.evaluation.metrics import HEADLINES, compare, metrics
from finqa.evaluation.predictions import Prediction
from finqa.evaluation.rows import EvalRow, read_rows
from finqa.runtime.errors import UserError
from finqa.runtime.paths import SPLITS
from finqa.task import datasets
from finqa.task.answers import RULES, match
from study.students.plan import (
    AMOUNTS,
    DATASET,
    METHODS,
    MIDDLE_SETTING,
    SEARCH,
    SITES,
    STUDENTS,
    Plan,
    dictionary_name,
    job_name,
    short,
)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one run."""

    student: str
    """Short name of the model."""
    run: str
    """Run name; empty for the student by its own settings."""
    split: str
    evaluation: str
    """Eval type, and after it `-<n>-samples` where answers were voted on."""
    predictions: list[Prediction]

    @property
    def key(self) -> dict[str, str]:
        return {"student": self.student, "run": self.run, "split": self.split, "evaluation": self.evaluation}


def read_results(plan: Plan) -> list[Evaluated]:
    """Every finished evaluation of the study's students, judged again.

    Raises UserError where one is damaged, or answers a question that is no longer among the rows.
    """
    data, found = datasets.dataset(DATASET), []
    rows = {split: {row.id: row for row in read_rows(plan.folders, data, split)[1]} for split in SPLITS[1:]}
    for student, run, folder in run_folders(plan):
        for split in SPLITS[1:]:
            for evaluation in read_evaluations(folder / split):
                if gone := [one.id for one in evaluation.predictions if one.id not in rows[split]]:
                    raise UserError(
                        f"{folder / split / evaluation.name} has an answer to {gone[0]}, which is not in {split} of "
                        f"{plan.folders.data}; give the --data-dir that it was made from, or evaluate again"
                    )
                judged = [judged_again(one, rows[split][one.id]) for one in evaluation.predictions]
                found.append(Evaluated(student, run, split, evaluation.name, judged))
    return found


def run_folders(plan: Plan) -> Iterator[tuple[str, str, Path]]:
    """Student, run name and results folder of every run of the study, the students in their order."""
    names = {flag for job in plan.jobs() for flag in _run_names(job.command)}
    for student in map(short, STUDENTS):
        for folder in sorted((plan.folders.results / DATASET).glob(f"{student}-peft*")):
            # <student>-peft<modules>-bs<b>-ne<e>[-<run name>]
            run = folder.name.partition("-ne")[2].partition("-")[2]
            if not run or run in names:
                yield student, run, folder


def _run_names(command: str) -> list[str]:
    words = command.split()
    return [after for word, after in pairwise(words) if word == "--run-name"]


def judged_again(prediction: Prediction, row: EvalRow) -> Prediction:
    """A prediction's reply and answer with verdicts, and facts of the row, by today's code."""
    correct = {rule: match(prediction.answer, row.expected, rule) for rule in RULES}
    return replace(
        prediction,
        expected=row.expected,
        correct=correct,
        program_steps=row.n_steps,
        label_disputed=row.label_disputed,
        answer_kind=row.answer_kind,
    )


def figures_of(found: Sequence[Evaluated]) -> dict[str, Any]:
    """The content of metrics.json: `evaluations`, and `paired` tests of the evaluations of one run on one split."""
    paired = []
    for first, second in combinations(found, 2):
        if (first.student, first.run, first.split) != (second.student, second.run, second.split):
            continue
        for rule in HEADLINES:
            n, only_first, only_second, p = compare(first.predictions, second.predictions, rule)
            counts = {"n": n, "only_first": only_first, "only_second": only_second, "p": p}
            names = {"first": first.evaluation, "second": second.evaluation, "rule": rule}
            paired.append({**first.key, **names, **counts})
            del paired[-1]["evaluation"]
    evaluations = [{**one.key, "metrics": metrics(one.predictions)} for one in found]
    return {"evaluations": evaluations, "paired": paired, "search": against_middle(found)}


def diff_figures(plan: Plan) -> list[dict[str, Any]]:
    """What train.py measured of each dictionary of the model diff that is there, on held-out documents.

    `by_kind` has the explained variance of the difference by kind of token, as analyse.py measured it. `meets` counts
    the latents that meet latent scaling's conditions for a class, whatever class Delta gives them.
    """
    figures = []
    for amount, site, method in product(AMOUNTS, SITES, METHODS):
        name = dictionary_name(amount, site, method)
        path = plan.dictionaries / name / "metrics.json"
        if path.exists():
            made = json.loads(path.read_text())
            scaling = made["latent_scaling"] or {}
            meets = {kind: sum(map(len, its["meet"].values())) for kind, its in scaling.items()}
            of = {key: made[key] for key in ("held_out", "n_held_out_documents", "dead_share", "classes")}
            named = {"name": name, "documents": amount, "site": site, "method": method}
            analysis = path.with_name("analysis.json")
            kinds = json.loads(analysis.read_text())["explained_variance_by_kind"] if analysis.exists() else []
            by_kind = {kind["kind"]: kind["difference"] for kind in kinds}
            figures.append({**named, **of, "meets": meets, "by_kind": by_kind})
    return figures


def analyses(plan: Plan) -> dict[str, str]:
    """What analyse.py found of each dictionary that is there, by the name of a file to publish.

    Two files a dictionary: analysis.json without folders of the machine, and most_changed.csv without the excerpts,
    which are text of FinQA's pages, and without words of the vocabulary that latents promote.
    """
    found = {}
    for amount, site, method in product(AMOUNTS, SITES, METHODS):
        folder = plan.dictionaries / dictionary_name(amount, site, method)
        if (folder / "analysis.json").exists():
            name = f"{amount}_{site}_{method}"
            made = without_folders(json.loads((folder / "analysis.json").read_text()))
            found[f"{name}_analysis.json"] = json.dumps(made, indent=1, allow_nan=False) + "\n"
            text = io.StringIO(newline="")
            with (folder / "most_changed.csv").open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file)
                left_out = ("example", "promoted", "promoted_instruct")
                kept = [column for column in rows.fieldnames or () if column not in left_out]
                writer = csv.DictWriter(text, kept, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            found[f"{name}_most_changed.csv"] = text.getvalue()
    return found


def against_middle(found: Sequence[Evaluated]) -> dict[str, dict[str, float]]:
    """By setting of the search: dev questions that only its student has right, that only the middle's has, and p.

    Strict rule, exact McNemar test; empty where the middle was not evaluated.
    """
    on_dev = {one.run: one.predictions for one in found if one.split == "dev" and one.run.startswith("search-")}
    tests = {}
    for setting in SEARCH:
        run, middle = job_name(setting), on_dev.get(job_name(MIDDLE_SETTING))
        if middle and run in on_dev and setting != MIDDLE_SETTING:
            _, only_this, only_middle, p = compare(on_dev[run], middle, "strict")
            tests[setting.name] = {"only_this": only_this, "only_middle": only_middle, "p": p}
    return tests


def manifests(plan: Plan) -> dict[str, Any]:
    """run.json of every fine-tune and evaluation, by run, without the folders of the machine that they ran on."""
    found: dict[str, Any] = {}
    for student, run, folder in run_folders(plan):
        trained = [
            path
            for data in (plan.folders.data, *sorted((plan.folders.data / "styles").glob("*")))
            for path in [data / "models" / DATASET / folder.name / "run.json"]
            if path.exists()
        ]
        files = [*trained, *sorted(folder.glob("*/*/run.json"))]
        names = ["fine-tune"] * len(trained) + ["/".join(path.parts[-3:-1]) for path in files[len(trained) :]]
        found[f"{student} {run}".strip()] = {
            name: without_folders(json.loads(path.read_text())) for name, path in zip(names, files, strict=True)
        }
    return found


def without_folders(value: Any) -> Any:
    """Absolute paths cut to their last part, in keys and values of any depth."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and "/" in value:
        return " ".join(Path(word).name if word.startswith("/") else word for word in value.split(" "))
    return value
