"""Figures of patches show the figures that they are given."""

from __future__ import annotations

import pytest

from crosscoder.analysis.figures import save_figure
from crosscoder.interventions.causal_figures import COLOURS, RIVALS, recovered_figure


def row(kind, n, recovered, direction="sufficiency", carrier="own", measure="divergence", group="all"):
    interval = None if recovered is None else [recovered - 0.1, recovered + 0.1]
    return {"kind": kind, "n_latents": n, "seed": 0, "direction": direction, "carrier": carrier, "positions": "all",
            "measure": measure, "group": group, "recovered": recovered, "interval": interval, "none": 1.5,
            "value": 1.5 - n, "ceiling": 0.25, "gap_interval": [-1.3, -1.2]}  # fmt: skip


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
    rows = [row("ranked", 1, 0.5), row("none", 0, None, carrier="other") | {"gap_interval": [-0.1, 0.1]}]
    own, other = recovered_figure({"rows": rows}).axes[:2]
    assert [text.get_text() for text in other.texts] == ["nothing to recover"] and not own.texts


def test_where_the_whole_site_moves_the_models_apart_the_kl_itself_is_drawn():
    rows = [row(kind, n, None) for kind, n in (("none", 0), ("ranked", 2), ("ranked", 1), ("random sets", 1))]
    (axes,) = recovered_figure({"rows": rows}).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["ranked"] == [[1, 0.5], [2, -0.5]] and "nats" in axes.get_ylabel()
    assert [line.get_ydata()[0] for line in axes.lines[:2]] == [1.5, 0.25]


def test_no_two_kinds_of_set_have_one_colour():
    assert len({*COLOURS.values(), *RIVALS}) == len(COLOURS) + len(RIVALS)


def test_sizes_without_a_share_are_left_out():
    """As where a measure's gap is within its interval for a set alone."""
    rows = [row("ranked", 1, 0.5), row("ranked", 2, None), row("ranked", 4, 0.7)]
    (axes,) = recovered_figure({"rows": rows}).axes
    assert {line.get_label(): len(line.get_xdata()) for line in axes.lines}["ranked"] == 2
