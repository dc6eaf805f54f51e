"""Matching across seeds: one to one, by sign, at stated cosines; and the overlap of what two sets span."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from crosscoder.methods import new_dictionary
from crosscoder.reading.stability import match, stability, subspace_overlap, vectors_of
from crosscoder.study.planted import Kind, plant, planted_store
from crosscoder.training.sizing import sized_configs
from crosscoder.training.trainer import Trainer
from finqa.errors import UserError


def random_vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_shuffled_and_stretched_copy_is_matched_to_itself():
    vectors = random_vectors(20, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    matching = match(vectors, 3 * vectors[order])
    assert torch.equal(order[matching.second], matching.first)
    assert torch.allclose(matching.cosines, torch.ones(20, dtype=torch.float64))


def test_the_matching_is_the_best_of_all_one_to_one_matchings():
    first, second = random_vectors(5, 3), random_vectors(5, 3, seed=1)
    cosines = torch.cosine_similarity(first[:, None], second[None], dim=-1)
    best = max(sum(cosines[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert match(first, second).cosines.sum().item() == pytest.approx(best, rel=1e-5)


def test_no_latent_answers_for_two():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.01]])
    found = stability(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.matched[0.9] == 0.5


def test_the_opposite_direction_is_another_feature():
    vectors = torch.eye(4)
    assert stability(vectors, -vectors).matched[0.7] == 0
    assert stability(vectors, -vectors).subspace_overlap == pytest.approx(1)


def test_shares_are_of_the_larger_set():
    vectors = torch.eye(6)
    found = stability(vectors, vectors[:3])
    assert (found.n_first, found.n_second, found.matched[0.95]) == (6, 3, 0.5)


def test_overlap_is_of_spans_not_of_vectors():
    plane = torch.eye(6)[:2]
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) @ plane
    assert subspace_overlap(plane, turned) == pytest.approx(1)
    assert subspace_overlap(plane, torch.eye(6)[2:4]) == pytest.approx(0, abs=1e-12)
    half = torch.eye(6)[[0, 5]]
    assert subspace_overlap(plane, half) == pytest.approx(0.5)
    # Ten vectors of one plane still span a plane.
    assert subspace_overlap(random_vectors(10, 2) @ plane, torch.eye(6)[:1]) == pytest.approx(1)


def test_random_sets_overlap_as_much_as_chance_says():
    found = [stability(random_vectors(10, 60, s), random_vectors(15, 60, s + 100)) for s in range(40)]
    assert found[0].overlap_by_chance == 15 / 60
    assert sum(f.subspace_overlap for f in found) / 40 == pytest.approx(0.25, abs=0.02)


def test_empty_sets_have_no_figures():
    found = stability(torch.empty(0, 4), torch.empty(0, 4))
    assert math.isnan(found.matched[0.7])
    assert math.isnan(found.subspace_overlap)
    assert stability(torch.eye(4), torch.empty(0, 4)).matched[0.7] == 0


def test_vectors_of_other_widths_are_refused():
    with pytest.raises(UserError, match="of 4 and 5 numbers"):
        match(torch.eye(4), torch.eye(5))


@pytest.mark.slow
def test_planted_features_survive_a_change_of_seed_and_other_data_do_not_share_them(tmp_path: Path):
    kinds = [Kind("shared", 24, (1, 1), 0.05), Kind("fine-tuned-only", 8, (0, 1), 0.05)]

    def features(data: int, seed: int) -> torch.Tensor:
        """Of the latents that are active at all."""
        store = planted_store(plant(kinds, 8000, 48, data), tmp_path / f"data-{data}-{seed}")
        crosscoder, training = sized_configs(
            48, 8000, n_latents=64, k=2, batch_size=128, epochs=10, learning_rate=5e-3, seed=seed
        )
        model = new_dictionary(crosscoder, generator=torch.Generator().manual_seed(seed))
        run = Trainer(model, store, training, tmp_path / f"run-{data}-{seed}")
        run.fit()
        with torch.no_grad():
            often = (model.encode(model.scale(store.read(run.split.train))) > 0).double().mean(dim=0) > 0.02
        return vectors_of(model, often)

    first, second, other = features(0, 0), features(0, 1), features(1, 1)
    assert stability(first, second).matched[0.9] > 0.75
    assert stability(first, other).matched[0.9] < 0.1
    exclusive = [
        vectors[vectors[:, :48].norm(dim=-1) < 0.1 * vectors[:, 48:].norm(dim=-1)] for vectors in (first, second)
    ]
    found = stability(*exclusive)
    assert found.n_first >= 7
    assert found.subspace_overlap > 0.9 > 2 * found.overlap_by_chance
