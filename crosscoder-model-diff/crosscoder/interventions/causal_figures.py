"""Figures of patches: the ceilings of every site as a heat map, and what sets of latents recover against their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crosscoder.analysis.figures import BOTH, FINE_TUNED, INSTRUCT, OTHER
from crosscoder.interventions.patching import Ceiling
from crosscoder.names import SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CeilingMeasure = Literal["divergence_closed", "exact_recovered"]
NAMES = {
    "divergence_closed": "share of KL(fine-tuned || model)",
    "exact_recovered": "share of exact programs",
    "divergence": "KL(fine-tuned || patched)",
    "exact": "exact programs",
    "accuracy": "execution accuracy",
    "share_runs": "programs that run",
}
COLOURS = {
    "ranked": FINE_TUNED,
    "worst": INSTRUCT,
    "worst half by nu": INSTRUCT,
    "components": BOTH,
    "mean difference": "#CC79A7",
    "bias": "#E69F00",
    "random sets": OTHER,
    "random directions": "#56B4E9",
}
RIVALS = ("#000000", "#F0E442", "#8C564B")
"""Colours of other dictionaries."""
BANDS = ("random sets", "random directions")
FLAT = ("mean difference", "bias")
"""Controls without a number of latents."""


def ceiling_figure(found: Sequence[Ceiling], measure: CeilingMeasure = "divergence_closed") -> Figure:
    """Sites by layers, a panel for each direction and carrier; in brackets what the carrier's layers do unpatched.

    Empty where the models leave no gap.
    """
    from matplotlib.figure import Figure

    panels = sorted({(c.direction, c.carrier) for c in found}, key=lambda panel: (panel[0] != "sufficiency", panel[1]))
    layers = sorted({c.target.layer for c in found})
    sites = [site for site in reversed(SITES) if any(c.target.site == site for c in found)]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (columns * (1.6 + 0.75 * len(layers)), rows * (1.1 + 0.5 * len(sites)))
    figure = Figure(figsize=size, layout="constrained")
    drawn: Any = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in drawn.flat[len(panels) :]:
        axes.axis("off")
    for (direction, carrier), axes in zip(panels, drawn.flat, strict=False):
        by_place = {
            (c.target.site, c.target.layer): c for c in found if (c.direction, c.carrier) == (direction, carrier)
        }
        values = [[_value(by_place.get((site, layer)), measure) for layer in layers] for site in sites]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        _annotate(axes, by_place, sites, layers, measure)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(sites)), sites)
        upper = {"own": "own layers above", "other": "the other model's layers above"}[carrier]
        axes.set_title(f"{direction}, {upper}", fontsize="medium", loc="left")
        axes.set_xlabel("layer")
    if image is not None:
        label = f"{NAMES[measure]}\n{found[0].n} programs"
        figure.colorbar(image, ax=drawn.ravel().tolist(), label=label, shrink=0.8)
    return figure


def _value(ceiling: Ceiling | None, measure: CeilingMeasure) -> float:
    return float("nan") if ceiling is None else getattr(ceiling, measure)


def _annotate(
    axes: Axes, by_place: Mapping[Any, Ceiling], sites: Sequence[str], layers: Sequence[int], measure: CeilingMeasure
) -> None:
    for (site, layer), ceiling in by_place.items():
        value = _value(ceiling, measure)
        if math.isnan(value):
            continue
        text = f"{value:.2f}"
        if ceiling.carrier == "other" and measure == "divergence_closed":
            text += f"\n({ceiling.unpatched_closed:.2f})"
        colour = "black" if value > 0.6 else "white"
        place = (layers.index(layer), sites.index(site))
        axes.text(*place, text, ha="center", va="center", color=colour, fontsize="small")


def recovered_figure(report: Mapping[str, Any], measure: str = "divergence", group: str = "all") -> Figure:
    """Recovered share against the number of latents, log scale; a panel for each direction, carrier and positions.

    Lines: the ranked sets with their 95% interval, and controls. Bands: lowest to highest of the random sets. A panel's
    title has the measure's values with nothing patched (0) and with the whole site (1); one without a gap says so.
    """
    from matplotlib.figure import Figure

    rows = [r for r in report["rows"] if r["measure"] == measure and r["group"] == group]
    panels = list(dict.fromkeys((r["direction"], r["carrier"], r["positions"]) for r in rows))
    columns = min(2, max(1, len(panels)))
    height = math.ceil(max(1, len(panels)) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * height), layout="constrained")
    drawn: Any = figure.subplots(height, columns, squeeze=False)
    for axes in drawn.flat[len(panels) :]:
        axes.axis("off")
    handles: dict[str, Any] = {}
    for panel, axes in zip(panels, drawn.flat, strict=False):
        its = [r for r in rows if (r["direction"], r["carrier"], r["positions"]) == panel]
        _panel(axes, its, panel, measure)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
                      fontsize="small")  # fmt: skip
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], panel: tuple[str, str, str], measure: str) -> None:
    direction, carrier, positions = panel
    axes.spines[["top", "right"]].set_visible(False)
    # A share of a small gap looks like one of a large gap, so the gap is there too.
    gap = f"0: {rows[0]['none']:.3g}, 1: {rows[0]['ceiling']:.3g}"
    axes.set_title(f"{direction}, carrier {carrier}, positions {positions}\n{gap}", fontsize="medium", loc="left")
    axes.set(xlabel="latents (or directions)", ylabel=f"recovered share\n{NAMES.get(measure, measure)}")
    shown = [r for r in rows if r["recovered"] is not None]
    ranked = sorted((r for r in shown if r["kind"] == "ranked"), key=lambda r: r["n_latents"])
    if not shown:
        axes.text(0.5, 0.5, "nothing to recover", transform=axes.transAxes, ha="center", color=OTHER)
        return
    axes.set_xscale("log", base=2)
    for level in (0, 1):
        axes.axhline(level, color="black", lw=0.6, ls=":")
    kinds = dict.fromkeys(r["kind"] for r in rows if r["kind"] not in ("none", "ceiling"))
    others = [kind for kind in kinds if kind not in COLOURS]
    colours = COLOURS | dict(zip(others, RIVALS * len(others), strict=False))
    for kind in kinds:
        its = [r for r in shown if r["kind"] == kind]
        if kind in BANDS:
            _band(axes, its, kind, colours[kind])
        elif kind in FLAT:
            for row in its:
                axes.axhline(row["recovered"], color=colours[kind], lw=1, ls="--", label=kind)
        else:
            its = sorted(its, key=lambda r: r["n_latents"])
            x, y = [r["n_latents"] for r in its], [r["recovered"] for r in its]
            axes.plot(x, y, color=colours[kind], marker="o", ms=3, lw=1.8 if kind == "ranked" else 1, label=kind)
    axes.fill_between(
        [r["n_latents"] for r in ranked],
        [r["interval"][0] for r in ranked],
        [r["interval"][1] for r in ranked],
        color=COLOURS["ranked"],
        alpha=0.2,
        lw=0,
    )


def _band(axes: Axes, rows: Sequence[Mapping[str, Any]], kind: str, colour: str) -> None:
    """From the lowest to the highest of each size."""
    by_size: dict[int, list[float]] = {}
    for row in rows:
        by_size.setdefault(row["n_latents"], []).append(row["recovered"])
    sizes = sorted(by_size)
    low, high = ([end(by_size[size]) for size in sizes] for end in (min, max))
    axes.fill_between(sizes, low, high, color=colour, alpha=0.35, lw=1, label=kind)
