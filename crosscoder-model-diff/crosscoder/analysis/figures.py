"""Figures of a crosscoder, as matplotlib figures; `save_figure` writes them as PNG and SVG.

Where two kinds of thing share an axis, their markers or lines differ as well as their colours. latent_figures.py has
those of latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crosscoder.analysis.measures import ExplainedVariance
from finqa.runtime.figures import BLUE, GREEN, GREY, VERMILION, WIDTH, new_figure, styled
from finqa.runtime.figures import save_figure as save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crosscoder.analysis.token_kinds import KindExplained

INSTRUCT, FINE_TUNED, BOTH, OTHER = BLUE, VERMILION, GREEN, GREY
LOWEST_SHOWN = -0.5
"""An explained variance below this is drawn at the edge, with its value beside it."""


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
