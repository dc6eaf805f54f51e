"""metrics.md and its figure: the evaluations of one student side by side."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from finqa.evaluation.accuracy_figure import accuracy_figure
from finqa.evaluation.finished import GROUPINGS, Evaluation, Grouping, read_evaluations
from finqa.evaluation.metrics import HEADLINES, METRIC_OF_RULE, compare
from finqa.runtime.figures import image_of
from finqa.runtime.paths import SPLITS, write_atomically

FIGURE = "accuracy.png"


def write_report(folder: Path) -> Path:
    """Write metrics.md and accuracy.png into `R/<dataset>/<model-id>` from the split folders in it."""
    splits = {split: found for split in SPLITS if (found := read_evaluations(folder / split))}
    write_atomically(folder / FIGURE, image_of(accuracy_figure(splits)))
    text = "\n".join([f"# {folder.name} on {folder.parent.name}", "", *_body(splits)])
    write_atomically(folder / "metrics.md", text)
    return folder / "metrics.md"


def _body(splits: dict[str, list[Evaluation]]) -> list[str]:
    lines = [f"![accuracy by evaluation type and group of questions]({FIGURE})", ""]
    for split, evaluations in splits.items():
        lines += [f"## {split}", "", *_accuracy_table(evaluations), ""]
        if any(_disputed(e) for e in evaluations):
            lines += [*_undisputed_table(evaluations), ""]
        if len(evaluations) > 1:
            lines += [*_paired_table(evaluations), ""]
        if any(e.sampled for e in evaluations):
            lines += [*_sample_table(evaluations), ""]
        for grouping in GROUPINGS:
            if names := grouping.names(evaluations):
                lines += [*_group_table(grouping, names, evaluations), ""]
        lines += [*_error_table(evaluations), ""]
    return lines


def _accuracy_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "Accuracy in per cent, with its 95% interval (Wilson). An answer is right under the strict rule where it is "
        "the label to five decimals. The relaxed rule also takes a relative error of 0.001, and per cent for a "
        "fraction or a fraction for per cent. The reported rule is looser still. Teacher-solved: the rows whose label "
        "the teacher's program gave.",
        "",
        "| | n | **strict** | **relaxed** | reported rule | teacher-solved (strict) | programs that run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in evaluations:
        m = e.metrics
        solved = (
            f"{_with_interval(m, 'accuracy_teacher_solved')}, n {m['n_teacher_solved']}"
            if "n_teacher_solved" in m
            else ""
        )
        headlines = [f"**{_with_interval(m, METRIC_OF_RULE[rule])}**" for rule in HEADLINES]
        cells = [e.name, str(m["n"]), *headlines, _with_interval(m, "accuracy_reported_rule"), solved]
        lines.append(_row([*cells, _percent(m["share_runs"])]))
    return lines


def _disputed(e: Evaluation) -> int:
    return e.metrics["n"] - e.metrics.get("n_undisputed", e.metrics["n"])


def _undisputed_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "Without disputed labels: the rows left out are those where what the report's annotator wrote contradicts the "
        "label by more than rounding, per cent, unit or sign, so that one of the two is wrong.",
        "",
        "| | left out | n | strict | relaxed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for e in evaluations:
        if "n_undisputed" in e.metrics:
            shares = [_with_interval(e.metrics, f"{METRIC_OF_RULE[rule]}_undisputed") for rule in HEADLINES]
            lines.append(_row([e.name, str(_disputed(e)), str(e.metrics["n_undisputed"]), *shares]))
    return lines


def _paired_table(evaluations: list[Evaluation]) -> list[str]:
    lines = [
        "The same rows in pairs: how many only one of two evaluations has right (discordant), and the exact two-sided "
        "p of McNemar's test.",
        "",
        "| first | second | rule | rows in both | discordant | only first right | only second right | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for first, second in combinations(evaluations, 2):
        for rule in HEADLINES:
            n, only_first, only_second, p = compare(first.predictions, second.predictions, rule)
            counts = [str(count) for count in (n, only_first + only_second, only_first, only_second)]
            lines.append(_row([first.name, second.name, rule, *counts, f"{p:.2g}"]))
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


def _group_table(grouping: Grouping, names: list[str], evaluations: list[Evaluation]) -> list[str]:
    kinds = {name: kind for name in names if (kind := grouping.kind(evaluations, name))}
    lines = [
        f"{grouping.title} (strict / relaxed, per cent). {grouping.note}".rstrip(),
        "",
        _row([grouping.column, *(["kind"] if kinds else []), "n", *(e.name for e in evaluations)]),
        _row(["---"] * (2 + bool(kinds) + len(evaluations))),
    ]
    for name in names:
        groups = [grouping.of(e).get(name, {}) for e in evaluations]
        n = next(group["n"] for group in groups if group)
        lines.append(_row([name, *([kinds.get(name, "")] if kinds else []), str(n), *map(_headlines, groups)]))
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


def _headlines(group: dict[str, Any]) -> str:
    """Accuracy under both rules; the strict one alone where the relaxed was not recorded."""
    return " / ".join(_percent(group[METRIC_OF_RULE[rule]]) for rule in HEADLINES if METRIC_OF_RULE[rule] in group)


def _with_interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{_percent(found[name])} [{_percent(low)}, {_percent(high)}]"
