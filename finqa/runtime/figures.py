"""One look for all figures, as matplotlib figures without pyplot, which would keep every figure and choose a window
system; `save_figure` writes them as PNG and SVG.

As wide as a column of a paper, with type that can be read there.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from finqa.runtime.paths import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, SKY_BLUE, VERMILION, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#7F7F7F"
"""Colours of the Okabe-Ito palette, which colour-blind readers can tell apart."""
WIDTH, HEIGHT = 3.4, 2.5
"""Inches."""
PNG_DPI = 300
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "crosscoder",
    "svg.fonttype": "path",
}

Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in STYLE, whatever the settings of the process are."""

    @wraps(draw)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `<path>.png` and `<path>.svg`; the SVG is the same for the same data."""
    written = []
    for kind in ("png", "svg"):
        written.append(path.with_name(f"{path.name}.{kind}"))
        write_atomically(written[-1], image_of(figure, kind))
    return written


def image_of(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a PNG or SVG file."""
    import matplotlib

    image = io.BytesIO()
    # Ticks are made when a figure is drawn, so the style holds here too.
    with matplotlib.rc_context(STYLE):
        figure.savefig(image, format=kind, dpi=PNG_DPI, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()


def new_figure(
    panels: int = 1, width: float = WIDTH, height: float = HEIGHT, rows: int = 1, **grid: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, an array of them where there are several; `panels` are those of one of the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, panels, **grid)
