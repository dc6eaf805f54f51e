"""The figure of a training run: loss, learning rate, gradient norm and speed over its updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.runtime.figures import BLUE, HEIGHT, WIDTH, new_figure, save_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("loss", "loss", "nats a token"),
    ("learning_rate", "learning rate", ""),
    ("grad_norm", "gradient norm", "before clipping"),
    ("tokens_per_second", "speed", "tokens a second"),
)
"""Key of a record, title, unit."""
SMOOTHED = 0.1
"""Share of the records that the running mean of the loss is taken over."""


def draw_training(log: Path, title: str) -> None:
    """Write training.png and training.svg beside a training log of at least one record; without one, nothing."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records:
        return
    save_figure(_figure(records, title), log.with_name("training"))


@styled
def _figure(records: Sequence[dict[str, Any]], title: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(2, 2 * WIDTH, 2 * HEIGHT, 2, sharex=True)
    figure.suptitle(title)
    steps = [record["step"] for record in records]
    for axis, (key, name, unit) in zip(axes.flat, PANELS, strict=True):
        values = [record[key] for record in records]
        many = len(values) > 1
        faint = key == "loss" and len(values) > 20
        label = "each record" if faint else None
        axis.plot(steps, values, color=BLUE, alpha=0.35 if faint else 1, marker="" if many else "o", label=label)
        if faint:
            axis.plot(steps, running_mean(values), color=BLUE, lw=1.4, label="running mean")
            axis.legend()
        axis.set_title(f"{name}, {unit}" if unit else name, loc="left")
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key != "learning_rate":
            axis.set_ylim(bottom=0, top=1.08 * max(values) or 1)
        else:
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in axes[1]:
        axis.set_xlabel("updates")
    return figure


def running_mean(values: Sequence[float]) -> list[float]:
    """Means over the records around each, fewer of them at the ends and as many on both sides."""
    half = max(1, round(SMOOTHED * len(values) / 2))
    means = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        around = values[place - reach : place + reach + 1]
        means.append(sum(around) / len(around))
    return means
