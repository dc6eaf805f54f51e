"""The known answer on made-up models where it is known indeed: everything is found, or there is nothing to find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_questions import (
    ADDED,
    FAMILIES,
    LAYOUT,
    N_OTHER,
    directions,
    made_up_questions,
    made_up_store,
    perfect_crosscoder,
    perfect_difference_sae,
)

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError
from study.measures.answers import KnownAnswer
from study.measures.exclusivity import activation_slopes, exclusivity
from study.measures.known_answer import Settings, known_answer
from study.measures.nulls import permuted
from study.measures.probe import INPUTS, logistic, probe_ceilings
from study.measures.readouts import (
    Subject,
    dictionary_subject,
    difference,
    mean_difference_subject,
    norm_subject,
    pca_subject,
    principal_components,
)
from study.measures.scores import read_means, read_scores
from study.measures.selectivity import halves
from study.measures.strata import PRIMARY, STRATA

ADDED_FAMILIES = tuple(name for name, new in zip(FAMILIES, ADDED, strict=True) if new)
TOLD = ("question after the cue", *PRIMARY, "operator", "rest")
"""The strata in which a family's direction is."""
QUICK = Settings(n_permutations=200)
QUESTIONS = made_up_questions(per_page=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return made_up_store(tmp_path_factory.mktemp("set") / "activations", QUESTIONS)


def answer_of(model: BatchTopKCrosscoder, store: ActivationStore, questions=QUESTIONS) -> KnownAnswer:
    return known_answer(dictionary_subject(model), store, questions, "base -> fine-tuned", probes=[], settings=QUICK)


def all_raw(store: ActivationStore) -> torch.Tensor:
    return store.read(torch.arange(len(store)))


def random_crosscoder(seed: int, n_latents: int = 64) -> BatchTopKCrosscoder:
    """Random latents whose decoder norms say nothing."""
    generator = torch.Generator().manual_seed(seed)
    model = new_dictionary(
        CrosscoderConfig(len(directions()[0]), n_latents, 3), generator=generator, directions="apart"
    )
    model.W_dec.data *= torch.rand(n_latents, 2, 1, generator=generator) + 0.1
    model.threshold = 0.5
    return model


def test_scores_are_the_mean_value_of_each_question_on_each_stratum(store):
    subject = dictionary_subject(random_crosscoder(0))
    scores = read_scores(store, QUESTIONS, subject)
    values = subject.read(all_raw(store)).view(len(QUESTIONS), len(LAYOUT), -1)
    for stratum in STRATA:
        places = [i for i, its in enumerate(LAYOUT) if its == stratum]
        of = scores.of(stratum)
        assert torch.equal(of.question, torch.arange(len(QUESTIONS)))
        torch.testing.assert_close(of.values, values[:, places].mean(dim=1))
    assert torch.equal(scores.n_firings, (values > 0).sum(dim=(0, 1)))
    assert torch.equal(scores.alive, (values > 0).flatten(0, 1).any(dim=0))


def test_a_question_without_a_stratum_has_no_score_and_no_mean_there(store):
    moved = QUESTIONS.stratum.clone()
    cue = STRATA.index("question before the cue")
    moved[(QUESTIONS.document == 3) & (moved == cue)] = 0
    questions = replace(QUESTIONS, stratum=moved)
    of = read_scores(store, questions, norm_subject()).of("question before the cue")
    assert of.question.tolist() == [i for i in range(len(questions)) if i != 3]
    assert of.values.isfinite().all()
    means = read_means(store, questions)
    assert means[cue, 3].isnan().all()
    assert means.isnan().any(dim=-1).sum() == 3  # of x[0], x[1] and their difference


@pytest.mark.parametrize("method", ["batchtopk", "difference-sae"])
def test_perfect_latents_are_found_whole(store, method):
    model = perfect_crosscoder() if method == "batchtopk" else perfect_difference_sae()
    answer = answer_of(model, store)
    assert (answer.added, answer.n_questions) == (ADDED_FAMILIES, len(QUESTIONS))
    n_known = len(FAMILIES) - len(ADDED_FAMILIES) if method == "batchtopk" else 0
    for stratum in TOLD:
        of = answer.of(stratum)
        assert (of.specific_to_added, of.specific_to_known) == (len(ADDED_FAMILIES), n_known)
        assert (of.significant_for_added, of.significant_for_known) == (len(ADDED_FAMILIES), n_known)
        for name in ADDED_FAMILIES:
            assert of.best_items[name].value == 1.0
            assert of.null_q[name] <= 0.05
        measures = {"delta", "1 - nu_err", "delta_slope"} if method == "batchtopk" else {"delta_slope"}
        assert {e.measure for e in of.exclusivity} == measures
        classes = {c.name: c for c in of.classes}
        assert set(classes) == {"all active", *(("delta", "confirmed") if method == "batchtopk" else ()), "delta_slope"}
        for name, its in classes.items():
            assert its.found == ADDED_FAMILIES
            assert its.recall.value == 1.0
            if name != "all active":
                assert (its.n, its.precision.value, its.found_known) == (len(ADDED_FAMILIES), 1.0, ())
        for e in of.exclusivity:
            assert e.added_against_rest.n == len(ADDED_FAMILIES)
            if method == "batchtopk":
                assert (e.added_against_rest.value, e.added_against_known.value) == (1.0, 1.0)
    for stratum in ("passage", "question before the cue"):
        of = answer.of(stratum)
        assert (of.specific_to_added, of.significant_for_added, of.significant_for_known) == (0, 0, 0)
        assert all(its.recall.value == 0.0 for its in of.classes)


def test_shuffled_labels_give_the_null(store):
    generator = torch.Generator().manual_seed(0)
    shuffled = permuted(QUESTIONS.family, QUESTIONS.template, 1, generator)[0]
    answer = answer_of(random_crosscoder(1), store, replace(QUESTIONS, family=shuffled))
    for of in answer.strata:
        assert (of.significant_for_added, of.significant_for_known) == (0, 0)
        assert of.specific_to_added == 0
        assert all(its.recall.value in (0.0, None) for its in of.classes)


def test_exclusivity_that_says_nothing_of_families_has_an_area_of_one_half(store):
    # Random latents respond to the families' directions or not, and their decoder norms are drawn apart from that.
    areas = []
    for seed in range(12):
        of = answer_of_delta(random_crosscoder(seed, 400), store)
        estimate = of.added_against_rest
        assert estimate.value is not None and estimate.low is not None and estimate.high is not None
        assert estimate.n >= 5
        areas.append((estimate.value, estimate.low <= 0.5 <= estimate.high))
    assert abs(sum(area for area, _ in areas) / len(areas) - 0.5) < 0.06
    assert sum(held for _, held in areas) >= 10


def answer_of_delta(model: BatchTopKCrosscoder, store: ActivationStore):
    settings = Settings(n_permutations=1, selective_at=0.75)
    answer = known_answer(dictionary_subject(model), store, QUESTIONS, strata=PRIMARY, probes=[], settings=settings)
    return next(e for e in answer.of(PRIMARY[1]).exclusivity if e.measure == "delta")


def test_identical_models_have_nothing_exclusive(tmp_path: Path):
    store = made_up_store(tmp_path / "set", QUESTIONS, identical=True)
    both = perfect_crosscoder()
    both.W_dec.data, both.W_enc.data = directions()[:, None].repeat(1, 2, 1), directions().T.repeat(2, 1, 1) / 2
    answer = answer_of(both, store)
    assert answer.n_alive == len(FAMILIES) + N_OTHER
    for of in answer.strata:
        for its in of.classes[1:]:
            assert its.n == 0
            assert (its.recall.value, its.precision.value, its.found) == (None, None, ())
        for e in of.exclusivity:
            # All latents are alike, so the measure has no order.
            assert e.correlation is None
            assert e.added_against_rest.value == (0.5 if of.stratum in TOLD else None)
    silent = answer_of(perfect_difference_sae(), store)
    assert silent.n_alive == 0
    for of in silent.strata:
        assert (of.specific_to_added, of.best_is_added.value, of.significant_for_added) == (0, None, 0)
        assert all(its.recall.value is None for its in of.classes)
        assert all(estimate.value is None for estimate in of.best_items.values())


def test_slopes_say_whose_a_difference_is(store):
    # Read backwards, the fine-tuned model is the one without the added families: their features are gone.
    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        model = perfect_difference_sae()
        model.W_enc.data *= sign
        model.W_dec.data *= sign
        source = store if sign > 0 else Reversed(store)
        measures = exclusivity(dictionary_subject(model), source, torch.arange(len(store))).measures
        added = torch.tensor(ADDED).nonzero().squeeze(-1)
        assert set(measures) == {"delta_slope"}
        assert measures["delta_slope"][added].tolist() == pytest.approx([expected] * len(added), abs=0.02)


class Reversed:
    """A store whose two models have changed places."""

    def __init__(self, store: ActivationStore):
        self._store = store

    def batches(self, indices, batch_size):
        for chunk, raw in self._store.batches(indices, batch_size):
            yield chunk, raw.flip(1)


def test_slopes_are_least_squares_with_an_intercept(store):
    model = random_crosscoder(2)
    subject = dictionary_subject(model)
    assert subject.directions is not None
    slopes, n = activation_slopes(subject, subject.directions, store, torch.arange(len(store)))
    raw, values = all_raw(store).double(), subject.read(all_raw(store)).double()
    assert torch.equal(n, (values > 0).sum(dim=0))
    for item in n.topk(5).indices.tolist():
        direction = subject.directions[item].double()
        design = torch.stack([values[:, item], torch.ones(len(values), dtype=torch.float64)], dim=1)
        for m in range(2):
            target = raw[:, m] @ direction / direction.pow(2).sum()
            expected = torch.linalg.lstsq(design, target[:, None]).solution[0].item()
            assert slopes[item, m].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_principal_components_are_those_of_the_difference_and_each_counts_in_both_directions(store):
    indices = torch.arange(len(store))
    mean, components = principal_components(store, indices, 4)
    differences = difference(all_raw(store)).double()
    _, _, expected = torch.linalg.svd(differences - differences.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(mean.double(), differences.mean(dim=0), atol=1e-5, rtol=0)
    cosines = (components[:2].double() * expected[:2]).sum(dim=-1).abs()
    assert cosines.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    values = pca_subject(store, indices, 4).read(all_raw(store))
    projected = (differences - differences.mean(dim=0)) @ components.double().T
    torch.testing.assert_close(values[:, 0::2] - values[:, 1::2], projected.float(), atol=1e-4, rtol=0)
    assert (values >= 0).all()
    with pytest.raises(UserError, match="100 principal components"):
        pca_subject(store, indices, 100)


def test_baselines_find_what_they_can(store):
    indices = torch.arange(len(store))
    pca = known_answer(pca_subject(store, indices, 2), store, QUESTIONS, probes=[], settings=QUICK)
    # Two directions were added: the difference has two components.
    assert {f for of in pca.strata for its in of.classes for f in its.found} == set(ADDED_FAMILIES)
    norm = known_answer(norm_subject(), store, QUESTIONS, strata=PRIMARY, probes=[], settings=QUICK)
    for of in norm.strata:
        # It tells added from known families, but no added family from another.
        assert of.exclusivity == ()
        assert of.best_is_added.value == 1.0
        assert all((of.best_items[name].value or 0) < 1 for name in ADDED_FAMILIES)
    one = mean_difference_subject(store, indices).read(all_raw(store))
    assert one.shape == (len(store), 1)


def test_a_probe_finds_added_families_in_the_difference_and_all_where_both_models_show_them(store):
    probes = probe_ceilings(store, QUESTIONS, halves(QUESTIONS))
    assert len(probes) == len(STRATA) * len(INPUTS)
    added, at = torch.tensor(ADDED), {(p.stratum, p.input): p.auroc for p in probes}
    for stratum in PRIMARY:
        assert at[stratum, "difference"][added].tolist() == pytest.approx([1.0] * len(ADDED_FAMILIES), abs=1e-9)
        assert at[stratum, "instruct"][~added].min() > 0.99
        assert at[stratum, "fine-tuned"].min() > 0.99
    assert (at["passage", "difference"] - 0.5).abs().max() < 0.2


def test_logistic_regression_is_at_its_minimum_in_inputs_of_unit_variance():
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(80, 4, generator=generator, dtype=torch.float64)
    positive = (x[:, :2] + torch.randn(80, 2, generator=generator, dtype=torch.float64)) > 5
    weights, bias = logistic(x, positive, ridge=2.0)
    spread = x.std(dim=0, unbiased=False)
    scaled = (x - x.mean(dim=0)) / spread
    residual = torch.sigmoid(x @ weights + bias) - positive.double()
    # The gradients of the log loss and of the ridge cancel, for each weight and each bias.
    torch.testing.assert_close(scaled.T @ residual, -2.0 * weights * spread[:, None], atol=1e-3, rtol=0)
    torch.testing.assert_close(residual.sum(dim=0), torch.zeros(2, dtype=torch.float64), atol=1e-3, rtol=0)


def test_the_answer_is_json_and_csv(store):
    answer = known_answer(dictionary_subject(perfect_crosscoder()), store, QUESTIONS, settings=QUICK)
    assert set(answer.strata[0].probe) == set(INPUTS)
    text = json.dumps(answer.as_json(), allow_nan=False)
    assert json.loads(text)["strata"][0]["stratum"] == STRATA[0]
    rows = answer.rows()
    assert [row["stratum"] for row in rows] == list(STRATA)
    assert len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, (str, int, float, type(None))) for row in rows for value in row.values())
    items = answer.item_rows(PRIMARY[0])
    assert [row["best_family"] for row in items[: len(FAMILIES)]] == list(FAMILIES)
    assert [row["class delta"] for row in items[: len(FAMILIES)]] == list(ADDED)
    assert items[0]["scored"] == 1.0
    json.dumps(items, allow_nan=False)
    none = answer_of(perfect_difference_sae(), store, replace(QUESTIONS, added=torch.zeros(len(FAMILIES)).bool()))
    json.dumps(none.as_json(), allow_nan=False)
    assert all(its.recall.value is None for of in none.strata for its in of.classes)


def test_a_subject_may_be_any_function_of_the_activations(store):
    mine = Subject("first number", lambda raw: torch.relu(raw[:, 1, :1].float()), None)
    answer = known_answer(mine, store, QUESTIONS, strata=PRIMARY, probes=[], settings=QUICK)
    assert (answer.subject, answer.n_items) == ("first number", 1)
