"""Figures of a crosscoder, as matplotlib figures; `save_figure` writes them as PNG and SVG.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.reading import analysis
from crosscoder.reading.analysis import ExplainedVariance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

INSTRUCT, FINE_TUNED, BOTH, OTHER = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
WIDTH, HEIGHT = 6.4, 3.8
"""Inches."""
PNG_DPI = 200


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `<path>.png` and `<path>.svg`; the SVG is the same for the same data."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
    figure.savefig(png, dpi=PNG_DPI)
    with matplotlib.rc_context({"svg.hashsalt": "crosscoder", "svg.fonttype": "path"}):
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def relative_norm_figure(norms: Tensor) -> Figure:
    """Histogram of the relative decoder norm of [latent, 2] `norms`, with the classes' regions and counts."""
    relative = analysis.relative_decoder_norm(norms)
    kinds = analysis.classify(analysis.delta(norms))
    figure, axes = _figure()
    axes.hist(relative.tolist(), bins=100, range=(0, 1), color=OTHER, log=True)
    low = analysis.relative_norm_at(analysis.INSTRUCT_ONLY_BELOW)
    high = analysis.relative_norm_at(analysis.FINE_TUNED_ONLY_ABOVE)
    shared = tuple(map(analysis.relative_norm_at, analysis.SHARED))
    regions: Sequence[tuple[analysis.LatentClass, float, float, str]] = (
        ("instruct-only", 0.0, low, INSTRUCT),
        ("shared", shared[0], shared[1], BOTH),
        ("fine-tuned-only", high, 1.0, FINE_TUNED),
    )
    for kind, left, right, colour in regions:
        axes.axvspan(left, right, color=colour, alpha=0.15, lw=0)
        axes.text(
            (left + right) / 2,
            1.02,
            f"{kind}\n{kinds.count(kind):,}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=colour,
            fontsize="small",
        )
    axes.set(xlim=(0, 1), ylim=(0.7, None), ylabel="latents")
    axes.set_xlabel("relative decoder norm  $n_1 / (n_0 + n_1)$   (0: instruct, 1: fine-tuned)")
    return figure


def cosine_figure(cosines: Tensor, norms: Tensor) -> Figure:
    """Histogram of the cosine between the two decoder vectors of the shared ones among the latents."""
    kinds = analysis.classify(analysis.delta(norms))
    values = [cosine for cosine, kind in zip(cosines.tolist(), kinds, strict=True) if kind == "shared"]
    figure, axes = _figure()
    axes.hist(values, bins=60, range=(min([0.0, *values]), 1), color=BOTH, log=True)
    axes.set(ylim=(0.7, None), ylabel="latents", xlabel="cosine of instruct and fine-tuned decoder vector")
    axes.set_title(f"{len(values):,} shared latents", fontsize="medium", loc="left")
    return figure


def explained_variance_figure(explained: ExplainedVariance) -> Figure:
    """Bars of the explained variance of either model and of their difference; of a difference SAE the last alone."""
    all_bars = (
        ("instruct", explained.instruct, INSTRUCT),
        ("fine-tuned", explained.fine_tuned, FINE_TUNED),
        ("difference", explained.difference, OTHER),
    )
    bars = {name: (value, colour) for name, value, colour in all_bars if value is not None}
    figure, axes = _figure()
    drawn = axes.bar(
        list(bars), [value for value, _ in bars.values()], width=0.6, color=[colour for _, colour in bars.values()]
    )
    axes.bar_label(drawn, [f"{value:.3f}" for value, _ in bars.values()], padding=2)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(ylim=(min(0.0, 1.15 * min(value for value, _ in bars.values())), 1.08), ylabel="explained variance")
    axes.set_title(
        f"held-out documents, {explained.n_tokens:,} tokens, L0 {explained.l0:.1f}", fontsize="medium", loc="left"
    )
    return figure


def training_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Loss, explained variance, dead share over the steps of a training log."""
    figure, panels = _figure(panels=3)
    steps = [record["step"] for record in records]
    loss, variance, dead = panels
    loss.plot(steps, [record["loss"] for record in records], color="black")
    loss.set(ylabel="loss", yscale="log" if records else "linear")
    of_models = (("instruct", INSTRUCT), ("fine-tuned", FINE_TUNED))
    of_difference = (("difference", OTHER),)
    one_input = bool(records) and len(records[0]["explained_variance"]) == 1
    for m, (name, colour) in enumerate(of_difference if one_input else of_models):
        values = [record["explained_variance"][m] for record in records]
        variance.plot(steps, values, color=colour, label=name, ls="-" if m == 0 else "--")
    variance.set(ylabel="explained variance\n(training batch)", ylim=(0, 1))
    variance.legend(frameon=False, fontsize="small", loc="lower right")
    shares = [100 * record["dead_share"] for record in records]
    dead.plot(steps, shares, color="black")
    dead.set(ylabel="dead latents (%)", ylim=(0, max([5, *(1.05 * share for share in shares)])))
    for axes in panels:
        axes.set_xlabel("step")
    return figure


def _figure(panels: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * (1 if panels == 1 else 1.7), HEIGHT), layout="constrained")
    drawn: Any = figure.subplots(1, panels)
    for axes in [drawn] if panels == 1 else drawn:
        _plain(axes)
    return figure, drawn


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
