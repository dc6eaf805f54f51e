"""The figure of patches: what sets of latents recover against their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crosscoder.analysis.figures import BOTH, FINE_TUNED, INSTRUCT, OTHER
from finqa.runtime.figures import SKY_BLUE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ranked": FINE_TUNED,
    "worst": INSTRUCT,
    "worst half by nu": "#332288",
    "components": BOTH,
    "mean difference": "#CC79A7",
    "bias": "#E69F00",
    "random sets": OTHER,
    "random directions": SKY_BLUE,
}
RIVALS = ("#000000", "#F0E442", "#8C564B")
"""Colours of other dictionaries."""
BANDS = ("random sets", "random directions")
FLAT = ("mean difference", "bias")
"""Controls without a number of latents."""


@styled
def recovered_figure(report: Mapping[str, Any]) -> Figure:
    """Recovered share of the KL against the number of latents, log scale; a panel for each direction and carrier.

    Lines: the ranked sets with their 95% interval, and controls. Bands: lowest to highest of the random sets. A panel's
    title has the measure's values with nothing patched (0) and with the whole site (1); one without a gap says so, and
    one whose whole site moves the patched model the other way shows the KL itself.
    """
    rows = [r for r in report["rows"] if (r["measure"], r["group"]) == ("divergence", "all")]
    panels = list(dict.fromkeys((r["direction"], r["carrier"], r["positions"]) for r in rows))
    columns = min(2, max(1, len(panels)))
    height = math.ceil(max(1, len(panels)) / columns)
    figure, drawn = new_figure(columns, 3.6 * columns, 2.8 * height, height, squeeze=False)
    for axes in drawn.flat[len(panels) :]:
        axes.axis("off")
    handles: dict[str, Any] = {}
    for panel, axes in zip(panels, drawn.flat, strict=False):
        its = [r for r in rows if (r["direction"], r["carrier"], r["positions"]) == panel]
        _panel(axes, its, panel)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], panel: tuple[str, str, str]) -> None:
    direction, carrier, positions = panel
    # A share of a small gap looks like one of a large gap, so the gap is there too.
    gap = f"0: {rows[0]['none']:.3g}, 1: {rows[0]['ceiling']:.3g}"
    axes.set_title(f"{direction}, carrier {carrier}, positions {positions}\n{gap}", loc="left")
    axes.set(xlabel="latents (or directions)", ylabel="recovered share\nKL(fine-tuned || patched)")
    shown, y, levels = [r for r in rows if r["recovered"] is not None], "recovered", (0, 1)
    low, high = rows[0]["gap_interval"]
    if not shown and low <= 0 <= high:
        axes.text(0.5, 0.5, "nothing to recover", transform=axes.transAxes, ha="center", color=OTHER)
        return
    if not shown:
        shown, y, levels = rows, "value", (rows[0]["none"], rows[0]["ceiling"])
        axes.set(ylabel="KL(fine-tuned || patched), nats\n(the whole site recovers nothing)")
    ranked = sorted((r for r in shown if r["kind"] == "ranked" and r["interval"]), key=lambda r: r["n_latents"])
    axes.set_xscale("log", base=2)
    for level in levels:
        axes.axhline(level, color="black", lw=0.6, ls=":")
    kinds = dict.fromkeys(r["kind"] for r in rows if r["kind"] not in ("none", "ceiling"))
    others = [kind for kind in kinds if kind not in COLOURS]
    colours = COLOURS | dict(zip(others, RIVALS * len(others), strict=False))
    for kind in kinds:
        its = [r for r in shown if r["kind"] == kind]
        if kind in BANDS:
            _band(axes, its, y, kind, colours[kind])
        elif kind in FLAT:
            for row in its:
                axes.axhline(row[y], color=colours[kind], lw=1, ls="--", label=kind)
        else:
            its = sorted(its, key=lambda r: r["n_latents"])
            places, heights = [r["n_latents"] for r in its], [r[y] for r in its]
            width = 1.8 if kind == "ranked" else 1
            axes.plot(places, heights, color=colours[kind], marker="o", ms=3, lw=width, label=kind)
    axes.fill_between(
        [r["n_latents"] for r in ranked],
        [r["interval"][0] for r in ranked],
        [r["interval"][1] for r in ranked],
        color=COLOURS["ranked"],
        alpha=0.2,
        lw=0,
    )


def _band(axes: Axes, rows: Sequence[Mapping[str, Any]], y: str, kind: str, colour: str) -> None:
    """From the lowest to the highest of each size."""
    by_size: dict[int, list[float]] = {}
    for row in rows:
        by_size.setdefault(row["n_latents"], []).append(row[y])
    sizes = sorted(by_size)
    low, high = ([end(by_size[size]) for size in sizes] for end in (min, max))
    axes.fill_between(sizes, low, high, color=colour, alpha=0.35, lw=1, label=kind)
