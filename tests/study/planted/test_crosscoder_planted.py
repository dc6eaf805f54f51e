"""What is known to be in the data is found: planted shared and exclusive features, for three seeds and every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import LatentScaling, latent_scaling, verdict
from crosscoder.dictionaries.config import CrosscoderConfig, Method
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.training.sizing import sized_configs
from crosscoder.training.trainer import Trainer
from study.planted.planted_activations import Kind, Planted, best_matches, plant, planted_store

D_MODEL, N_TOKENS, HELD_OUT = 96, 12_000, 0.2
WEAK = 0.25
KINDS = [
    Kind("shared", 20, (1, 1), 0.08),
    Kind("instruct-only", 6, (1, 0), 0.08),
    Kind("fine-tuned-only", 6, (0, 1), 0.08),
    Kind("weak", 6, (WEAK, 1), 0.08),
]
RARER = [replace(kind, frequency=0.065) for kind in KINDS]
"""The same with about 1.2 of the 18 features that differ on a token: k 1 of the difference has room for them."""
EXCLUSIVE = ("instruct-only", "fine-tuned-only")
SEEDS = (0, 1, 2)
FOUND_AT = 0.9
"""Cosine of a planted direction and a decoder vector."""


def trained(
    planted: Planted, folder: Path, method: Method, seed: int, n_latents: int = 80, k: int = 3, **given: Any
) -> tuple[BatchTopKCrosscoder, torch.Tensor]:
    """A dictionary of that method on the planted data, and the raw activations of the held-out documents."""
    store = planted_store(planted, folder / "activations")
    # A price of p shortens what a latent writes into each model by p / 2: nearly all that a weak feature has there.
    price = 1.8 * WEAK * max(store.config.activation_scales) if method == "l1" else None
    crosscoder, training = sized_configs(
        D_MODEL,
        N_TOKENS,
        method,
        l1_weight=price,
        n_latents=n_latents,
        k=k,
        batch_size=128,
        epochs=8,
        held_out_fraction=HELD_OUT,
        learning_rate=3e-3,
        seed=seed,
        **given,
    )
    model = new_dictionary(crosscoder, generator=torch.Generator().manual_seed(seed))
    run = Trainer(model, store, training, folder / method)
    return run.fit(), store.read(run.split.held_out)


def found(planted: Planted, kind: str, model: BatchTopKCrosscoder) -> list[int]:
    """A latent for each planted feature of this kind whose direction one of them has, in a model with the feature."""
    decoder = model.raw_decoder()[:, 0 if kind == "instruct-only" else 1]
    cosines, latents = best_matches(planted.directions[planted.of(kind)], decoder)
    return [latent for latent, cosine in zip(latents.tolist(), cosines.tolist(), strict=True) if cosine > FOUND_AT]


def classes(model: BatchTopKCrosscoder) -> list[analysis.LatentClass]:
    return analysis.classify(analysis.delta(analysis.decoder_norms(model)))


def n_confirmed(kind: str, latents: list[int], model: BatchTopKCrosscoder, scaling: LatentScaling) -> int:
    """How many of `latents` Delta puts in this class and latent scaling confirms."""
    of = classes(model)
    return sum(of[j] == kind and bool(scaling.exclusive[j, EXCLUSIVE.index(kind)]) for j in latents)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_batchtopk_finds_what_was_planted_and_tells_whose_it_is_and_l1_claims_too_much(seed, tmp_path: Path):
    planted = plant(KINDS, N_TOKENS, D_MODEL, seed)
    model, held_out = trained(planted, tmp_path, "batchtopk", seed)
    scaling = latent_scaling(model, held_out.split(1000))
    latents = {kind.name: found(planted, kind.name, model) for kind in KINDS}
    n_found = sum(len(of) for of in latents.values())
    assert n_found >= 0.9 * sum(kind.n for kind in KINDS)
    assert all(len(set(of)) == len(of) for of in latents.values())
    of = classes(model)
    assert sum(of[j] == "shared" for j in latents["shared"]) >= 0.9 * len(latents["shared"])
    confirmed = [n_confirmed(kind, latents[kind], model, scaling) for kind in EXCLUSIVE]
    assert sum(confirmed) >= 0.9 * sum(len(latents[kind]) for kind in EXCLUSIVE)
    # A feature that one model has a quarter of is not called exclusive to the other.
    assert not any(of[j] == "fine-tuned-only" for j in latents["weak"])

    priced, held_out = trained(planted, tmp_path, "l1", seed, n_latents=120)
    scaling = latent_scaling(priced, held_out.split(1000))
    weak = found(planted, "weak", priced)
    of = classes(priced)
    assert len(weak) >= 0.9 * 6
    assert sum(of[j] == "fine-tuned-only" for j in weak) >= 0.9 * len(weak)
    said = [verdict(scaling, j, own=1) for j in weak if of[j] == "fine-tuned-only"]
    assert sum("complete shrinkage" in words for words in said) >= 0.9 * len(said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_dedicated_crosscoder_puts_what_one_model_has_in_that_models_group(seed, tmp_path: Path):
    planted = plant([kind for kind in KINDS if kind.name != "weak"], N_TOKENS, D_MODEL, seed)
    of_group = {}
    for untrained in (False, True):
        folder = tmp_path / str(untrained)
        model, _ = trained(planted, folder, "dedicated", seed, reserved_share=0.2, untrained=untrained)
        decoder, kinds = model.raw_decoder(), analysis.latent_classes(model)
        for kind in ("shared", *EXCLUSIVE):
            group = torch.tensor([its == kind for its in kinds])
            vectors = decoder[group, 0 if kind == "instruct-only" else 1]
            cosines, _ = best_matches(planted.directions[planted.of(kind)], vectors)
            of_group[kind, untrained] = int((cosines > FOUND_AT).sum())
        shared, n = model.config.n_shared, model.config.n_reserved
        assert not decoder[shared : shared + n, 1].any() and not decoder[shared + n :, 0].any()
    assert of_group["shared", False] >= 15  # of 20
    assert of_group["instruct-only", False] + of_group["fine-tuned-only", False] >= 9  # of 12
    assert sum(of_group[kind, True] for kind in ("shared", *EXCLUSIVE)) == 0


@pytest.mark.slow
def test_the_difference_sae_finds_what_differs_up_to_its_sign(tmp_path: Path):
    planted = plant(RARER, N_TOKENS, D_MODEL, 0)
    # With a larger k they are split between latents.
    model, held_out = trained(planted, tmp_path, "difference-sae", 0, n_latents=64, k=1)
    explained = analysis.explained_variance(model, [held_out])
    assert explained.difference > 0.8
    assert (explained.instruct, explained.fine_tuned, explained.joint) == (None, None, None)
    directions = planted.directions * (planted.strength[:, 1] - planted.strength[:, 0]).sign()[:, None]
    for kind in ("instruct-only", "fine-tuned-only", "weak"):
        cosines, _ = best_matches(directions[planted.of(kind)], model.difference_decoder())
        assert (cosines > FOUND_AT).float().mean() >= 0.9


@pytest.mark.slow
def test_the_delta_latents_of_a_partition_hold_what_differs(tmp_path: Path):
    planted = plant(RARER, N_TOKENS, D_MODEL, 0)
    model, held_out = trained(planted, tmp_path, "partition", 0)
    assert torch.equal(model.W_dec[: model.config.n_shared, 0], model.W_dec[: model.config.n_shared, 1])
    explained = analysis.explained_variance(model, [held_out])
    assert explained.difference > 0.8
    directions = planted.directions * (planted.strength[:, 1] - planted.strength[:, 0]).sign()[:, None]
    delta_latents = model.difference_decoder()[model.config.n_shared :]
    for kind in EXCLUSIVE:
        cosines, _ = best_matches(directions[planted.of(kind)], delta_latents)
        assert (cosines > FOUND_AT).float().mean() >= 0.7


def test_latent_scaling_tells_a_feature_split_between_two_latents_from_one_that_is_new():
    """Latent decoupling: what both models have is written by one latent into the first and by another into the second.

    Delta calls both exclusive. Beside them stand a feature that the fine-tuned model alone has, and one that both have
    and the dictionary writes into the fine-tuned model alone (complete shrinkage).
    """
    kinds = [Kind("shared", 12, (1, 1), 0.08), Kind("fine-tuned-only", 4, (0, 1), 0.08)]
    planted = plant(kinds, 6_000, D_MODEL, seed=0)
    decoupled, shrunk = 0, 1
    n_features = len(planted.kinds)
    # The last latent writes the decoupled feature into the instruct model, the feature's own into the fine-tuned one.
    directions = torch.cat([planted.directions, planted.directions[[decoupled]]])
    writes = torch.cat([(planted.strength > 0).float(), torch.tensor([[1.0, 0.0]])])
    writes[decoupled] = writes[shrunk] = torch.tensor([0.0, 1.0])
    model = new_dictionary(CrosscoderConfig(D_MODEL, n_features + 1, k=3))
    readers = torch.linalg.pinv(planted.directions)
    readers = torch.cat([readers, readers[:, [decoupled]]], dim=1)
    model.W_dec.data = directions[:, None] * writes[:, :, None]
    model.W_enc.data = readers * (writes / writes.sum(dim=1, keepdim=True)).T[:, None]
    model.threshold = 0.4

    scaling = latent_scaling(model, planted.activations.split(1000))
    of = classes(model)
    said = {j: verdict(scaling, j, int(of[j] != "instruct-only")) for j in range(n_features + 1)}
    assert [of[decoupled], of[shrunk], of[n_features]] == ["fine-tuned-only", "fine-tuned-only", "instruct-only"]
    assert said[decoupled] == said[n_features] == "latent decoupling"
    assert said[shrunk] == "complete shrinkage"
    assert {said[j] for j in planted.of("fine-tuned-only").tolist()} == {"confirmed"}
