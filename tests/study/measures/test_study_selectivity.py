"""AUROC, halves and the permutation null against what can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_questions import made_up_questions
from torch import Tensor

from study.measures.auroc import auroc, auroc_estimate, auroc_interval, auroc_sparse, share
from study.measures.nulls import PermutationNull, permutation_null, permuted
from study.measures.scores import StratumScores
from study.measures.selectivity import Selectivity, halves, selectivity


def by_counting_pairs(values: Tensor, positive: Tensor) -> float:
    """[n] and [n] bool: pairs of a positive and a negative in which the positive has more, ties by half."""
    above = values[positive][:, None] - values[~positive][None]
    return float(((above > 0).double() + 0.5 * (above == 0)).mean())


def noise(n_questions: int, n_items: int, seed: int) -> StratumScores:
    generator = torch.Generator().manual_seed(seed)
    return StratumScores(torch.randn(n_questions, n_items, generator=generator), torch.arange(n_questions))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(pairs):
    values = torch.tensor([[float(v), -float(v)] for v, _ in pairs])
    label = torch.tensor([c for _, c in pairs])
    classes = label[:, None] == torch.arange(3)
    areas = auroc(values, classes)
    for item in range(2):
        for number in range(3):
            positive = classes[:, number]
            if positive.all() or not positive.any():
                assert areas[item, number].isnan()
            else:
                assert areas[item, number].item() == by_counting_pairs(values[:, item], positive)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_from_the_positive_values_alone_is_the_same(rows):
    dense = torch.tensor([[float(a), float(b), 0.0] for a, b, _ in rows])
    positive = torch.tensor([p for _, _, p in rows])
    row, item = dense.nonzero(as_tuple=True)
    n = int(positive.sum())
    sparse = auroc_sparse(item, dense[row, item], positive[row], 3, n, len(rows))
    assert torch.equal(sparse.nan_to_num(nan=-1), auroc(dense, positive[:, None])[:, 0].nan_to_num(nan=-1))


def test_the_interval_is_exact_at_one_half_and_proper_at_the_ends():
    low, high = auroc_interval(0.5, 100, 200)
    # Where the interval's own ends are near 1/2, their standard error is that of the exact null.
    assert (high - 0.5) == pytest.approx(1.96 * (301 / (12 * 100 * 200)) ** 0.5, rel=0.02)
    assert high - 0.5 == pytest.approx(0.5 - low)
    for n, others in ((1, 1), (1, 500), (7, 900)):
        assert auroc_interval(1.0, n, others)[1] == 1.0
        assert 0 < auroc_interval(1.0, n, others)[0] < 1
        assert auroc_interval(0.0, n, others) == pytest.approx([1 - x for x in auroc_interval(1.0, n, others)[::-1]])
    wide, narrow = auroc_interval(0.8, 5, 50), auroc_interval(0.8, 50, 500)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_interval_holds_the_true_area_about_as_often_as_it_says(shift):
    generator = torch.Generator().manual_seed(0)
    true = float(torch.special.ndtr(torch.tensor(shift / 2**0.5)))
    positive = torch.arange(60) < 10
    held = 0
    for _ in range(400):
        values = torch.randn(60, generator=generator) + shift * positive
        estimate = auroc_estimate(values, positive)
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= true <= estimate.high
    assert 0.91 <= held / 400 <= 0.995


def test_an_empty_class_has_no_figure_and_what_is_not_a_number_is_left_out():
    values, none = torch.tensor([1.0, 2.0, torch.nan]), torch.zeros(3, dtype=torch.bool)
    assert auroc_estimate(values, none).value is None
    assert auroc_estimate(values, ~none).value is None
    estimate = auroc_estimate(values, torch.tensor([False, True, True]))
    assert (estimate.value, estimate.n, estimate.n_others) == (1.0, 1, 1)
    assert share(0, 0).value is None
    assert (share(1, 4).value, share(1, 4).n) == (0.25, 4)


@pytest.mark.parametrize("per_page", [1, 3])
def test_halves_keep_pages_whole_and_have_every_family_alike(per_page):
    questions = made_up_questions(per_page)
    choosing = halves(questions, seed=0)
    for page in questions.page.unique():
        assert len(choosing[questions.page == page].unique()) == 1
    assert not torch.equal(choosing, halves(questions, seed=1))
    assert torch.equal(choosing, halves(questions, seed=0))
    if per_page == 1:
        counts = [int((choosing & (questions.family == f)).sum()) for f in range(len(questions.families))]
        assert counts == [len(questions) // len(counts) // 2] * len(counts)


def test_a_latent_is_chosen_on_one_half_and_scored_on_the_other():
    questions = made_up_questions()
    choosing = halves(questions)
    scores = noise(len(questions), 3, seed=0)
    # Item 0 knows family 3 throughout, item 1 on the choosing half alone, item 2 on the scoring half alone.
    scores.values[:, 0] += 20.0 * (questions.family == 3)
    scores.values[:, 1] += 20.0 * ((questions.family == 3) & choosing)
    scores.values[:, 2] += 20.0 * ((questions.family == 3) & ~choosing)
    result = selectivity(scores, questions, choosing)
    assert result.best[:2].tolist() == [3, 3]
    assert result.chosen[:2, 3].tolist() == [1.0, 1.0]
    assert result.best_scored[0] == 1.0
    assert result.best_scored[1] < 0.8
    for item in range(3):
        for family in range(len(questions.families)):
            expected = by_counting_pairs(scores.values[~choosing, item], questions.family[~choosing] == family)
            assert result.scored[item, family].item() == pytest.approx(expected, abs=1e-12)
    assert result.specific(questions.added).tolist() == [True, False, False]
    assert result.found(torch.tensor([False, True, True])).tolist() == [False] * 5
    assert result.found(torch.tensor([True, False, True])).tolist() == [False, False, False, True, False]
    assert result.found(torch.zeros(3, dtype=torch.bool)).tolist() == [False] * 5
    assert result.best_of(torch.zeros(3, dtype=torch.bool)).isnan().all()
    assert result.best_of(torch.tensor([True, True, False]))[3] == 1.0
    assert result.scored[2, 3] == 1.0
    assert result.best_of(torch.tensor([False, True, True]))[3] == result.scored[1, 3]


def test_within_pages_the_negatives_are_the_other_families_of_the_same_page():
    questions = made_up_questions(per_page=5)
    choosing = halves(questions)
    scores = StratumScores(noise(len(questions), 4, seed=0).values.round(), torch.arange(len(questions)))  # with ties
    result = selectivity(scores, questions, choosing, within_pages=True)
    for half, areas in ((choosing, result.chosen), (~choosing, result.scored)):
        for family in range(len(questions.families)):
            pairs = [
                (i, j)
                for i in half.nonzero().flatten().tolist()
                for j in half.nonzero().flatten().tolist()
                if questions.page[i] == questions.page[j] and questions.family[i] == family != questions.family[j]
            ]
            of, against = (scores.values[list(side)] for side in zip(*pairs, strict=True))
            expected = ((of > against).double() + 0.5 * (of == against)).mean(dim=0)
            torch.testing.assert_close(areas[:, family], expected, atol=1e-12, rtol=0)


def test_what_a_page_or_a_template_gives_away_is_not_specific_within_pages():
    # Every page has one template: an item that knows it, and one that knows the page, tell a family from most others.
    questions = made_up_questions(per_page=2)
    family = torch.tensor([0, 4, 1, 2, 2, 3, 3, 1]).repeat(25)  # pages of template 0 and of template 1
    questions = replace(questions, family=family, template=torch.tensor([0, 0, *[1] * 6]).repeat(25))
    scores = noise(len(questions), 3, seed=0)
    scores.values[:, 0] = 100.0 * (questions.template == 0) + scores.values[:, 0]
    scores.values[:, 1] = 100.0 * (family == 4)
    choosing = halves(questions)
    over_all = selectivity(scores, questions, choosing)
    within = selectivity(scores, questions, choosing, within_pages=True)
    assert over_all.scored[0, 4] > 0.9 and 0.2 < within.scored[0, 4] < 0.8
    assert within.scored[1, 4] == over_all.scored[1, 4] == 1.0
    assert within.specific(questions.added).tolist() == [False, True, False]


def test_a_page_of_one_question_has_no_say_within_pages():
    questions = made_up_questions()
    result = selectivity(noise(len(questions), 3, 0), questions, halves(questions), within_pages=True)
    assert result.scored.isnan().all()
    assert not result.specific(torch.ones(5, dtype=torch.bool)).any()


def test_a_family_that_one_half_lacks_has_no_figure():
    questions = made_up_questions()
    scores = noise(len(questions), 3, seed=0)
    for half in (questions.family != 3, questions.family == 3):
        result = selectivity(scores, questions, half)
        assert result.best_of(torch.ones(3, dtype=torch.bool))[3].isnan()
        assert not result.found(torch.ones(3, dtype=torch.bool), at=0.0)[3]


def test_a_question_without_the_stratum_is_left_out():
    questions = made_up_questions()
    scores = noise(len(questions), 2, seed=0)
    some = torch.arange(0, len(questions), 3)
    result = selectivity(StratumScores(scores.values[some], some), questions, halves(questions))
    assert isinstance(result, Selectivity)
    assert result.n_chosen + result.n_scored == len(some)


def test_permutations_stay_within_their_group():
    labels, groups = torch.arange(12), torch.arange(12) % 3
    rows = permuted(labels, groups, 50, torch.Generator().manual_seed(0))
    assert torch.equal(rows.sort(dim=1).values, labels.expand(50, -1))
    assert torch.equal(groups[rows], groups.expand(50, -1))
    assert len(rows.unique(dim=0)) > 45


def test_the_null_is_that_of_counting_pairs_for_every_permutation():
    questions = made_up_questions(n=40)
    scores = StratumScores(noise(40, 6, seed=1).values.round(), torch.arange(40))  # with ties
    null = permutation_null(scores, questions, n_permutations=60, seed=7)
    assert null.families.tolist() == [0, 1, 2, 3, 4]
    labels = permuted(questions.family, questions.template, 60, torch.Generator().manual_seed(7))
    for column, family in enumerate(null.families.tolist()):
        best = [max(by_counting_pairs(scores.values[:, j], row == family) for j in range(6)) for row in labels]
        for j in range(6):
            observed = by_counting_pairs(scores.values[:, j], questions.family == family)
            expected = (1 + sum(b >= observed - 1e-12 for b in best)) / 61
            assert null.p[j, column].item() == pytest.approx(expected)


def test_p_values_are_uniform_where_families_say_nothing():
    questions = made_up_questions(n=60)
    p = [permutation_null(noise(60, 20, seed), questions, n_permutations=99).family_p for seed in range(60)]
    p = torch.cat(p)
    assert abs(p.mean().item() - 0.5) < 0.08
    for level in (0.1, 0.25, 0.5):
        assert abs((p <= level).double().mean().item() - level) < 0.08


def test_nothing_is_significant_for_shuffled_labels_and_what_is_there_is():
    questions = made_up_questions()
    scores = noise(len(questions), 50, seed=2)
    scores.values[:, 7] += 3.0 * (questions.family == 4)
    null = permutation_null(scores, questions, n_permutations=200)
    significant = null.significant()
    assert significant.nonzero().tolist() == [[7, 4]]
    assert null.family_q[4] == pytest.approx(5 / 201)
    shuffled = permuted(questions.family, questions.template, 1, torch.Generator().manual_seed(1))[0]
    null = permutation_null(scores, replace(questions, family=shuffled), n_permutations=200)
    assert not null.significant().any()


def test_an_item_that_knows_only_the_template_is_not_significant():
    questions = made_up_questions()
    scores = noise(len(questions), 5, seed=3)
    scores.values[:, 0] += 10.0 * (questions.template == 0)
    choosing = halves(questions)
    # Half of what it fires on is the family: an AUROC far above 1/2.
    assert selectivity(scores, questions, choosing).scored[0, 4] > 0.8
    assert not permutation_null(scores, questions, n_permutations=200).significant().any()


def test_dead_items_have_no_say_and_a_family_alone_in_its_template_is_not_tested():
    questions = made_up_questions()
    scores = noise(len(questions), 3, seed=4)
    scores.values[:, 1] += 5.0 * (questions.family == 4)
    items = torch.tensor([True, False, True])
    null = permutation_null(scores, questions, items, n_permutations=100)
    assert (null.p[1] == 1).all()
    assert not null.significant().any()
    alone = replace(questions, template=torch.where(questions.family == 4, 9, questions.template))
    assert permutation_null(scores, alone, n_permutations=10).families.tolist() == [1, 2, 3]


def test_families_are_selected_by_benjamini_and_hochberg_and_items_within_them():
    p = torch.tensor([[0.01, 0.03, 0.9], [0.04, 0.5, 0.9], [0.02, 0.04, 0.9]], dtype=torch.float64)
    null = PermutationNull(torch.tensor([0, 1, 2]), p, 1000)
    assert null.family_q.tolist() == pytest.approx([0.03, 0.045, 0.9])
    # Two of three families are selected: items are held against 0.05 * 2 / 3.
    assert null.significant(0.05).tolist() == [[True, True, False], [False, False, False], [True, False, False]]
    assert not null.significant(0.02).any()
