"""The figure of metrics.md: accuracy by evaluation and by group of questions, with 95% intervals.

A full bar is accuracy under the strict rule; the pale bar behind it goes up to accuracy under the relaxed rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finqa.evaluation.finished import ANSWER_KINDS, FAMILIES, STEPS, Evaluation, Grouping
from finqa.evaluation.metrics import METRIC_OF_RULE
from finqa.runtime.figures import BLUE, SKY_BLUE, VERMILION, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"zero-shot": BLUE, "few-shot": SKY_BLUE, "fine-tuned": VERMILION}
PALE = 0.35
"""Opacity of the relaxed rule's bars."""
FEWEST = 10
"""Questions of a group that is drawn, families aside: the interval of fewer fills the panel."""
TOP = 1.02
"""Upper end of the axes: the end of an interval at 1 is seen."""


@styled
def accuracy_figure(splits: dict[str, list[Evaluation]]) -> Figure:
    """Accuracy by evaluation type (left) and by group of questions (right), a row of panels a split."""
    figure, panels = new_figure(2, 9, 2.8 * len(splits), len(splits), squeeze=False, width_ratios=[1, 3])
    for (overall, by_group), (split, evaluations) in zip(panels, splits.items(), strict=True):
        _draw_overall(overall, split, evaluations)
        _draw_groups(by_group, split, evaluations)
    return figure


def _draw_overall(axes: Any, split: str, evaluations: list[Evaluation]) -> None:
    for place, e in enumerate(evaluations):
        _bars(axes, place, e.metrics, e, 0.8)
    labels = [e.eval_type + (f"\n{e.metrics['samples_per_row']} samples" if e.sampled else "") for e in evaluations]
    axes.set_xticks(range(len(evaluations)), labels)
    axes.set_ylim(0, TOP)
    axes.set_ylabel("accuracy (full: strict, pale: relaxed)")
    counts = sorted({e.metrics["n"] for e in evaluations})
    axes.set_title(f"{split}, n = {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}")


def _draw_groups(axes: Any, split: str, evaluations: list[Evaluation]) -> None:
    """Question families where the data set has them, else the kinds of answer and the steps of the gold program."""
    if names := FAMILIES.names(evaluations):
        shown, title = [(FAMILIES, name) for name in names], "question family"
    else:
        shown, title = [(g, name) for g in (ANSWER_KINDS, STEPS) for name in g.names(evaluations)], "answer and steps"
    groups = [[grouping.of(e).get(name) for e in evaluations] for grouping, name in shown]
    places = [place for place, group in enumerate(groups) if max(g["n"] for g in group if g) >= FEWEST or names]
    if not places:
        axes.set_axis_off()
        return
    width = 0.8 / len(evaluations)
    labels = []
    for place, index in enumerate(places):
        labels.append(_label(*shown[index], evaluations))
        for number, (e, group) in enumerate(zip(evaluations, groups[index], strict=True)):
            if group:
                _bars(axes, place + (number - (len(evaluations) - 1) / 2) * width, group, e, width)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if names else {}
    axes.set_xticks(range(len(places)), labels, **turned)
    axes.set_ylim(0, TOP)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_title(f"{split}, by {title}", loc="left")
    handles, types = axes.get_legend_handles_labels()
    unique = dict(zip(types, handles, strict=True))
    # Above the panel: inside it would cover bars.
    axes.legend(unique.values(), unique.keys(), ncols=4, loc="lower right", bbox_to_anchor=(1, 1))


def _label(grouping: Grouping, name: str, evaluations: list[Evaluation]) -> str:
    n = max(group["n"] for e in evaluations if (group := grouping.of(e).get(name)))
    if grouping is FAMILIES:
        kind = grouping.kind(evaluations, name)
        return f"{name} ({kind}, n = {n})" if kind else f"{name} (n = {n})"
    steps = "" if grouping is ANSWER_KINDS else " step" if name == "1" else " steps"
    return f"{name}{steps}\nn = {n}"


def _bars(axes: Any, place: float, found: dict[str, Any], e: Evaluation, width: float) -> None:
    """The bars of both rules, one before the other, each with its interval; old figures have no relaxed rule."""
    # Hatched where samples voted; the colour is the eval type's.
    look: dict[str, Any] = {"color": COLORS[e.eval_type], "hatch": "///" if e.sampled else None, "edgecolor": "white"}
    relaxed, strict = METRIC_OF_RULE["relaxed"], METRIC_OF_RULE["strict"]
    if relaxed in found:
        axes.bar(place, found[relaxed], width, lw=0.5, alpha=PALE, **look)
        _interval(axes, place + width / 6, found, relaxed, "0.5")
    axes.bar(place, found[strict], width, lw=0.5, label=e.name, **look)
    _interval(axes, place - width / 6 if relaxed in found else place, found, strict, "black")


def _interval(axes: Any, place: float, found: dict[str, Any], name: str, color: str) -> None:
    share, (low, high) = found[name], found[f"{name}_interval"]
    reach = [[max(0, share - low)], [max(0, high - share)]]
    axes.errorbar(place, share, reach, color=color, lw=0.8, capsize=1.5)
