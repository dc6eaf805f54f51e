"""Matching across seeds: one to one, by sign, at stated cosines; and the overlap of what two sets span."""

from __future__ import annotations

import csv
import io
import itertools
import math
from pathlib import Path

import pytest
import torch

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.stability import (
    Features,
    features,
    match,
    stability_rows,
    subspace_overlap,
)
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, Method
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.training.sizing import sized_configs
from crosscoder.training.trainer import Trainer
from finqa.runtime.errors import UserError
from study.planted.planted_activations import Kind, plant, planted_store


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
    assert (match(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).cosines >= 0.9).tolist().count(True) == 1


def test_the_opposite_direction_is_another_feature():
    vectors = torch.eye(4)
    assert match(vectors, -vectors).cosines.max() < 0.7
    assert subspace_overlap(vectors, -vectors) == pytest.approx(1)


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
    found = [subspace_overlap(random_vectors(10, 60, s), random_vectors(15, 60, s + 100)) for s in range(40)]
    assert sum(found) / 40 == pytest.approx(15 / 60, abs=0.02)


def test_empty_sets_have_no_figures():
    assert math.isnan(subspace_overlap(torch.empty(0, 4), torch.empty(0, 4)))
    assert len(match(torch.eye(4), torch.empty(0, 4)).cosines) == 0


def test_vectors_of_other_widths_are_refused():
    with pytest.raises(UserError, match="of 4 and 5 numbers"):
        match(torch.eye(4), torch.eye(5))


# Two dictionaries as a table

WIDTH = 40


def dictionary(vectors: torch.Tensor, method: Method = "batchtopk") -> BatchTopKCrosscoder:
    """With [latent, inputs, d_model] decoder vectors, every latent but the last active on everything."""
    parts = {"n_delta": len(vectors) // 2, "k_delta": 1} if method == "partition" else {}
    model = new_dictionary(CrosscoderConfig(vectors.shape[-1], len(vectors), 1, method=method, **parts))
    model.W_dec.data = vectors.clone()
    model.b_enc.data.fill_(1e3)
    model.b_enc.data[-1] = -1e6
    model.set_thresholds([0.0] * max(1, len(model.groups())))
    return model


def planted_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two seeds: 12 shared latents of which 9 are the same, 6 fine-tuned-only of which 3 are, and one that is
    fine-tuned-only in the first and shared in the second; and one latent, the last, that is dead."""
    pool = random_vectors(40, WIDTH, seed=5)
    pool /= pool.norm(dim=-1, keepdim=True)
    both, nothing = (lambda v: torch.stack([v, v], 1)), torch.zeros(6, WIDTH)
    only = lambda v: torch.stack([nothing[: len(v)], v], 1)  # noqa: E731
    first = torch.cat([both(pool[:12]), only(pool[12:18]), only(pool[18:19]), both(pool[39:])])
    second = torch.cat([both(pool[:9]), both(pool[20:23]), only(pool[12:15]), only(pool[23:26])])
    second = torch.cat([second, both(pool[18:19]), both(pool[39:])])
    order = torch.randperm(19, generator=torch.Generator().manual_seed(2))
    return first, torch.cat([second[:19][order], second[19:]])


@pytest.fixture
def tokens(tmp_path: Path) -> ActivationStore:
    return planted_store(plant([Kind("shared", 4, (1, 1), 0.2)], 400, WIDTH, 0), tmp_path / "tokens")


def test_the_table_counts_what_was_planted(tokens):
    every = torch.arange(len(tokens))
    sets = (features(dictionary(vectors), tokens, every) for vectors in planted_pair())
    by_set = {row["set"]: row for row in stability_rows(*sets)}
    shared, tuned, both = (by_set[name] for name in ("shared", "fine-tuned-only", "all"))
    assert (shared["n_first"], shared["n_second"], shared["matched_0.8"]) == (12, 13, 9 / 13)
    assert (tuned["n_first"], tuned["n_second"], tuned["matched_0.8"]) == (7, 6, 3 / 7)
    assert (both["n_first"], both["n_second"]) == (19, 19)
    # The thirteenth pair, of another class each, has cosine sqrt(1/2) with both vectors as one.
    assert (both["matched_0.7"], both["matched_0.8"]) == (13 / 19, 12 / 19)
    assert tuned["same_set_0.7"] == 3 / 4 and tuned["same_set_0.8"] == 1
    assert by_set["instruct-only"]["n_first"] == 0 and by_set["instruct-only"]["matched_0.8"] is None
    written = io.StringIO()
    csv.DictWriter(written, list(shared)).writerows(by_set.values())
    assert len(written.getvalue().splitlines()) == len(by_set)


def test_chance_is_what_unrelated_dictionaries_of_the_same_norms_give(tokens):
    first, second = planted_pair()
    every = torch.arange(len(tokens))
    (row, *_) = stability_rows(features(dictionary(first), tokens, every), features(dictionary(second), tokens, every))
    assert row["chance_0.7"] == row["chance_0.95"] == 0 and row["chance_median_cosine"] < 0.5
    assert row["median_cosine"] > 0.9
    # Exclusive latents lie in one model's half: two random sets of 6 there overlap by 6 / 40, not by 6 / 80.
    only = torch.stack([torch.zeros(6, WIDTH), random_vectors(6, WIDTH, 7)], 1)
    other = torch.stack([torch.zeros(6, WIDTH), random_vectors(6, WIDTH, 8)], 1)
    mask = {"all": torch.ones(6, dtype=torch.bool)}
    (row,) = stability_rows(Features("batchtopk", only, mask), Features("batchtopk", other, mask), n_rotations=60)
    assert row["chance_overlap"] == pytest.approx(6 / WIDTH, abs=0.02)


def test_many_latents_in_few_dimensions_match_by_chance_and_the_table_says_so(monkeypatch):
    monkeypatch.setattr("crosscoder.analysis.stability.ROWS_AT_ONCE", 30)

    def crowd(seed: int) -> Features:
        return Features("difference-sae", random_vectors(400, 3, seed)[:, None], _all(400))

    (row,) = stability_rows(crowd(1), crowd(2))
    assert row["matched_0.9"] > 0.5 and row["chance_0.9"] >= row["matched_0.9"] - 0.05


def test_a_difference_sae_is_one_set_and_a_partition_has_its_parts(tokens):
    every = torch.arange(len(tokens))
    pair = planted_pair()
    of_difference = [features(dictionary(v[:, 1:], "difference-sae"), tokens, every) for v in pair]
    rows = stability_rows(*of_difference)
    assert [row["set"] for row in rows] == ["all"]
    assert rows[0]["matched_0.8"] == 13 / 19
    parts = features(dictionary(pair[0], "partition"), tokens, every).sets
    assert int(parts["shared latents"].sum()) == 10 and int(parts["delta latents"].sum()) == 9


def test_further_sets_are_rows_of_their_own(tokens):
    every = torch.arange(len(tokens))
    first, second = (
        features(dictionary(v), tokens, every, {"confirmed": torch.arange(len(v)) % 2 == 0}) for v in planted_pair()
    )
    assert {row["set"]: row["n_first"] for row in stability_rows(first, second)}["confirmed"] == 10


def test_dictionaries_of_two_methods_are_refused():
    first = Features("batchtopk", random_vectors(4, 8).view(4, 2, 4), _all(4))
    with pytest.raises(UserError, match="difference-sae"):
        stability_rows(first, Features("difference-sae", random_vectors(4, 4)[:, None], _all(4)))


def _all(n: int) -> dict[str, torch.Tensor]:
    return {"all": torch.ones(n, dtype=torch.bool)}


@pytest.mark.slow
def test_planted_features_survive_a_change_of_seed_and_other_data_do_not_share_them(tmp_path: Path):
    kinds = [Kind("shared", 24, (1, 1), 0.05), Kind("fine-tuned-only", 8, (0, 1), 0.05)]

    def often_active(data: int, seed: int) -> torch.Tensor:
        """Of the latents that are active now and then."""
        store = planted_store(plant(kinds, 8000, 48, data), tmp_path / f"data-{data}-{seed}")
        crosscoder, training = sized_configs(
            48, 8000, n_latents=64, k=2, batch_size=128, epochs=10, learning_rate=5e-3, seed=seed
        )
        model = new_dictionary(crosscoder, generator=torch.Generator().manual_seed(seed))
        run = Trainer(model, store, training, tmp_path / f"run-{data}-{seed}")
        run.fit()
        with torch.no_grad():
            often = (model.encode(model.scale(store.read(run.split.train))) > 0).double().mean(dim=0) > 0.02
        return model.W_dec.detach().flatten(1)[often]

    def share_matched(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((match(one, two).cosines >= 0.9).sum()) / max(len(one), len(two))

    first, second, other = often_active(0, 0), often_active(0, 1), often_active(1, 1)
    assert share_matched(first, second) > 0.75
    assert share_matched(first, other) < 0.1
    exclusive = [
        vectors[vectors[:, :48].norm(dim=-1) < 0.1 * vectors[:, 48:].norm(dim=-1)] for vectors in (first, second)
    ]
    assert len(exclusive[0]) >= 7
    assert subspace_overlap(*exclusive) > 0.9 > 2 * max(map(len, exclusive)) / 96
    folders = [tmp_path / f"run-0-{seed}" for seed in (0, 1)]
    store = ActivationStore(tmp_path / "data-0-0")
    rows = stability_rows(*(features(load_dictionary(folder), store, torch.arange(len(store))) for folder in folders))
    by_set = {row["set"]: row for row in rows}
    assert by_set["fine-tuned-only"]["matched_0.8"] > 0.6 > 0.1 >= by_set["fine-tuned-only"]["chance_0.8"]
    assert by_set["fine-tuned-only"]["subspace_overlap"] > 2 * by_set["fine-tuned-only"]["chance_overlap"]
