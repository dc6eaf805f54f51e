"""The headline figure: right answers against injected norm, a line a method; beside it the sixteen metrics, hit where
added and where absent, by the ranking of the verdicts and by 1 - nu."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finqa.runtime.figures import GREY, save_figure, styled
from study.invented.diff.plan import ADDED, BY_NU, COMPONENTS, ENDS, ENERGY, METHODS, RANDOM, TOP
from study.invented.verdicts import Rates

Row = Mapping[str, Any]
SHOWN = (ENERGY, BY_NU)
"""Rankings whose hits are shown."""
BASELINES = {COMPONENTS: "--", RANDOM: ":"}


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """From the lines of items.csv and causal_norm.csv, as text; writes `path` as PNG, and as SVG beside it."""
    items = [row for row in tables["items"] if row["primary"] == "True"]
    save_figure(_figure(items, tables["causal_norm"]), path.with_suffix(""))


def curves(carried: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """For every method, by ascending norm: injected norm and share of right answers on the arm's own metrics, over all
    pairs; the sets at their own norm and at its multiples, and the whole site."""
    shown = {*METHODS, *BASELINES, ENDS}
    sums: dict[tuple[str, float], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for row in carried:
        form = "trained" if row["method"] in METHODS else "baseline"
        if row["method"] in shown and row["form"] == form and row["group"] == "own" and not row["scaled_to"]:
            found = sums[row["method"], float(row["multiple"])]
            found[0] += float(row["right"])
            found[1] += float(row["n"])
            found[2] += float(row["norm"])
            found[3] += 1
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), (right, n, norm, rows) in sums.items():
        lines[method].append((norm / rows, right / n))
    return {method: sorted(points) for method, points in lines.items()}


def hit_rates(items: Sequence[Row], ranking: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Trained methods; metrics; and for every metric the hit rate of each method where the metric was added, then where
    it was absent: not a number where that was not measured."""
    items = [row for row in items if (row["ranking"], row["form"]) == (ranking, "trained") and row["arm"] in ADDED]
    methods = [method for method in METHODS if any(row["method"] == method for row in items)]
    metrics = sorted({(row["kind"], row["metric"]) for row in items})
    values: list[list[float]] = [[] for _ in metrics]
    for method in methods:
        rates = Rates.of(items, method, "trained")
        for line, added, absent in zip(values, rates.added.mean(dim=1), rates.absent.mean(dim=1), strict=True):
            line += [float(added), float(absent)]
    return methods, [f"{name} ({kind})" for kind, name in metrics], values


@styled
def _figure(items: Sequence[Row], carried: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    shown = {ranking: hit_rates(items, ranking) for ranking in SHOWN}
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    widths = [max(1, len(methods)) for methods, _, _ in shown.values()]
    left, *panels = figure.subplots(1, 1 + len(shown), width_ratios=(0.9 * max(widths), *widths))
    for method, points in curves(carried).items():
        x, y = zip(*points, strict=True)
        if method == ENDS:
            left.plot(x, y, "k*", label=ENDS)
        else:
            left.plot(x, y, BASELINES.get(method, "-"), marker="o", markersize=2.5, label=method,
                      color=GREY if method in BASELINES else None)  # fmt: skip
    left.set_xlabel("injected norm (root mean square a token)\nmultiples of a set's own norm: fewer pages")
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
