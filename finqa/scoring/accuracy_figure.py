"""The figure of metrics.md: accuracy by evaluation and by question family, with 95% intervals."""

from __future__ import annotations

import io
from typing import Any

from finqa.scoring.finished_evaluations import Evaluation, families

COLORS = {"zero-shot": "#0072B2", "few-shot": "#56B4E9", "fine-tuned": "#D55E00"}
"""Of the Okabe-Ito palette, which colour-blind readers can tell apart."""
TOP = 1.02
"""Of the axes: the end of an interval at 1 is seen."""


def accuracy_figure(splits: dict[str, list[Evaluation]]) -> bytes:
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
        _bar(axes, place, e.metrics, e, 0.8)
    labels = [e.eval_type + (f"\n{e.metrics['samples_per_row']} samples" if e.sampled else "") for e in evaluations]
    axes.set_xticks(range(len(evaluations)), labels, fontsize=8)
    axes.set_ylim(0, TOP)
    axes.set_ylabel("accuracy (strict)")
    counts = sorted({e.metrics["n"] for e in evaluations})
    axes.set_title(f"{split}, n = {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}")


def _draw_families(axes: Any, split: str, evaluations: list[Evaluation]) -> None:
    names_of = families(evaluations)
    if not names_of:
        axes.set_axis_off()
        return
    width = 0.8 / len(evaluations)
    names = []
    for place, family in enumerate(names_of):
        groups = [e.metrics.get("by_family", {}).get(family) for e in evaluations]
        names.append(family + (f" ({kind})" if (kind := next(g for g in groups if g).get("kind")) else ""))
        for number, (e, group) in enumerate(zip(evaluations, groups, strict=True)):
            if group:
                _bar(axes, place + (number - (len(evaluations) - 1) / 2) * width, group, e, width)
    axes.set_xticks(range(len(names_of)), names, rotation=45, ha="right", fontsize=7)
    axes.set_ylim(0, TOP)
    axes.set_xlim(-0.6, len(names_of) - 0.4)
    axes.set_title(f"{split}, by question family", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    # Above the panel: inside it would cover bars.
    axes.legend(
        unique.values(), unique.keys(), ncols=4, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
    )


def _bar(axes: Any, place: float, found: dict[str, Any], e: Evaluation, width: float) -> None:
    low, high = found["accuracy_interval"]
    share = found["accuracy"]
    # Hatched where samples voted; the colour is the eval type's.
    hatch = "///" if e.sampled else None
    axes.bar(place, share, width, color=COLORS[e.eval_type], hatch=hatch, edgecolor="white", lw=0.5, label=e.name)
    axes.errorbar(place, share, [[max(0, share - low)], [max(0, high - share)]], color="black", lw=0.8, capsize=2)
