"""The adapter's own directions, and sets of directions at one injected norm, against dense references in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_pair import small_pair

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.interventions.sets import (
    Components,
    Reading,
    Scaled,
    Whole,
    injected_norm,
)
from finqa.runtime.errors import UserError
from study.adapter_directions import output_directions, strongest, weight_directions
from study.invented.diff.sources import orthonormal

WIDTH, RANK = 32, 4
DOCUMENTS = [Document(f"d{n}", (1, *range(3 + n, 15 + n)), 5) for n in range(4)]


def adapted(modules: tuple[str, ...] = ("o_proj", "down_proj"), rslora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=RANK, lora_alpha=6, lora_dropout=0.3, target_modules=list(modules), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(small_pair(WIDTH)[0], config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model.train()  # dropout must not reach what is read


def changes(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """[d_model, inputs] fp64 of every module that writes into the residual stream, from the merged weights."""
    found = {}
    base = small_pair(WIDTH)[0]
    merged = model.merge_and_unload()
    for number, (old, new) in enumerate(zip(base.model.layers, merged.model.layers, strict=True), start=1):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            delta = new.get_submodule(module).weight.double() - old.get_submodule(module).weight.double()
            found[number, module.split(".")[1]] = delta.detach()
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_directions_by_weights_are_the_left_singular_vectors_of_what_merging_adds(rslora):
    model = adapted(rslora=rslora)
    found = weight_directions(model)
    dense = changes(model)
    assert [(one.layer, one.module) for one in found] == [(n, m) for n in (1, 2, 3) for m in ("o_proj", "down_proj")]
    for one in found:
        vectors, strengths, _ = torch.linalg.svd(dense[one.layer, one.module])
        assert one.strengths.tolist() == pytest.approx(strengths[:RANK].tolist(), rel=1e-4)
        cosines = (one.vectors * vectors[:, :RANK].T).sum(dim=-1).abs()
        assert cosines.tolist() == pytest.approx([1] * RANK, abs=1e-4)
        assert torch.allclose(one.vectors @ one.vectors.T, torch.eye(RANK).double(), atol=1e-10)


def test_directions_by_outputs_are_those_of_what_the_adapter_gives_on_the_documents():
    model = adapted()
    found = output_directions(model, DOCUMENTS)
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    layers = model.get_base_model().model.layers

    def keep(key: tuple[int, str]) -> Any:
        return lambda module, args, output: inputs.setdefault(key, []).append(args[0][0, 1:].detach().double())

    for number, layer in enumerate(layers, start=1):
        layer.self_attn.o_proj.register_forward_hook(keep((number, "o_proj")))
        layer.mlp.down_proj.register_forward_hook(keep((number, "down_proj")))
    model.eval()
    for document in DOCUMENTS:
        model(input_ids=torch.tensor([document.ids]))
    dense = changes(model)
    for one in found:
        given = torch.cat(inputs[one.layer, one.module]) @ dense[one.layer, one.module].T
        _, strengths, vectors = torch.linalg.svd(given / len(given) ** 0.5, full_matrices=False)
        assert one.strengths.tolist() == pytest.approx(strengths[:RANK].tolist(), rel=1e-3)
        assert (one.vectors[0] @ vectors[0]).abs().item() == pytest.approx(1, abs=1e-3)


def test_the_strongest_are_taken_of_the_modules_that_reach_a_site():
    found = weight_directions(adapted())
    every = sorted((float(s) for one in found for s in one.strengths), reverse=True)
    assert strongest(found, 6).shape == (6, WIDTH)
    first = max(found, key=lambda one: float(one.strengths[0]))
    assert torch.allclose(strongest(found, 1)[0].double(), first.vectors[0], atol=1e-6)
    assert every[0] == first.strengths[0]
    assert len(strongest(found, 100, Target(2, "residual"))) == 4 * RANK
    (own,) = [one for one in found if (one.layer, one.module) == (2, "down_proj")]
    assert torch.equal(strongest(found, 100, Target(2, "mlp")), own.vectors.float())
    with pytest.raises(UserError, match="no module of the adapter writes into layer 4, mlp"):
        strongest(found, 1, Target(4, "mlp"))


def test_an_adapter_that_writes_nowhere_and_documents_without_tokens_are_refused():
    with pytest.raises(UserError, match="fine-tune with one of them among --lora-modules"):
        weight_directions(adapted(("q_proj", "v_proj")))
    with pytest.raises(UserError, match="give documents"):
        output_directions(adapted(), [])


# At one injected norm


def reading(seed: int = 0, n: int = 50) -> Reading:
    return Reading(torch.randn(n, 2, WIDTH, generator=torch.Generator().manual_seed(seed)))


def test_additions_are_scaled_by_one_factor_to_the_same_injected_norm():
    readings = [reading(1), reading(2, n=20)]
    whole = torch.cat([each.difference for each in readings])
    assert injected_norm(Whole(), readings) == pytest.approx(whole.square().sum(dim=-1).mean().sqrt().item(), rel=1e-6)
    chance = Components(torch.linalg.qr(torch.randn(WIDTH, 5)).Q.T)
    principal = Components(torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(-1)[:, :5].T)
    for addition in (chance, principal):
        scaled = Scaled(addition, 7.0 / injected_norm(addition, readings))
        assert injected_norm(scaled, [reading(1), reading(2, n=20)]) == pytest.approx(7, rel=1e-5)
        assert torch.allclose(scaled(reading(4)), scaled.factor * addition(reading(4)))
    labels = [str(each.label) for each in (chance, Scaled(chance, 2.0), Scaled(chance, 3.0), Scaled(principal, 2.0))]
    assert len(set(labels)) == 4


def test_a_basis_spans_the_vectors_and_is_orthonormal():
    vectors = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([vectors[:3], vectors[:1] - vectors[1:2], vectors[3:]])  # the fourth adds none
    basis = orthonormal(vectors)
    assert torch.allclose(basis @ basis.T, torch.eye(6), atol=1e-6)
    assert torch.allclose(vectors @ basis.T @ basis, vectors, atol=1e-5)
    assert torch.allclose(orthonormal(vectors[:2]), basis[:2])
    assert orthonormal(torch.zeros(2, WIDTH)).shape == (0, WIDTH)
