"""The study's figures: what a whole site carries, and the table at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """A panel a pair: for each method, latents that are specific to an added family, and to any other."""
    from matplotlib.figure import Figure

    of = [row for row in rows if row["stratum"] == stratum]
    pairs = list(dict.fromkeys((row["pair"], row["site"]) for row in of))
    methods = list(dict.fromkeys(row["method"] for row in of))[::-1]
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.9 + 2.5 * columns, 0.8 + (0.5 + 0.3 * len(methods)) * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, (pair, site) in zip(grid.flat, pairs, strict=False):
        its = {row["method"]: row for row in of if (row["pair"], row["site"]) == (pair, site)}
        for name, offset, colour in (
            ("specific to added", 0.18, "tab:orange"),
            ("specific to others", -0.18, "tab:blue"),
        ):
            places = [i for i, method in enumerate(methods) if method in its]
            found = [its[methods[i]] for i in places]
            values = [float(row[name]) for row in found]
            spread = [
                [value - float(row[f"{name} lowest"]) for value, row in zip(values, found, strict=True)],
                [float(row[f"{name} highest"]) - value for value, row in zip(values, found, strict=True)],
            ]
            at = [i + offset for i in places]
            axes.barh(at, values, 0.34, color=colour, label=name, xerr=spread, error_kw={"lw": 1})
        axes.set_title(f"{pair}\n{site}", size=8)
        axes.set_yticks(range(len(methods)), methods, size=8)
        axes.tick_params(axis="x", labelsize=8)
    grid[0][0].legend(fontsize=7)
    what = f"latents or directions, {stratum};\nbars are means over seeds, lines reach from lowest to highest"
    figure.supxlabel(what, size=8)
    figure.savefig(path, dpi=130)
