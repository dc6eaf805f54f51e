"""Figures that show latents one by one, or how they are spread: decoder norms, cosines, latent scaling, frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crosscoder.analysis import figure_data
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.figures import BOTH, FINE_TUNED, INSTRUCT, OTHER
from crosscoder.analysis.latent_scaling import MIN_FIRINGS, NU_ERR_BELOW, NU_RANGE, NU_REC_BELOW
from finqa.runtime.figures import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from crosscoder.analysis.figure_data import Histogram, ScalingPoints
    from crosscoder.analysis.latent_scaling import LatentScaling
    from crosscoder.analysis.measures import LatentClass

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
