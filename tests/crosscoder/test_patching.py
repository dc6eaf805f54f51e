"""Whole-site patches on models where the right answer is known."""

from __future__ import annotations

import copy
import math

import pytest

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target, reader
from crosscoder.study.patching import agreement, batch_of, ceilings, program_logits, replaced, with_upper_half

SITES = ("mlp", "attention", "residual")


@pytest.fixture(scope="module")
def models():
    """A random two-layer model, and it again with another second layer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    instruct = MistralForCausalLM(config).eval()
    fine_tuned = copy.deepcopy(instruct)
    with torch.no_grad():
        for parameter in fine_tuned.model.layers[1].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return instruct, fine_tuned


@pytest.fixture(scope="module")
def documents(models):
    """Documents whose program is what the fine-tuned model would say."""
    import torch

    made = []
    for number in range(8):
        ids = [1, *(3 + (number * 5 + j * (number + 1)) % 30 for j in range(6 + number))]
        n_prompt = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(models[1](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        made.append(Document(f"d{number}", tuple(ids), n_prompt))
    return made


def test_a_model_patched_with_its_own_activation_is_as_it_was(models, documents):
    import torch

    batch = batch_of(documents)
    expected = program_logits(models[0], batch)
    for site in SITES:
        target = Target(2, site)
        (own,) = reader(models[0], [target], "hooks")(batch.ids)
        with replaced(models[0], target, own, batch.patched):
            torch.testing.assert_close(program_logits(models[0], batch), expected)
    torch.testing.assert_close(program_logits(models[0], batch), expected)


def test_bos_and_padding_are_never_patched(models, documents):
    batch = batch_of(documents)
    assert not batch.patched[:, 0].any()
    assert batch.patched.sum(1).tolist() == [len(d.ids) - 1 for d in documents]
    assert batch.predicting.sum(1).tolist() == [5] * len(documents)


def test_the_last_residual_carries_all_and_an_untouched_layer_nothing(models, documents):
    by_key = {(c.target, c.direction, c.carrier): c for c in ceilings(*models, documents, every_target())}
    last = by_key[Target(3, "residual"), "sufficiency", "own"]
    # The models share embeddings and the first token, so all that differs passes through the last residual.
    assert last.divergence_closed == pytest.approx(1, abs=1e-6) and last.exact == last.exact_recovered == 1
    assert by_key[Target(3, "residual"), "necessity", "own"].divergence_closed == pytest.approx(1, abs=1e-6)
    for site in SITES:
        nothing = by_key[Target(1, site), "sufficiency", "own"]
        assert nothing.divergence_closed == pytest.approx(0, abs=1e-6) and nothing.exact_recovered == 0
        assert by_key[Target(1, site), "necessity", "own"].divergence_closed == pytest.approx(0, abs=1e-6)
    # The second layer is the changed one and the third is the same, so its residual is all but BOS's, which stays.
    assert 0.9 < by_key[Target(2, "residual"), "sufficiency", "own"].divergence_closed < 1


def test_with_the_other_upper_half_the_layers_above_are_the_other_models(models, documents):
    import torch

    instruct, fine_tuned = models
    batch = batch_of(documents)
    hybrid = with_upper_half(instruct, fine_tuned, 1)
    torch.testing.assert_close(program_logits(hybrid, batch), program_logits(fine_tuned, batch))
    kept = with_upper_half(instruct, fine_tuned, 2)
    torch.testing.assert_close(program_logits(kept, batch), program_logits(instruct, batch))
    assert len(instruct.model.layers) == 3 and instruct.model.layers[1] is not fine_tuned.model.layers[1]


def test_identical_models_have_no_gap_to_close(models, documents):
    same = ceilings(models[0], copy.deepcopy(models[0]), documents, every_target())
    assert all(math.isnan(c.divergence_closed) and math.isnan(c.exact_recovered) for c in same)


def test_agreement_is_the_mean_divergence_and_the_exact_programs_by_document(models, documents):
    import torch

    batch = batch_of(documents)
    reference, other = program_logits(models[1], batch), program_logits(models[0], batch)
    found = agreement(other, reference, batch)
    position = 0
    for number, document in enumerate(documents):
        p, q = (x[position : position + 5].double().softmax(-1) for x in (reference, other))
        expected = (p * (p / q).log()).sum(-1).mean()
        torch.testing.assert_close(found.divergence[number], expected, rtol=1e-4, atol=1e-6)
        best = other[position : position + 5].argmax(-1).tolist()
        assert bool(found.exact[number]) == (best == list(document.ids[document.n_prompt :]))
        position += 5
    assert agreement(reference, reference, batch).exact.all()


def every_target() -> list[Target]:
    return [Target(layer, site) for layer in (1, 2, 3) for site in SITES]
