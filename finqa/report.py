"""metrics.md and its figure: the evaluations of one student side by side."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from finqa.metrics import compare
from finqa.paths import SPLITS, write_atomically
from finqa.predictions import Prediction, read_predictions
from finqa.prompts import EVAL_TYPES

ORDER = ("zero-shot", "few-shot", "fine-tuned")
assert set(ORDER) == set(EVAL_TYPES)
COLORS = {"zero-shot": "#0072B2", "few-shot": "#56B4E9", "fine-tuned": "#D55E00"}
"""Of the Okabe-Ito palette, which colour-blind readers can tell apart."""
FIGURE = "accuracy.png"


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation as its folder has it."""

    eval_type: str
    metrics: dict[str, Any]
    predictions: list[Prediction]


def write_report(folder: Path) -> Path:
    """Write metrics.md and accuracy.png into `R/<dataset>/<model-id>` from the split folders in it."""
    splits = {split: found for split in SPLITS if (found := _read(folder / split))}
    write_atomically(folder / FIGURE, _figure(splits))
    text = "\n".join([f"# {folder.name} on {folder.parent.name}", "", *_body(splits)])
    write_atomically(folder / "metrics.md", text)
    return folder / "metrics.md"


def _read(folder: Path) -> list[Evaluation]:
    return [
        Evaluation(name, json.loads((folder / name / "metrics.json").read_text()), read_predictions(folder / name))
        for name in ORDER
        if (folder / name / "metrics.json").exists()
    ]


def _body(splits: dict[str, list[Evaluation]]) -> list[str]:
    lines = [f"![accuracy by evaluation type and question family]({FIGURE})", ""]
    for split, evaluations in splits.items():
        lines += [f"## {split}", "", *_accuracy_table(evaluations), ""]
        if len(evaluations) > 1:
            lines += [*_paired_table(evaluations), ""]
        if any("by_family" in e.metrics for e in evaluations):
            lines += [*_family_table(evaluations), ""]
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
            e.eval_type,
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
        "The same rows in pairs (strict): right in one evaluation and wrong in the other, and the exact two-sided p of "
        "McNemar's test.",
        "",
        "| first | second | rows in both | only first right | only second right | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for first, second in combinations(evaluations, 2):
        n, only_first, only_second, p = compare(first.predictions, second.predictions)
        lines.append(_row([first.eval_type, second.eval_type, str(n), str(only_first), str(only_second), f"{p:.2g}"]))
    return lines


def _family_table(evaluations: list[Evaluation]) -> list[str]:
    types = [e.eval_type for e in evaluations]
    lines = [
        "By question family (strict, per cent). The base model knows the *known* families from its pretraining; the "
        "*new* ones are what fine-tuning adds.",
        "",
        _row(["family", "kind", "n", *types]),
        _row(["---"] * (3 + len(types))),
    ]
    for family in _families(evaluations):
        groups = [e.metrics.get("by_family", {}).get(family, {}) for e in evaluations]
        one = next(group for group in groups if group)
        shares = [_percent(group.get("accuracy")) for group in groups]
        lines.append(_row([family, one.get("kind", ""), str(one["n"]), *shares]))
    return lines


def _families(evaluations: list[Evaluation]) -> list[str]:
    """Known families before new ones, each in the order of names."""
    kinds: dict[str, str] = {}
    for e in evaluations:
        kinds |= {family: group.get("kind", "") for family, group in e.metrics.get("by_family", {}).items()}
    return sorted(kinds, key=lambda family: (kinds[family], family))


def _error_table(evaluations: list[Evaluation]) -> list[str]:
    kinds = sorted({kind for e in evaluations for kind in e.metrics["errors_by_kind"]})
    if not kinds:
        return ["Every program ran."]
    lines = ["Programs without an answer, by kind:", "", _row(["", *kinds]), _row(["---"] * (1 + len(kinds)))]
    for e in evaluations:
        counts = [str(e.metrics["errors_by_kind"].get(kind, 0)) for kind in kinds]
        lines += [_row([e.eval_type, *counts])]
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _with_interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"{_percent(found[name])} [{_percent(low)}, {_percent(high)}]"


def _figure(splits: dict[str, list[Evaluation]]) -> bytes:
    """Accuracy by evaluation type (left) and by question family (right), a row of panels a split; PNG bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(splits)), layout="constrained")
    panels = figure.subplots(len(splits), 2, squeeze=False, width_ratios=[1, 3])
    for (overall, by_family), (split, evaluations) in zip(panels, splits.items(), strict=True):
        _draw_overall(overall, split, evaluations)
        _draw_families(by_family, split, evaluations)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def _draw_overall(axes: Any, split: str, evaluations: list[Evaluation]) -> None:
    for place, e in enumerate(evaluations):
        _bar(axes, place, e.metrics, e.eval_type, 0.8)
    axes.set_xticks(range(len(evaluations)), [e.eval_type for e in evaluations])
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy (strict)")
    axes.set_title(f"{split}, n = {evaluations[0].metrics['n']}")


def _draw_families(axes: Any, split: str, evaluations: list[Evaluation]) -> None:
    families = _families(evaluations)
    if not families:
        axes.set_axis_off()
        return
    width = 0.8 / len(evaluations)
    names = []
    for place, family in enumerate(families):
        groups = [e.metrics.get("by_family", {}).get(family) for e in evaluations]
        names.append(family + (f" ({kind})" if (kind := next(g for g in groups if g).get("kind")) else ""))
        for number, (e, group) in enumerate(zip(evaluations, groups, strict=True)):
            if group:
                _bar(axes, place + (number - (len(evaluations) - 1) / 2) * width, group, e.eval_type, width)
    axes.set_xticks(range(len(families)), names, rotation=45, ha="right", fontsize=7)
    axes.set_ylim(0, 1)
    axes.set_title(f"{split}, by question family", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    # Above the panel: inside it would cover bars.
    axes.legend(unique.values(), unique.keys(), ncols=3, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))


def _bar(axes: Any, place: float, found: dict[str, Any], eval_type: str, width: float) -> None:
    low, high = found["accuracy_interval"]
    share = found["accuracy"]
    axes.bar(place, share, width, color=COLORS[eval_type], label=eval_type)
    axes.errorbar(place, share, [[max(0, share - low)], [max(0, high - share)]], color="black", lw=0.8, capsize=2)
