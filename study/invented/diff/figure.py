"""The headline figure: right answers against injected norm, a line a method, of its first items and of more; beside it
the sixteen metrics, hit where added and where absent, by the ranking of the verdicts and by 1 - nu."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finqa.runtime.figures import GREY, save_figure, styled
from study.invented.diff.plan import (
    ADDED,
    ALL,
    BY_NU,
    COMPONENTS,
    DECODED,
    ENDS,
    ENERGY,
    FIRST,
    METHODS,
    RANDOM,
    TOP,
)
from study.invented.verdicts import Rates

Row = Mapping[str, Any]
SHOWN = (ENERGY, BY_NU)
"""Rankings whose hits are shown."""
BASELINES = {COMPONENTS: "--", RANDOM: ":"}
WIDER = (*(f"first {n}" for n in FIRST), ALL, DECODED)
"""Sets of more items, in their order."""


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """From the lines of items.csv, causal_norm.csv and explored.csv, as text; writes `path` as PNG, and as SVG beside
    it."""
    items = [row for row in tables["items"] if row["primary"] == "True"]
    save_figure(_figure(items, tables["causal_norm"], tables["explored"]), path.with_suffix(""))


def curves(carried: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """For every method, by ascending norm: injected norm and share of right answers on the arm's own metrics, over all
    pairs; the sets at their own norm and at its multiples, and the whole site."""
    own = [row for row in carried if row["group"] == "own" and not row["scaled_to"]]
    return {method: sorted(points.values()) for method, points in _points(own, "multiple").items()}


def wider(explored: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """The same for the sets of WIDER, in that order."""
    found = _points([row for row in explored if row["method"] != ENDS], "set")
    return {method: [points[name] for name in WIDER if name in points] for method, points in found.items()}


def _points(rows: Sequence[Row], by: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Norm and share by method and the value of a column, over all pairs."""
    shown = {*METHODS, *BASELINES, ENDS}
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0] * 4))
    for row in rows:
        form = "trained" if row["method"] in METHODS else "baseline"
        if row["method"] in shown and row["form"] == form:
            found = sums[row["method"]][row[by]]
            for place, value in enumerate((row["right"], row["n"], row["norm"], 1)):
                found[place] += float(value)
    return {
        method: {name: (norm / count, right / n) for name, (right, n, norm, count) in sets.items()}
        for method, sets in sums.items()
    }


def hit_rates(items: Sequence[Row], ranking: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Trained methods; metrics; and for every metric the hit rate of each method where the metric was added, then where
    it was absent: not a number where that was not measured."""
    items = [row for row in items if (row["ranking"], row["form"]) == (ranking, "trained") and row["arm"] in ADDED]
    methods = [method for method in METHODS if any(row["method"] == method for row in items)]
    metrics = sorted({(row["kind"], row["metric"]) for row in items})
    values: list[list[float]] = [[] for _ in metrics]
    for method in methods:
        rates = Rates.of(items, method, "trained")
        for line, added, absent in zip(values, rates.added.nanmean(dim=1), rates.absent.nanmean(dim=1), strict=True):
            line += [float(added), float(absent)]
    return methods, [f"{name} ({kind})" for kind, name in metrics], values


@styled
def _figure(items: Sequence[Row], carried: Sequence[Row], explored: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shown = {ranking: hit_rates(items, ranking) for ranking in SHOWN}
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    widths = [max(1, len(methods)) for methods, _, _ in shown.values()]
    left, *panels = figure.subplots(1, 1 + len(shown), width_ratios=(0.9 * max(widths), *widths))
    more = wider(explored)
    for method, points in curves(carried).items():
        x, y = zip(*points, strict=True)
        if method == ENDS:
            left.plot(x, y, "k*", label=ENDS)
            continue
        (line,) = left.plot(x, y, BASELINES.get(method, "-"), marker="o", markersize=2.5, label=method,
                            color=GREY if method in BASELINES else None)  # fmt: skip
        if more.get(method):
            left.plot(*zip(*more[method], strict=True), linewidth=0.6, marker="o", markersize=3, markerfacecolor="w",
                      linestyle=line.get_linestyle(), color=line.get_color())  # fmt: skip
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel(f"injected norm (root mean square a token)\nfull: first {TOP} items, at multiples of their norm\n"
                    f"hollow: {', '.join(WIDER)}")  # fmt: skip
    left.set_ylabel("right answers on the metrics that were added")
    left.set_ylim(-0.02, 1.02)
    if left.lines:
        left.legend(fontsize=5.5)
    for panel, (ranking, (methods, metrics, values)) in zip(panels, shown.items(), strict=True):
        panel.set_title(f"hits of the first {TOP} by {ranking}", fontsize=7)
        if not methods:
            panel.set_axis_off()
            continue
        panel.set_facecolor("0.85")
        image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_xticks([2 * i + 0.5 for i in range(len(methods))], methods, rotation=40, ha="right", fontsize=6)
        is_first = panel is panels[0]
        panel.set_yticks(range(len(metrics)) if is_first else [], metrics if is_first else [], fontsize=5.5)
        panel.set_xlabel("each: where added | where absent\ngrey: not measured", fontsize=6)
        for place in range(1, len(methods)):
            panel.axvline(2 * place - 0.5, color="w", linewidth=1)
        if panel is panels[-1]:
            figure.colorbar(image, ax=panels, label="hit rate", shrink=0.8)
    return figure
