"""Figures of patches show the figures that they are given."""

from __future__ import annotations

import pytest

from crosscoder.activations.readers import Target
from crosscoder.analysis.figures import save_figure
from crosscoder.interventions.causal_figures import ceiling_figure, recovered_figure
from crosscoder.interventions.patching import Ceiling


def ceiling(layer, site, direction="sufficiency", carrier="own", closed=0.25, unpatched=0.0):
    return Ceiling(Target(layer, site), direction, carrier, closed, 0.5, 0.75, unpatched, 0.0, 40)


def row(kind, n, recovered, direction="sufficiency", carrier="own", measure="divergence", group="all"):
    interval = None if recovered is None else [recovered - 0.1, recovered + 0.1]
    return {"kind": kind, "n_latents": n, "seed": 0, "direction": direction, "carrier": carrier, "positions": "all",
            "measure": measure, "group": group, "recovered": recovered, "interval": interval, "none": 1.5,
            "ceiling": 0.25}  # fmt: skip


def written(axes):
    return sorted(text.get_text() for text in axes.texts)


def test_the_heat_map_has_a_cell_for_every_layer_and_site(tmp_path):
    found = [
        ceiling(layer, site, direction, carrier, closed, 0.5 if carrier == "other" else 0.0)
        for layer, closed in ((1, 0.25), (3, 0.875))
        for site in ("mlp", "residual")
        for direction in ("sufficiency", "necessity")
        for carrier in ("own", "other")
    ]
    figure = ceiling_figure(found)
    panels = figure.axes[:4]
    assert [panel.get_title(loc="left").split(",")[0] for panel in panels] == [
        *["sufficiency"] * 2, *["necessity"] * 2,
    ]  # fmt: skip
    other, own = panels[:2]
    assert written(own) == sorted(["0.25", "0.88"] * 2)
    assert written(other) == sorted(["0.25\n(0.50)", "0.88\n(0.50)"] * 2)
    image = own.images[0].get_array()
    assert image.shape == (2, 2) and image.tolist() == [[0.25, 0.875]] * 2
    assert [label.get_text() for label in own.get_xticklabels()] == ["1", "3"]
    assert all(path.stat().st_size > 5_000 for path in save_figure(figure, tmp_path / "ceilings"))
    assert written(ceiling_figure(found, "exact_recovered").axes[1]) == ["0.75"] * 4


def test_without_a_gap_the_heat_map_is_empty():
    figure = ceiling_figure([ceiling(1, "mlp", closed=float("nan"))])
    assert written(figure.axes[0]) == []


def test_recovered_shares_are_drawn_against_the_number_of_latents(tmp_path):
    rows = [row("none", 0, 0.0), row("ceiling", 0, 1.0), row("mean difference", 0, 0.3), row("difference SAE", 4, 0.7)]
    rows += [row("ranked", n, n / 10) for n in (4, 1, 8)]
    rows += [row("random sets", 4, share) for share in (0.05, -0.02, 0.1)]
    rows += [row("ranked", 4, 0.9, group="new"), row("ranked", 4, 0.8, measure="exact")]
    figure = recovered_figure({"rows": rows})
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["ranked"] == [[1, pytest.approx(0.1)], [4, pytest.approx(0.4)], [8, pytest.approx(0.8)]]
    assert lines["difference SAE"] == [[4, 0.7]] and lines["mean difference"][0][1] == 0.3
    band = next(c for c in axes.collections if c.get_label() == "random sets")
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (-0.02, 0.1)
    assert axes.get_xscale() == "log" and axes.get_title(loc="left").endswith("0: 1.5, 1: 0.25")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) == 4
    assert all(path.stat().st_size > 5_000 for path in save_figure(figure, tmp_path / "recovered"))


def test_a_panel_for_each_direction_and_carrier_and_one_without_a_gap_says_so():
    rows = [row("ranked", 1, 0.5), row("ranked", 1, None, carrier="other"), row("none", 0, None, carrier="other")]
    own, other = recovered_figure({"rows": rows}).axes
    assert written(other) == ["nothing to recover"] and written(own) == []


def test_sizes_without_a_share_are_left_out():
    """As where a measure's gap is within its interval for a set alone."""
    rows = [row("ranked", 1, 0.5), row("ranked", 2, None), row("ranked", 4, 0.7)]
    (axes,) = recovered_figure({"rows": rows}).axes
    assert {line.get_label(): len(line.get_xdata()) for line in axes.lines}["ranked"] == 2
