"""Shares of a gap, their intervals, and the tests beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from crosscoder.activations.collection import Document
from crosscoder.dashboard.summary import caused
from crosscoder.interventions.causal import Cell, Measured
from crosscoder.interventions.causal_rows import (
    AWAY,
    NO_GAP,
    Asked,
    mcnemar_of,
    p_above,
    resamples,
    rows_of,
    share_recovered,
)
from crosscoder.interventions.sets import Reading, sizes_to


class Named:
    """An addition that has a name alone."""

    def __init__(self, kind: str) -> None:
        self.label = {"kind": kind, "n": 1}
        self.reads = False

    def __call__(self, reading: Reading) -> torch.Tensor:
        raise AssertionError("nothing is measured here")


@pytest.mark.parametrize(
    ("direction", "none", "ceiling", "recovered", "why"),
    [
        ("sufficiency", 0.8, 0.2, 0.5, None),
        ("sufficiency", 0.8, 1.4, None, AWAY),
        ("sufficiency", 0.8, 0.8, None, NO_GAP),
        ("necessity", 0.0, 0.6, 0.5, None),
        ("necessity", 0.6, 0.0, None, AWAY),
    ],
)
def test_a_site_that_moves_the_models_apart_has_no_share(direction, none, ceiling, recovered, why):
    documents = [Asked(Document(str(i), (1, 2), 1)) for i in range(8)]
    values = {"none": none, "ceiling": ceiling, "ranked": (none + ceiling) / 2}
    cells = [Cell(Named(kind), direction, "own") for kind in values]
    measured = [Measured([value] * 8, [False] * 8, 0.0) for value in values.values()]
    found = rows_of(documents, cells, measured, {}, seed=0)
    [row] = [r for r in found["rows"] if (r["kind"], r["measure"]) == ("ranked", "divergence")]
    assert row["recovered"] == (recovered and pytest.approx(recovered)) and (row["interval"] is None) == bool(why)
    assert [note for note in found["notes"] if "divergence" in note] == (
        [f"all, divergence, {direction}, own, all: {why}"] if why else []
    )
    if direction == "sufficiency":
        [said] = caused([{**r, "recovered_low": None, "recovered_high": None} for r in found["rows"]])
        assert ("does not bring the instruct model nearer" in said) == bool(why) and ("50%" in said) == (not why)
        assert (f"estimated effect alone it is {values['ranked']:.3g}." in said) == bool(why)


def test_a_share_is_of_means_and_its_interval_holds_it():
    generator = torch.Generator().manual_seed(0)
    none, ceiling = torch.rand(200, generator=generator) + 1, torch.rand(200, generator=generator) / 4
    patched = none + 0.6 * (ceiling - none) + 0.3 * torch.randn(200, generator=generator)
    share = share_recovered(patched.tolist(), none.tolist(), ceiling.tolist(), resamples(200))
    expected = float((patched.mean() - none.mean()) / (ceiling.mean() - none.mean()))
    assert share.recovered == pytest.approx(expected, rel=1e-5) and share.n == 200
    assert share.interval is not None and share.interval[0] < expected < share.interval[1]
    assert share.interval[1] - share.interval[0] < 0.2


def test_the_interval_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(1)
    none, ceiling = rng.random(60) + 1, rng.random(60) / 4
    patched = none + 0.5 * (ceiling - none) + 0.2 * rng.standard_normal(60)

    def ratio(p, n, c, axis=-1):
        return (p.mean(axis) - n.mean(axis)) / (c.mean(axis) - n.mean(axis))

    theirs = stats.bootstrap(
        (patched, none, ceiling), ratio, paired=True, method="percentile", n_resamples=4000, rng=rng
    ).confidence_interval
    ours = share_recovered(patched.tolist(), none.tolist(), ceiling.tolist(), resamples(60, count=4000)).interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 draws of 80 questions, with a true share of 0.4."""
    generator, weights, covered = torch.Generator().manual_seed(2), resamples(80, count=400), 0
    for _ in range(200):
        none = 1 + torch.rand(80, generator=generator, dtype=torch.float64)
        patched = none - 0.4 * 1.5 + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64)
        ceiling = none - 1.5 + 0.2 * torch.randn(80, generator=generator, dtype=torch.float64)
        interval = share_recovered(patched.tolist(), none.tolist(), ceiling.tolist(), weights).interval
        assert interval is not None
        covered += interval[0] <= 0.4 <= interval[1]
    assert 180 <= covered <= 199


def test_without_a_gap_there_is_no_share():
    same = [0.5, 0.25, 1.0, 0.0] * 5
    share = share_recovered([v + 1 for v in same], same, same, resamples(20))
    assert share.recovered is None and share.interval is None and share.gap_interval == [0, 0]
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert share_recovered(noise, [0.0] * 50, noise, resamples(50)).recovered is None


def test_resamples_without_a_gap_are_left_out():
    """With few questions of right and wrong some resamples have no gap: the interval is of the others."""
    share = share_recovered([1, 1, 0, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 0, 0], resamples(6))
    assert share.recovered == 0.5 and share.interval is not None
    assert all(0 <= end <= 1 for end in share.interval)


def test_the_same_seed_draws_the_same_questions():
    assert torch.equal(resamples(30, 1), resamples(30, 1)) and not torch.equal(resamples(30, 1), resamples(30, 2))
    torch.testing.assert_close(resamples(30).sum(1), torch.ones(2000, dtype=torch.float64))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ(pairs):
    first, second = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar_of([a for a, _ in pairs], [b for _, b in pairs]) == pytest.approx(expected)


def test_a_value_above_all_draws_of_the_null_has_the_smallest_p():
    assert p_above(1.0, [0.1] * 19) == 1 / 20 and p_above(0.0, [0.1] * 19) == 1
    assert p_above(0.1, [0.1, 0.0, 0.2]) == 3 / 4


def test_sizes_double_up_to_all():
    assert sizes_to(20) == [1, 2, 4, 8, 16, 20] and sizes_to(8) == [1, 2, 4, 8] and sizes_to(0) == []
