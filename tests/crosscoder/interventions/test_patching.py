"""Whole-site patches on models where the right answer is known."""

from __future__ import annotations

import copy
import math

import pytest
from small_pair import small_pair

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target, reader
from crosscoder.interventions.halves import pair_of
from crosscoder.interventions.patching import (
    agreement,
    batch_of,
    batches,
    patched_logits,
    run_halves,
)
from finqa.runtime.errors import UserError
from study.site_ceilings import ceilings

SITES = ("mlp", "attention", "residual")


@pytest.fixture(scope="module")
def models():
    return small_pair()


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


def test_the_halves_compute_what_the_models_compute(models, documents):
    """The states bit by bit, and the empty patch is no patch; the logits within 1e-5."""
    import torch

    pair, batch = pair_of(*models), batch_of(documents)
    halves = run_halves(pair, batch, [1, 2, 3])
    close(halves.reference, program_logits(models[1], batch))
    for target in every_target():
        own = halves.records[0][target.layer].site(target)
        unpatched, put = (patched_logits(pair, halves, target, "sufficiency", "own", v) for v in (None, own))
        close(unpatched, program_logits(models[0], batch))
        close(put, unpatched)
        assert torch.equal(own, reader(models[0], [target], "hooks")(batch.ids)[0])
        close(patched_logits(pair, halves, target, "necessity", "own", None), halves.reference)


def test_the_shortcut_past_a_layer_is_the_layer(models, documents):
    """What an MLP gives is added to the stream without running its layer again; a hook gives the same."""
    import dataclasses

    import torch

    class Unknown(type(run_halves(pair_of(*models), batch_of(documents), [2]).records[0][2])):
        between = None

    pair, batch, target = pair_of(*models), batch_of(documents), Target(2, "mlp")
    halves = run_halves(pair, batch, [2])
    given = halves.records[1][2].mlp
    assert halves.records[0][2].between is not None
    short = patched_logits(pair, halves, target, "sufficiency", "own", given)
    hidden = Unknown(*(getattr(halves.records[0][2], f.name) for f in dataclasses.fields(halves.records[0][2])))
    slow = dataclasses.replace(halves, records=({2: hidden}, halves.records[1]))
    assert torch.equal(short, patched_logits(pair, slow, target, "sufficiency", "own", given))
    assert not torch.equal(short, halves.reference)


def test_an_adapter_is_a_pair_of_models(models, documents):
    """One model with its adapter off and on is patched as two models are."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(models[0]), settings).eval()
    whole = copy.deepcopy(adapted).merge_and_unload()
    targets = [Target(2, "mlp"), Target(3, "residual")]
    of_adapter, of_two = ceilings(adapted, None, documents, targets), ceilings(models[0], whole, documents, targets)
    for ours, theirs in zip(of_adapter, of_two, strict=True):
        assert ours.divergence_closed == pytest.approx(theirs.divergence_closed, abs=1e-4)
    assert 0 < of_two[0].divergence_closed < 1


def test_documents_come_in_batches_of_like_length_and_each_once(documents):
    found = list(batches(documents, batch_tokens=40))
    assert sorted(int(i) for chosen, _ in found for i in chosen) == list(range(len(documents)))
    assert len(found) > 2 and all(batch.ids.numel() <= 40 for _, batch in found)


def test_the_size_of_a_batch_does_not_change_the_ceilings(models, documents):
    one, many = (ceilings(*models, documents, [Target(2, "mlp")], batch_tokens=n) for n in (20, 10_000))
    for a, b in zip(one, many, strict=True):
        assert a.divergence_closed == pytest.approx(b.divergence_closed, abs=1e-5) and a.exact == b.exact


def test_models_of_two_shapes_are_no_pair(models):
    other = copy.deepcopy(models[0])
    other.model.layers = other.model.layers[:2]
    with pytest.raises(UserError, match="differ in shape"):
        pair_of(models[0], other)


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

    batch = batch_of(documents)
    pair, halves = pair_of(*models), run_halves(pair_of(*models), batch, [1, 2])
    # The second layer alone differs: above the first it is the other model's, above the second nothing is.
    hybrid = patched_logits(pair, halves, Target(1, "mlp"), "sufficiency", "other", None)
    close(hybrid, halves.reference)
    kept = patched_logits(pair, halves, Target(2, "mlp"), "sufficiency", "other", None)
    close(kept, program_logits(models[0], batch))
    # So a ceiling says what the layers above do alone.
    by_key = {(c.target, c.carrier): c for c in ceilings(*models, documents, [Target(1, "mlp"), Target(2, "mlp")])
              if c.direction == "sufficiency"}  # fmt: skip
    assert by_key[Target(1, "mlp"), "other"].unpatched_closed == pytest.approx(1, abs=1e-9)
    assert by_key[Target(1, "mlp"), "other"].unpatched_exact == 1
    assert by_key[Target(2, "mlp"), "other"].unpatched_closed == by_key[Target(1, "mlp"), "own"].unpatched_closed == 0


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


def program_logits(model, batch):
    """[predicting positions, vocabulary] of a whole model, as anyone would run it."""
    import torch

    with torch.no_grad():
        return model(input_ids=batch.ids, use_cache=False).logits[batch.predicting].float()


def close(ours, expected):
    import torch

    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def every_target() -> list[Target]:
    return [Target(layer, site) for layer in (1, 2, 3) for site in SITES]
