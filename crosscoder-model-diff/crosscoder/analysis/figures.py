"""Figures of a crosscoder, as matplotlib figures; `save_figure` writes them as PNG and SVG.

Where two kinds of thing share an axis, their markers or lines differ as well as their colours. After the figures of a
whole dictionary come those that show latents one by one, or how they are spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crosscoder.analysis import figure_data
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import MIN_FIRINGS, NU_ERR_BELOW, NU_RANGE, NU_REC_BELOW
from crosscoder.analysis.measures import ExplainedVariance
from finqa.runtime.figures import BLUE, GREEN, GREY, VERMILION, WIDTH, new_figure, styled
from finqa.runtime.figures import save_figure as save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from crosscoder.analysis.figure_data import Histogram, ScalingPoints
    from crosscoder.analysis.latent_scaling import LatentScaling
    from crosscoder.analysis.measures import LatentClass
    from crosscoder.analysis.token_kinds import KindExplained

INSTRUCT, FINE_TUNED, BOTH, OTHER = BLUE, VERMILION, GREEN, GREY
LOWEST_SHOWN = -0.5
"""An explained variance below this is drawn at the edge, with its value beside it."""
COLOURS: dict[LatentClass, str] = {
    "instruct-only": INSTRUCT,
    "shared": BOTH,
    "fine-tuned-only": FINE_TUNED,
    "between": OTHER,
}
MARKERS: dict[LatentClass, str] = {"instruct-only": "<", "shared": "o", "fine-tuned-only": ">", "between": "s"}
DRAWN_FIRST: tuple[LatentClass, ...] = ("shared", "between", "instruct-only", "fine-tuned-only")
"""Order of drawing: the largest classes first, so that they lie below the others."""
MANY = 2000
"""Number of points above which a scatter is an image inside the SVG: as paths it would be megabytes, and slow."""
RELATIVE_NORM = "relative decoder norm  $n_1 / (n_0 + n_1)$"


@styled
def explained_variance_figure(explained: ExplainedVariance) -> Figure:
    """Bars of the explained variance of either model and of their difference; of a difference SAE the last alone."""
    colours = {"instruct": INSTRUCT, "fine-tuned": FINE_TUNED, "difference": OTHER}
    bars = explained.parts
    figure, axes = new_figure()
    drawn = axes.bar(list(bars), list(bars.values()), width=0.6, color=[colours[name] for name in bars])
    axes.bar_label(drawn, [f"{value:.3f}" for value in bars.values()], padding=2)
    axes.axhline(0, color="black", lw=0.6)
    lowest = min(0.0, *bars.values())
    room_for_a_label = 0.12 * (1 - lowest)
    below = lowest - room_for_a_label if lowest < 0 else 0.0
    beside = (len(colours) - len(bars)) / 2  # one bar alone is no wider than one of three
    axes.set(
        xlim=(-0.6 - beside, len(bars) - 0.4 + beside), ylim=(below, 1 + room_for_a_label), ylabel="explained variance"
    )
    axes.set_title(f"held-out documents, {explained.n_tokens:,} tokens, L0 {explained.l0:.1f}", loc="left")
    return figure


@styled
def explained_variance_by_kind_figure(found: Sequence[KindExplained]) -> Figure:
    """A line for every kind of token, with the explained variance of either model and of the difference.

    About the mean of those very tokens. What is not a number is left out; what lies below LOWEST_SHOWN is drawn there.
    """
    if {"chat", "frame"} & {each.kind for each in found}:
        found = [each for each in found if each.kind != "template"]  # the sum of those two
    # The two models are often alike, so each has a height of its own within the line.
    series = (
        ("instruct", INSTRUCT, "<", -0.14),
        ("fine_tuned", FINE_TUNED, ">", 0.14),
        ("difference", "black", "D", 0),
    )
    figure, axes = new_figure(height=0.9 + 0.22 * len(found))
    for name, colour, marker, shift in series:
        values = {y + shift: getattr(each.own_mean, name) for y, each in enumerate(found)}
        there = {y: value for y, value in values.items() if value is not None and value == value}
        if not there:
            continue
        shown = [max(value, LOWEST_SHOWN) for value in there.values()]
        axes.plot(shown, list(there), marker, color=colour, ms=4, lw=0, label=name.replace("_", "-"), alpha=0.9)
        for y, value in there.items():
            if value < LOWEST_SHOWN:
                axes.annotate(f"{value:.1f}", (LOWEST_SHOWN, y), (5, 0), textcoords="offset points", va="center",
                              color=colour, fontsize=6)  # fmt: skip
    axes.set_yticks(range(len(found)), [f"{each.kind}  ({each.own_mean.n_tokens:,})" for each in found])
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9", lw=0.5)
    axes.axvline(0, color="black", lw=0.6)
    lowest = min([0.0, *(value for each in found for value in each.own_mean[:4] if value is not None)])
    axes.set(xlim=(max(lowest, LOWEST_SHOWN) - 0.05, 1.03), xlabel="explained variance, held-out")
    axes.set_ylabel("kind of token (number)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, handletextpad=0.1)
    return figure


@styled
def training_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Loss, explained variance, dead share over the steps of a training log."""
    figure, panels = new_figure(panels=3, width=2 * WIDTH, height=2.2)
    steps = [record["step"] for record in records]
    loss, variance, dead = panels
    loss.plot(steps, [record["loss"] for record in records], color="black")
    loss.set(ylabel="loss", yscale="log" if records else "linear")
    of_models = (("instruct", INSTRUCT), ("fine-tuned", FINE_TUNED))
    of_difference = (("difference", OTHER),)
    in_stages = bool(records) and records[0].get("stage") is not None
    one_input = bool(records) and len(records[0]["explained_variance"]) == 1 and not in_stages
    for m, (name, colour) in enumerate(of_difference if one_input else of_models):
        if in_stages:  # a stagewise SAE reads one model, and then the other
            values = [record["explained_variance"][0] if record["stage"] == m else math.nan for record in records]
        else:
            values = [record["explained_variance"][m] for record in records]
        variance.plot(steps, values, color=colour, label=name, ls="-" if m == 0 else "--")
    of_pair = [record.get("explained_variance_of_difference") for record in records]
    if any(value is not None for value in of_pair):  # a log of an earlier version has none
        shown = [math.nan if value is None else value for value in of_pair]
        variance.plot(steps, shown, color=OTHER, label="difference", ls=":")
    variance.set(ylabel="explained variance\n(training batch)", ylim=(0, 1))
    variance.legend(loc="lower right")
    shares = [100 * record["dead_share"] for record in records]
    dead.plot(steps, shares, color="black")
    dead.set(ylabel="dead latents (%)", ylim=(0, max([5, *(1.05 * share for share in shares)])))
    for axes in panels:
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=4)
    return figure


@styled
def relative_norm_figure(norms: Tensor) -> Figure:
    """Histogram of the relative decoder norm of [latent, 2] `norms`, with the classes' regions and counts."""
    figure, axes = new_figure()
    shown = figure_data.relative_norms(norms)
    axes.stairs(shown.counts, shown.edges, fill=True, color="0.35")
    _class_regions(axes)
    for kind, low, high, n in figure_data.class_counts(norms):
        _above(axes, (low + high) / 2, kind, n)
    axes.set(xlim=(0, 1), yscale="log", ylim=(0.7, max(10.0, 1.6 * max(shown.counts, default=0))), ylabel="latents")
    axes.set_xlabel(RELATIVE_NORM)
    return figure


@styled
def cosine_figure(cosines: Tensor, norms: Tensor, kinds: Sequence[LatentClass] | None = None) -> Figure:
    """Cosine of a latent's two decoder vectors against its relative norm, by class (by Delta where none are given).

    A latent whose vector has no length in one of the models has no cosine (not a number), and is counted in the title.
    """
    figure, axes = new_figure()
    relative, kinds = analysis.relative_decoder_norm(norms), kinds or analysis.classify(analysis.delta(norms))
    there = ~cosines.isnan()
    _class_regions(axes)
    for kind in DRAWN_FIRST:
        chosen = [j for j, its in enumerate(kinds) if its == kind and there[j]]
        _scatter(axes, relative[chosen], cosines[chosen], kind, many=int(there.sum()) > MANY)
    lowest = float(cosines[there].min()) if there.any() else 0.0
    axes.set(xlim=(0, 1), ylim=(min(-0.05, lowest - 0.05), 1.05), ylabel="cosine of decoder vectors")
    axes.set_xlabel(RELATIVE_NORM)
    n_without = int((~there).sum())
    if n_without:
        axes.set_title(f"{n_without:,} latents with a vector of no length are left out", loc="left")
    _legend(figure, axes)
    return figure


@styled
def latent_scaling_figure(scaling: LatentScaling, kinds: Sequence[LatentClass], dead: Tensor) -> Figure:
    """nu_rec against nu_err by class, with the regions that latent scaling cuts (figure_data.scaling_points).

    The legend says how many latents of each class are exclusive, of how many that are drawn.
    """
    figure, axes = new_figure(height=2.9)
    points = figure_data.scaling_points(scaling, kinds, dead)
    low, high = NU_RANGE
    axes.axhspan(low, NU_REC_BELOW, xmax=(NU_ERR_BELOW - low) / (high - low), color=BOTH, alpha=0.18, lw=0)
    axes.axvline(NU_ERR_BELOW, color="0.3", lw=0.6, ls="--")
    axes.axhline(NU_REC_BELOW, color="0.3", lw=0.6, ls="--")
    for kind in DRAWN_FIRST:
        if kind in points:
            of = points[kind]
            many = sum(each.n for each in points.values()) > MANY
            _scatter(axes, of.nu_err, of.nu_rec, kind, many, f"{of.regions['exclusive']:,} of ")
    axes.set(xlim=NU_RANGE, ylim=NU_RANGE, xlabel="$\\nu_\\mathrm{err}$\n", ylabel=r"$\nu_\mathrm{rec}$")
    _name_regions(axes)
    figure.text(0.99, 0.005, _left_out(points), ha="right", va="bottom", fontsize=6, color="0.25")
    _legend(figure, axes, title="class (exclusive ones, of all that are drawn)")
    return figure


@styled
def frequency_figure(shown: Mapping[LatentClass | None, Histogram], n_dead: int, n_tokens: int) -> Figure:
    """How often latents are active, a line a class (figure_data.frequencies), on two log axes."""
    figure, axes = new_figure()
    styles = {"instruct-only": "-.", "shared": "-", "fine-tuned-only": "--", "between": ":"}
    for kind, of in shown.items():
        if kind is None:
            axes.stairs(of.counts, of.edges, fill=True, color="0.35")
        else:
            axes.stairs(of.counts, of.edges, color=COLOURS[kind], ls=styles[kind], lw=1.2, label=f"{kind} ({of.n:,})")
    highest = max((count for of in shown.values() for count in of.counts), default=0)
    axes.set(xscale="log", yscale="log", ylim=(0.7, max(10.0, 1.6 * highest)))
    axes.set(xlim=(1 / (2 * n_tokens), 1), xlabel="share of tokens on which a latent is active", ylabel="latents")
    axes.set_title(f"{n_tokens:,} tokens; {n_dead:,} latents are active on none", loc="left")
    if None not in shown:
        _legend(figure, axes)
    return figure


def _class_regions(axes: Axes) -> None:
    at = analysis.relative_norm_at
    for kind, low, high in figure_data.STRETCHES:
        if kind != "between":
            axes.axvspan(at(low), at(high), color=COLOURS[kind], alpha=0.15, lw=0, zorder=0)


def _above(axes: Axes, x: float, kind: LatentClass, n: int) -> None:
    """A class's name and count above the axes, at relative norm `x`."""
    name = kind.replace("-only", "\nonly") if kind.endswith("-only") else f"\n{kind}"
    axes.text(
        x,
        1.02,
        f"{name}\n{n:,}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color=COLOURS[kind],
        fontsize=7,
        linespacing=1.1,
    )


def _scatter(axes: Axes, x: Any, y: Any, kind: LatentClass, many: bool, some: str = "") -> None:
    """Draw the points of one class; the legend has their number, after the text `some`. With `many` points in the
    figure they are drawn as an image, and those of no exclusive class are small."""
    label, colour, marker = f"{kind} ({some}{len(x):,})", COLOURS[kind], MARKERS[kind]
    size, alpha = (6, 0.6) if kind.endswith("-only") or not many else (1.5, 0.35)
    axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=alpha, lw=0, label=label, rasterized=many)


def _legend(figure: Figure, axes: Axes, title: str = "") -> None:
    from matplotlib.collections import PathCollection

    handles, labels = axes.get_legend_handles_labels()
    layout: Any = {"loc": "outside upper left", "ncols": 2, "handletextpad": 0.3, "columnspacing": 1.0}
    legend = figure.legend(handles, labels, **layout, title=title, title_fontsize=7, alignment="left")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
            if isinstance(handle, PathCollection):
                handle.set_sizes([10])


def _name_regions(axes: Axes) -> None:
    """Write each region's name into its outer corner, upright in the narrow regions on the left."""
    from matplotlib.patheffects import withStroke

    low, high = NU_RANGE
    near, far = low + 0.03, high - 0.03
    places: Sequence[tuple[str, float, float, Literal["left", "right"], Literal["bottom", "top"], int]] = (
        ("exclusive", near, near, "left", "bottom", 90),
        ("latent decoupling", near, far, "left", "top", 90),
        ("complete shrinkage", far, near, "right", "bottom", 0),
        ("both", far, far, "right", "top", 0),
    )
    for name, x, y, ha, va, rotation in places:
        text = axes.text(x, y, name, ha=ha, va=va, rotation=rotation, fontsize=6.5, color="0.15")
        text.set_path_effects([withStroke(linewidth=2, foreground="white", alpha=0.8)])  # points may lie below it


def _left_out(points: Mapping[LatentClass, ScalingPoints]) -> str:
    too_few, outside = (sum(getattr(of, name) for of in points.values()) for name in ("too_few", "outside"))
    return f"left out: {too_few:,} with under {MIN_FIRINGS} firings, {outside:,} without a usable slope"
