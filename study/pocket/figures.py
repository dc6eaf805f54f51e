"""The study's figures: what a whole site carries, what each method finds, what its latents cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.pocket.tables import named

Row = dict[str, str]
SITE_NAMES = {"attention": "attention output", "mlp": "MLP output", "residual": "residual stream"}
DIRECTIONS = {"sufficiency": "put into the base", "necessity": "taken out of the fine-tuned model"}
CARRIERS = {"own": "its own layers above", "other": "the other model's layers above"}


def draw_ceilings(rows: Sequence[Row], path: Path) -> None:
    """A heat map a direction and carrier: share of the KL by layer and site."""
    from matplotlib.figure import Figure

    layers, sites = sorted({int(row["layer"]) for row in rows}), list(SITE_NAMES)
    figure = Figure(figsize=(3.1 * len(layers) ** 0.5 + 2, 6.4), layout="constrained")
    grid: Any = figure.subplots(len(DIRECTIONS), len(CARRIERS), sharex=True, sharey=True, squeeze=False)
    image: Any = None
    for axes_row, (direction, what) in zip(grid, DIRECTIONS.items(), strict=True):
        for axes, (carrier, above) in zip(axes_row, CARRIERS.items(), strict=True):
            of = [row for row in rows if (row["direction"], row["carrier"]) == (direction, carrier)]
            closed = {(row["site"], int(row["layer"])): float(row["divergence_closed"]) for row in of}
            values = [[closed[site, layer] for layer in layers] for site in sites]
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    axes.text(x, y, f"{value:.0%}", ha="center", va="center", color="w" if value < 0.6 else "k", size=8)
            axes.set_title(f"{what},\n{above}", size=9)
            axes.set_xticks(range(len(layers)), map(str, layers))
            axes.set_yticks(range(len(sites)), [SITE_NAMES[site] for site in sites])
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    figure.colorbar(image, ax=grid, label="share of the KL on programs of added families", shrink=0.7)
    figure.savefig(path, dpi=130)


def draw_glance(rows: Sequence[Row], path: Path, stratum: str) -> None:
    """A panel a pair: for each method, latents that are specific to the families of each kind but the known."""
    from matplotlib.figure import Figure

    of = [row for row in rows if row["stratum"] == stratum]
    pairs = list(dict.fromkeys((row["pair"], row["site"]) for row in of))
    methods = list(dict.fromkeys(named(row) for row in of))[::-1]
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.9 + 2.5 * columns, 0.8 + (0.5 + 0.3 * len(methods)) * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, (pair, site) in zip(grid.flat, pairs, strict=False):
        its = {named(row): row for row in of if (row["pair"], row["site"]) == (pair, site)}
        places = [i for i, method in enumerate(methods) if method in its]
        found = [its[methods[i]] for i in places]
        for kind, offset, colour in (("new", 0.18, "tab:orange"), ("other", -0.18, "tab:blue")):
            values = [float(row[kind]) for row in found]
            below = [value - float(row[f"{kind} lowest"]) for value, row in zip(values, found, strict=True)]
            above = [float(row[f"{kind} highest"]) - value for value, row in zip(values, found, strict=True)]
            at = [i + offset for i in places]
            label = f"specific to {kind} families"
            axes.barh(at, values, 0.34, color=colour, label=label, xerr=[below, above], error_kw={"lw": 1})
        for i in sorted(set(range(len(methods))) - set(places)):
            axes.text(0, i, " not measured", color="grey", size=7, va="center")
        axes.set_title(f"{pair}\n{site}", size=8)
        axes.set_yticks(range(len(methods)), methods, size=8)
        axes.tick_params(axis="x", labelsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    what = f"latents or directions, {stratum};\nbars are means over fine-tunes, lines reach from lowest to highest"
    figure.supxlabel(what, size=8)
    figure.savefig(path, dpi=130)


CONTROLS = {
    "random sets": ("o", "random sets"),
    "random directions": (".", "random directions"),
    "components, equal norm": ("^", "PCA of the difference"),
    "untrained, equal norm": ("x", "untrained"),
    "frozen decoder, equal norm": ("+", "frozen decoder"),
    "sham, equal norm": ("s", "of the sham"),
}
"""Kind of a set -> its mark in the figure and what it is called there."""


def draw_recovered(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a carrier: share of the KL that sets recover against the norm that they inject, families that were added,
    first fine-tune; lines are the ranked sets of rising size, marks their controls."""
    from matplotlib.figure import Figure

    of_kl = [row for row in rows if (row["measure"], row["group"]) == ("divergence", "new")]
    of_kl = [row for row in of_kl if row["pair"] == of_kl[0]["pair"]]
    methods = list(dict.fromkeys(row["method"] for row in of_kl))
    colours = dict(zip(methods, ("tab:orange", "tab:blue"), strict=False))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels: Any = figure.subplots(1, len(CARRIERS), sharex=True, sharey=True)
    for axes, (carrier, above) in zip(panels, CARRIERS.items(), strict=True):
        for method in methods:
            its = [r for r in of_kl if (r["method"], r["carrier"]) == (method, carrier)]
            ranked = [r for r in its if r["kind"] == "ranked"]
            values = [float(r["recovered"]) for r in ranked]
            ends = [
                [v - float(r["recovered_low"]) for v, r in zip(values, ranked, strict=True)],
                [float(r["recovered_high"]) - v for v, r in zip(values, ranked, strict=True)],
            ]
            at = [float(r["injected_norm"]) for r in ranked]
            axes.errorbar(at, values, ends, marker="D", color=colours[method], label=f"{method}, best latents")
            for kind, (mark, called) in CONTROLS.items():
                marked = [r for r in its if r["kind"] == kind and r["recovered"] not in ("", None)]
                places = [float(r["injected_norm"]) for r in marked], [float(r["recovered"]) for r in marked]
                axes.plot(*places, mark, color=colours[method], alpha=0.7, mfc="none", label=f"{method}: {called}")
        axes.axhline(0, color="0.8", lw=0.8)
        axes.axhline(1, color="0.8", lw=0.8)
        axes.set_title(f"put into the base, {above}", size=9)
        axes.set_xlabel("norm of what is added, root mean square")
    figure.supylabel("share of the whole site's effect on the KL, new families", size=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=130)
