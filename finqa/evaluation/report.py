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
        lines += [f"## {split}", "", *_accuracy_table(evaluations)]
        if any(_disputed(e) for e in evaluations):
            lines += _undisputed_table(evaluations)
        lines += _paired_table(evaluations) + _sample_table(evaluations)
        for grouping in GROUPINGS:
            lines += _group_table(grouping, evaluations)
        lines += _error_table(evaluations)
    return lines


def _accuracy_table(evaluations: list[Evaluation]) -> list[str]:
    rows = []
    for e in evaluations:
        m = e.metrics
        headlines = [f"**{_with_interval(m, METRIC_OF_RULE[rule])}**" for rule in HEADLINES]
        solved = ""
        if "n_teacher_solved" in m:
            solved = f"{_with_interval(m, 'accuracy_teacher_solved')}, n {m['n_teacher_solved']}"
        reported = _with_interval(m, METRIC_OF_RULE["reported"])
        rows.append([e.name, m["n"], *headlines, reported, solved, _percent(m["share_runs"])])
    return _table(
        "Accuracy in per cent, with its 95% interval (Wilson). An answer is right under the strict rule where it is "
        "the label to five decimals. The relaxed rule also takes a relative error of 0.001, and per cent for a "
        "fraction or a fraction for per cent. The reported rule is looser still. Teacher-solved: the rows whose label "
        "the teacher's program gave.",
        ["", "n", "**strict**", "**relaxed**", "reported rule", "teacher-solved (strict)", "programs that run"],
        rows,
    )


def _disputed(e: Evaluation) -> int:
    return e.metrics["n"] - e.metrics.get("n_undisputed", e.metrics["n"])


def _undisputed_table(evaluations: list[Evaluation]) -> list[str]:
    rows = []
    for e in evaluations:
        if "n_undisputed" in e.metrics:
            shares = [_with_interval(e.metrics, f"{METRIC_OF_RULE[rule]}_undisputed") for rule in HEADLINES]
            rows.append([e.name, _disputed(e), e.metrics["n_undisputed"], *shares])
    return _table(
        "Without disputed labels: the rows left out are those where what the report's annotator wrote contradicts the "
        "label by more than rounding, per cent, unit or sign, so that one of the two is wrong.",
        ["", "left out", "n", "strict", "relaxed"],
        rows,
    )


def _paired_table(evaluations: list[Evaluation]) -> list[str]:
    rows = []
    for first, second in combinations(evaluations, 2):
        for rule in HEADLINES:
            n, only_first, only_second, p = compare(first.predictions, second.predictions, rule)
            counts = [n, only_first + only_second, only_first, only_second]
            rows.append([first.name, second.name, rule, *counts, f"{p:.2g}"])
    return _table(
        "The same rows in pairs: how many only one of two evaluations has right (discordant), and the exact two-sided "
        "p of McNemar's test.",
        ["first", "second", "rule", "rows in both", "discordant", "only first right", "only second right", "p"],
        rows,
    )


def _sample_table(evaluations: list[Evaluation]) -> list[str]:
    shares = ("accuracy_per_sample", "accuracy", "any_sample_right", "share_runs_per_sample")
    return _table(
        "Self-consistency (strict, per cent): what a single sample is worth, what the vote over all of a row is, and "
        "in how many rows any sample is right.",
        ["", "samples a row", "a sample right", "the vote right", "any sample right", "a sample runs"],
        [
            [e.name, e.metrics["samples_per_row"], *(_percent(e.metrics[share]) for share in shares)]
            for e in evaluations
            if e.sampled
        ],
    )


def _group_table(grouping: Grouping, evaluations: list[Evaluation]) -> list[str]:
    names = grouping.names(evaluations)
    kinds = {name: kind for name in names if (kind := grouping.kind(evaluations, name))}
    rows = []
    for name in names:
        groups = [grouping.of(e).get(name, {}) for e in evaluations]
        n = next(group["n"] for group in groups if group)
        rows.append([name, *([kinds.get(name, "")] if kinds else []), n, *map(_headlines, groups)])
    return _table(
        f"{grouping.title} (strict / relaxed, per cent). {grouping.note}".rstrip(),
        [grouping.column, *(["kind"] if kinds else []), "n", *(e.name for e in evaluations)],
        rows,
    )


def _error_table(evaluations: list[Evaluation]) -> list[str]:
    kinds = sorted({kind for e in evaluations for kind in e.metrics["errors_by_kind"]})
    if not kinds:
        return ["Every program ran.", ""]
    counts = [[e.name, *(e.metrics["errors_by_kind"].get(kind, 0) for kind in kinds)] for e in evaluations]
    return _table("Programs without an answer, by kind:", ["", *kinds], counts)


def _table(caption: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table below its caption, with an empty line after it; nothing where the table has no rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return [caption, "", *lines, ""]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _headlines(group: dict[str, Any]) -> str:
    """Accuracy under both rules; the strict one alone where the relaxed was not recorded."""
    return " / ".join(_percent(group[METRIC_OF_RULE[rule]]) for rule in HEADLINES if METRIC_OF_RULE[rule] in group)


def _with_interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{_percent(found[name])} [{_percent(low)}, {_percent(high)}]"
