"""metrics.md and its figure: the evaluations of one student side by side."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from finqa.paths import SPLITS, write_atomically
from finqa.scoring.accuracy_figure import accuracy_figure
from finqa.scoring.finished_evaluations import Evaluation, families, read_evaluations
from finqa.scoring.metrics import compare

FIGURE = "accuracy.png"


def write_report(folder: Path) -> Path:
    """Write metrics.md and accuracy.png into `R/<dataset>/<model-id>` from the split folders in it."""
    splits = {split: found for split in SPLITS if (found := read_evaluations(folder / split))}
    write_atomically(folder / FIGURE, accuracy_figure(splits))
    text = "\n".join([f"# {folder.name} on {folder.parent.name}", "", *_body(splits)])
    write_atomically(folder / "metrics.md", text)
    return folder / "metrics.md"


def _body(splits: dict[str, list[Evaluation]]) -> list[str]:
    lines = [f"![accuracy by evaluation type and question family]({FIGURE})", ""]
    for split, evaluations in splits.items():
        lines += [f"## {split}", "", *_accuracy_table(evaluations), ""]
        if len(evaluations) > 1:
            lines += [*_paired_table(evaluations), ""]
        if any(e.sampled for e in evaluations):
            lines += [*_sample_table(evaluations), ""]
        if any("by_family" in e.metrics for e in evaluations):
            lines += [*_family_table(evaluations), ""]
        if any("by_steps" in e.metrics for e in evaluations):
            lines += [*_steps_table(evaluations), ""]
        lines += [*_error_table(evaluations), ""]
    return lines


def _accuracy_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "Accuracy in per cent, with its 95% interval (Wilson). An answer is right under the strict rule where it is "
        "the label to five decimals; the relaxed and the reported rule forgive more. Teacher-solved: the rows whose "
        "label the teacher's program gave.",
        "",
        "| | n | **strict** | relaxed | reported rule | teacher-solved (strict) | programs that run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in evaluations:
        m = e.metrics
        solved = (
            f"{_with_interval(m, 'accuracy_teacher_solved')}, n {m['n_teacher_solved']}"
            if "n_teacher_solved" in m
            else ""
        )
        cells = [
            e.name,
            str(m["n"]),
            f"**{_with_interval(m, 'accuracy')}**",
            _with_interval(m, "accuracy_relaxed"),
            _with_interval(m, "accuracy_reported_rule"),
            solved,
            _percent(m["share_runs"]),
        ]
        lines.append(_row(cells))
    return lines


def _paired_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "The same rows in pairs (strict): how many only one of two evaluations has right (discordant), and the exact "
        "two-sided p of McNemar's test.",
        "",
        "| first | second | rows in both | discordant | only first right | only second right | p |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for first, second in combinations(evaluations, 2):
        n, only_first, only_second, p = compare(first.predictions, second.predictions)
        counts = [str(count) for count in (n, only_first + only_second, only_first, only_second)]
        lines.append(_row([first.name, second.name, *counts, f"{p:.2g}"]))
    return lines


def _sample_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "Self-consistency (strict, per cent): what a single sample is worth, what the vote over all of a row is, and "
        "in how many rows any sample is right.",
        "",
        "| | samples a row | a sample right | the vote right | any sample right | a sample runs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for e in evaluations:
        if e.sampled:
            m = e.metrics
            shares = [m[name] for name in ("accuracy_per_sample", "accuracy", "any_sample_right")]
            runs = _percent(m["share_runs_per_sample"])
            lines.append(_row([e.name, str(m["samples_per_row"]), *map(_percent, shares), runs]))
    return lines


def _family_table(evaluations: list[Evaluation]) -> list[str]:
    types = [e.name for e in evaluations]
    lines = [
        "By question family (strict, per cent). The base model knows the *known* families from its pretraining; the "
        "*new* ones are what fine-tuning adds.",
        "",
        _row(["family", "kind", "n", *types]),
        _row(["---"] * (3 + len(types))),
    ]
    for family in families(evaluations):
        groups = [e.metrics.get("by_family", {}).get(family, {}) for e in evaluations]
        one = next(group for group in groups if group)
        shares = [_percent(group.get("accuracy")) for group in groups]
        lines.append(_row([family, one.get("kind", ""), str(one["n"]), *shares]))
    return lines


def _steps_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "By the number of steps of the gold program (strict, per cent).",
        "",
        _row(["steps", "n", *(e.name for e in evaluations)]),
        _row(["---"] * (2 + len(evaluations))),
    ]
    for steps in sorted({steps for e in evaluations for steps in e.metrics.get("by_steps", {})}, key=int):
        groups = [e.metrics.get("by_steps", {}).get(steps, {}) for e in evaluations]
        n = next(group["n"] for group in groups if group)
        lines.append(_row([steps, str(n), *(_percent(group.get("accuracy")) for group in groups)]))
    return lines


def _error_table(evaluations: list[Evaluation]) -> list[str]:
    kinds = sorted({kind for e in evaluations for kind in e.metrics["errors_by_kind"]})
    if not kinds:
        return ["Every program ran."]
    lines = ["Programs without an answer, by kind:", "", _row(["", *kinds]), _row(["---"] * (1 + len(kinds)))]
    for e in evaluations:
        counts = [str(e.metrics["errors_by_kind"].get(kind, 0)) for kind in kinds]
        lines += [_row([e.name, *counts])]
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _with_interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{_percent(found[name])} [{_percent(low)}, {_percent(high)}]"
