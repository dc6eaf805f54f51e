"""docs/reference/finqa and the tables and figures of docs/finqa.md, from what the jobs left. No number is typed."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import REPOSITORY, write_atomically
from finqa.task.answers import normalise
from study.markdown import NOTHING, fill_tables, markdown
from study.students.figures import draw_accuracy, draw_curve
from study.students.plan import (
    CURVE,
    MAIN,
    NAMED,
    PLAIN,
    SAMPLES,
    SEARCH,
    STUDENTS,
    WORDINGS,
    Plan,
    job_name,
    short,
    wording_run,
)
from study.students.results import Evaluated, analyses, diff_figures, figures_of, manifests, read_results

REFERENCE = REPOSITORY / "docs" / "reference" / "finqa"
PAGE = REPOSITORY / "docs" / "finqa.md"
NOT_RUN = "*Not run yet.*\n"
EVALUATIONS = {
    "zero-shot": "zero-shot",
    "few-shot": "few-shot (4 examples)",
    "fine-tuned": "fine-tuned",
    f"fine-tuned-{SAMPLES}-samples": f"fine-tuned, vote of {SAMPLES}",
}
Figures = dict[str, Any]


def write_reference(plan: Plan, folder: Path = REFERENCE, page: Path = PAGE) -> Path:
    """Write metrics.json, predictions, manifests and figures into `folder`, and fill the tables of `page`."""
    found = read_results(plan)
    if not found:
        raise UserError(f"nothing was evaluated yet in {plan.folders.results}; run: python -m study.students")
    folder.mkdir(parents=True, exist_ok=True)
    made = manifests(plan)
    rows = {run: its["fine-tune"]["rows"] for run, its in made.items() if "fine-tune" in its}
    write_json(folder / "metrics.json", figures_of(found) | {"training_rows": rows, "diff": diff_figures(plan)})
    write_json(folder / "manifests.json", made)
    for split in dict.fromkeys(one.split for one in found):
        write_predictions(folder / f"predictions_{split}.csv.gz", [one for one in found if one.split == split])
    for name, text in analyses(plan).items():
        write_atomically(folder / "diff" / name, text)
    draw_accuracy(folder / "accuracy.png", read_metrics(folder))
    if points := curve_points(read_metrics(folder)):
        draw_curve(folder / "learning_curve.png", read_metrics(folder), points)
    write_atomically(page, fill(page.read_text(), folder))
    return folder


def write_predictions(path: Path, found: Sequence[Evaluated]) -> None:
    """A line a question: its id, and for every evaluation the answer that was given and the verdict on it.

    The verdict is `strict` or `relaxed`, the first rule under which the answer is right, else `wrong`, or what kept
    the program from giving an answer.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [" ".join(filter(None, (one.student, one.run, one.evaluation))) for one in found]
    writer.writerow(["id", *(f"{name}: {what}" for name in names for what in ("answer", "verdict"))])
    by_id = [{p.id: p for p in one.predictions} for one in found]
    for row in sorted({id for predictions in by_id for id in predictions}):
        cells: list[str] = []
        for prediction in (predictions.get(row) for predictions in by_id):
            # An answer that is neither a number nor yes or no may be text of the page, which is not ours to publish.
            answer = normalise(prediction.answer) if prediction else None
            cells.append("" if answer is None else answer if isinstance(answer, str) else f"{answer:.6g}")
            right = prediction and next((r for r in ("strict", "relaxed") if prediction.correct[r]), None)
            cells.append("" if prediction is None else right or prediction.error_kind or "wrong")
        writer.writerow([row, *cells])
    write_atomically(path, gzip.compress(text.getvalue().encode(), mtime=0))


def read_metrics(folder: Path) -> Figures:
    return json.loads((folder / "metrics.json").read_text())


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew from metrics.json in `folder`. KeyError for a table of an unknown name."""
    figures = read_metrics(folder)
    return fill_tables(page, lambda name: TABLES[name](figures) or NOT_RUN)


def curve_points(figures: Figures) -> list[tuple[int, str]]:
    """Number of training rows and run name of each point of the learning curve that is there, the fewest first."""
    runs = [f"rows{n}" for n in CURVE] + [next(iter(NAMED))]
    rows = figures["training_rows"]
    named = [(rows.get(f"{short(MAIN)} {run}".strip()), run) for run in runs]
    return [(n, run) for n, run in named if n is not None]


def metrics_of(figures: Figures, student: str, run: str, split: str, evaluation: str) -> dict[str, Any] | None:
    """metrics.json of one evaluation; None where it is not there."""
    wanted = {"student": student, "run": run, "split": split, "evaluation": evaluation}
    return next((e["metrics"] for e in figures["evaluations"] if wanted.items() <= e.items()), None)


def accuracy(figures: Figures) -> str:
    """A row a student and evaluation on test, with dev beside it."""
    lines, n_undisputed = [], 0
    for model in map(short, STUDENTS):
        for evaluation, title in EVALUATIONS.items():
            test, dev = (metrics_of(figures, model, "", split, evaluation) for split in ("test", "dev"))
            if test:
                n_undisputed = test["n_undisputed"]
                undisputed = f"{percent(test['accuracy_undisputed'])} / {percent(test['accuracy_relaxed_undisputed'])}"
                cells = [with_interval(test, "accuracy"), with_interval(test, "accuracy_relaxed"), undisputed]
                on_dev = [with_interval(dev, name) if dev else NOTHING for name in ("accuracy", "accuracy_relaxed")]
                lines.append([model, title, *cells, percent(test["share_runs"]), *on_dev])
    header = [
        "student",
        "evaluation",
        "test, strict",
        "test, relaxed",
        f"undisputed labels (n {n_undisputed:,}), strict / relaxed",
    ]
    return markdown([*header, "programs that run", "dev, strict", "dev, relaxed"], lines)


def paired(figures: Figures) -> str:
    """McNemar's tests between the evaluations of the main student on test, under both rules."""
    tests = [p for p in figures["paired"] if (p["student"], p["run"], p["split"]) == (short(MAIN), "", "test")]
    lines = [
        [p["first"], p["second"], p["rule"], str(p["only_first"]), str(p["only_second"]), f"{p['p']:.1g}"]
        for p in tests
    ]
    return markdown(["first", "second", "rule", "only the first right", "only the second right", "p"], lines)


def groups(of: str, title: str) -> Callable[[Figures], str]:
    """A table of the main student on test by groups of questions, strict / relaxed."""

    def table(figures: Figures) -> str:
        found = {name: metrics_of(figures, short(MAIN), "", "test", name) for name in EVALUATIONS}
        there = {name: m[of] for name, m in found.items() if m}
        names = sorted({group for by_group in there.values() for group in by_group})
        lines = []
        for name in names:
            its = [by_group.get(name) for by_group in there.values()]
            shares = [f"{percent(g['accuracy'])} / {percent(g['accuracy_relaxed'])}" if g else NOTHING for g in its]
            lines.append([name, str(next(g["n"] for g in its if g)), *shares])
        return markdown([title, "n", *(EVALUATIONS[name] for name in there)], lines)

    return table


def seeds(figures: Figures) -> str:
    """A row a style of programs and fine-tuning seed of the main student, and the mean of each style."""
    lines: list[list[str]] = []
    for style, runs in {"plain": PLAIN, "named": NAMED}.items():
        shares: list[list[float | None]] = []
        for run, seed in runs.items():
            test, dev = (metrics_of(figures, short(MAIN), run, split, "fine-tuned") for split in ("test", "dev"))
            if test:
                of_dev = [dev[rule] if dev else None for rule in ("accuracy", "accuracy_relaxed")]
                shares.append([test["accuracy"], test["accuracy_relaxed"], *of_dev])
                lines.append([style, str(seed), *map(percent, shares[-1])])
        if len(shares) > 1:
            there = [[share for share in column if share is not None] for column in zip(*shares, strict=True)]
            lines.append([style, "mean", *(percent(mean(column) if column else None) for column in there)])
    return markdown(["variables", "seed", "test, strict", "test, relaxed", "dev, strict", "dev, relaxed"], lines)


def curve(figures: Figures) -> str:
    """A row a number of training rows of the main student."""
    lines = []
    for rows, run in curve_points(figures):
        test, dev = (metrics_of(figures, short(MAIN), run, split, "fine-tuned") for split in ("test", "dev"))
        if test and dev:
            cells = [with_interval(m, rule) for m in (test, dev) for rule in ("accuracy", "accuracy_relaxed")]
            lines.append([f"{rows:,}", *cells])
    return markdown(["training rows", "test, strict", "test, relaxed", "dev, strict", "dev, relaxed"], lines)


def search(figures: Figures) -> str:
    """A row a setting that was tried on dev."""
    lines = []
    for setting in SEARCH:
        found = next(
            (e for e in figures["evaluations"] if e["run"] == job_name(setting) and e["split"] == "dev"),
            None,
        )
        if found:
            m = found["metrics"]
            test = figures["search"].get(setting.name)
            counts = [str(test["only_this"]), str(test["only_middle"]), f"{test['p']:.1g}"] if test else [NOTHING] * 3
            lines.append([setting.name, with_interval(m, "accuracy"), with_interval(m, "accuracy_relaxed"), *counts])
    head = ["what differs from the middle", "dev, strict", "dev, relaxed", "only this right", "only the middle right"]
    return markdown([*head, "p"], lines)


def wordings(figures: Figures) -> str:
    """A row a wording of the instruction, for zero-shot and few-shot, strict / relaxed and the share that runs."""
    lines = []
    for name in WORDINGS:
        run = wording_run(name)
        cells = []
        for split in ("dev", "test"):
            for evaluation in ("zero-shot", "few-shot"):
                if m := metrics_of(figures, short(MAIN), run, split, evaluation):
                    shares = f"{percent(m['accuracy'])} / {percent(m['accuracy_relaxed'])}"
                    cells.append(f"{shares}, {percent(m['share_runs'])}")
                else:
                    cells.append(NOTHING)
        if set(cells) != {NOTHING}:
            lines.append([name if run else f"**{name}**", *cells])
    return markdown(["wording", "dev, zero-shot", "dev, few-shot", "test, zero-shot", "test, few-shot"], lines)


def diff(figures: Figures) -> str:
    """A row a dictionary of the model diff."""
    lines = []
    for made in figures["diff"]:
        held, classes = made["held_out"], made["classes"] or {}
        explained = [
            NOTHING if (v := held[of]) is None else f"{v:.3f}" for of in ("instruct", "fine_tuned", "difference")
        ]
        counts = [str(classes.get(kind, NOTHING)) for kind in ("instruct-only", "fine-tuned-only", "between")]
        meets = [str(made["meets"].get(kind, NOTHING)) for kind in ("instruct-only", "fine-tuned-only")]
        sparse = [f"{held['l0']:.1f}", percent(made["dead_share"])]
        lines.append([made["documents"], made["site"], made["method"], *explained, *sparse, *counts, " / ".join(meets)])
    head = ["documents", "site", "dictionary", "EV, base", "EV, fine-tuned", "EV, difference", "L0", "dead, %"]
    return markdown([*head, "base-only", "fine-tuned-only", "between", "meet latent scaling, base / fine-tuned"], lines)


def diff_kinds(figures: Figures) -> str:
    """A row a dictionary: explained variance of the difference by kind of token."""
    kinds = ("template", "passage", "table", "question", "program")
    lines = [
        [made["documents"], made["site"], made["method"], *(f"{made['by_kind'][kind]:.3f}" for kind in kinds)]
        for made in figures["diff"]
        if made["by_kind"]
    ]
    return markdown(["documents", "site", "dictionary", *kinds], lines)


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"


def with_interval(metrics: dict[str, Any], name: str) -> str:
    low, high = metrics[f"{name}_interval"]
    return f"{percent(metrics[name])} [{percent(low)}, {percent(high)}]"


TABLES: dict[str, Callable[[Figures], str]] = {
    "accuracy": accuracy,
    "paired": paired,
    "by-steps": groups("by_steps", "steps"),
    "by-answer": groups("by_answer_kind", "the question asks for"),
    "seeds": seeds,
    "curve": curve,
    "search": search,
    "wordings": wordings,
    "diff": diff,
    "diff-kinds": diff_kinds,
}
