"""The study's figures: what a whole site carries, what each method finds, what its latents cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A panel a pair: for each method, latents that are specific to the families of each kind but the known."""
    from matplotlib.figure import Figure

    of = [row for row in rows if row["stratum"] == stratum]
    pairs = list(dict.fromkeys((row["pair"], row["site"]) for row in of))
    methods = list(dict.fromkeys(row["method"] for row in of))[::-1]
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.9 + 2.5 * columns, 0.8 + (0.5 + 0.3 * len(methods)) * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, (pair, site) in zip(grid.flat, pairs, strict=False):
        its = {row["method"]: row for row in of if (row["pair"], row["site"]) == (pair, site)}
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
    what = f"latents or directions, {stratum};\nbars are means over seeds, lines reach from lowest to highest"
    figure.supxlabel(what, size=8)
    figure.savefig(path, dpi=130)


def draw_recovered(rows: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a direction and carrier: share of the KL that sets of latents recover against their size, new families;
    as bands what random sets do, as single marks the other controls of one size."""
    from matplotlib.figure import Figure

    def of(of_rows: Sequence[Mapping[str, Any]], direction: str, carrier: str) -> list[Mapping[str, Any]]:
        wanted = {"measure": "divergence", "group": "new", "direction": direction, "carrier": carrier}
        return [row for row in of_rows if all(row[name] == value for name, value in wanted.items())]

    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, ("tab:orange", "tab:blue", "tab:green"), strict=False))
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    grid: Any = figure.subplots(len(DIRECTIONS), len(CARRIERS), sharex=True, sharey=True, squeeze=False)
    for axes_row, (direction, what) in zip(grid, DIRECTIONS.items(), strict=True):
        for axes, (carrier, above) in zip(axes_row, CARRIERS.items(), strict=True):
            its = of(rows, direction, carrier)
            for method in methods:
                ranked = [r for r in its if r["method"] == method and r["kind"] == "ranked"]
                sizes = [int(r["n_latents"]) for r in ranked]
                values = [float(r["recovered"]) for r in ranked]
                spread = [
                    [v - float(r["recovered_low"]) for v, r in zip(values, ranked, strict=True)],
                    [float(r["recovered_high"]) - v for v, r in zip(values, ranked, strict=True)],
                ]
                axes.errorbar(sizes, values, spread, marker="o", color=colours[method], label=f"{method}, best latents")
                for row in of(controls, direction, carrier):
                    if row["method"] == method and row["control"] == "random sets":
                        at, low, high = int(row["n_latents"]), float(row["lowest"]), float(row["highest"])
                        label = f"{method}, random sets"
                        axes.plot([at, at], [low, high], color=colours[method], lw=5, alpha=0.35, label=label)
            for kind, marker, label in (
                ("components", "^", "PCA of the difference"),
                ("difference SAE of base -> sham", "x", "difference SAE of the sham"),
            ):
                marked = next((r for r in its if r["kind"] == kind), None)
                if marked is not None:
                    axes.plot(int(marked["n_latents"]), float(marked["recovered"]), f"k{marker}", label=label)
            axes.axhline(0, color="0.8", lw=0.8)
            axes.axhline(1, color="0.8", lw=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
            axes.set_title(f"{what},\n{above}", size=9)
    for axes in grid[-1]:
        axes.set_xlabel("latents or directions")
    figure.supylabel("share of the whole site's effect on the KL, new families", size=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
