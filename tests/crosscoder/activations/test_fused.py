"""A model whose norms, gates and rotations are fused computes what it computed.

pytest -m gpu tests/crosscoder/test_fused.py
TRITON_INTERPRET=1 pytest tests/crosscoder/test_fused.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from crosscoder.activations import fused
from crosscoder.activations.fused import fuse, fuse_adapter, fuse_rotation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]  # the interpreter does not round to bf16
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
SHAPES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
IDS = torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def triton():
    return pytest.importorskip("triton")


@pytest.fixture
def own_rotation(monkeypatch):
    """Puts back the functions of transformers afterwards."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.phi3 import modeling_phi3

    for module in (modeling_mistral, modeling_llama, modeling_phi3, modeling_gemma2):
        monkeypatch.setattr(module, fused.ROTATE, getattr(module, fused.ROTATE))


def made(architecture: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SHAPES | changed)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("Mistral", {"norms": 5, "gates": 2, "rotations": 1}),
        ("Llama", {"norms": 5, "gates": 2, "rotations": 1}),
        ("Phi3", {"norms": 5, "gates": 0, "rotations": 1}),  # its gate is one product with what it gates
        ("Gemma2", {"norms": 0, "gates": 0, "rotations": 1}),  # its gate is a GELU
    ],
)
def test_logits_are_those_of_the_model_as_it_was(architecture, kinds, dtype, own_rotation):
    model = made(architecture, dtype)
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert fuse(model) == kinds
        found = model(input_ids=ids).logits
    tolerance = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), expected, rtol=0.0, atol=tolerance)


def test_gradients_are_those_of_the_model_as_it_was(own_rotation):
    expected, model = made("Mistral"), made("Mistral")
    assert fuse(model) == {"norms": 5, "gates": 2, "rotations": 1}
    for each in (expected, model):
        each(input_ids=IDS.to(DEVICE)).logits.square().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_rotation_that_is_another_one_is_left_alone(own_rotation, monkeypatch):
    model = made("Mistral")
    module = sys.modules[type(model).__module__]
    own = getattr(module, fused.ROTATE)
    monkeypatch.setattr(module, fused.ROTATE, lambda q, k, cos, sin: own(q, k, cos, -sin))
    assert fuse_rotation(model) == 0
    odd = made("Mistral", head_dim=12)
    monkeypatch.setattr(module, fused.ROTATE, own)
    assert fuse_rotation(odd) == 0
    assert fuse_rotation(model) == 1
    assert fuse_rotation(model) == 1, "the second time it is there already"


def test_a_gate_that_is_another_one_is_left_alone(own_rotation):
    assert fuse(made("Mistral", hidden_act="gelu"))["gates"] == 0


def test_a_patched_pair_gives_what_it_gave(own_rotation):
    """The model with an adapter and without, from stored states, the last layer for a few tokens alone."""
    from peft import LoraConfig, get_peft_model

    from crosscoder.activations.collection import Document
    from crosscoder.activations.readers import Target
    from crosscoder.interventions.causal import Cell, measure
    from crosscoder.interventions.halves import pair_of
    from crosscoder.interventions.sets import Whole

    model = get_peft_model(
        made("Mistral", num_hidden_layers=3),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    ).eval()
    documents = [Document(str(n), tuple(range(3 + n, 20 + 2 * n)), 9) for n in range(3)]
    cells = [Cell(Whole(), "sufficiency", carrier) for carrier in ("own", "other")]
    expected = measure(pair_of(model), Target(2, "mlp"), documents, cells)
    assert fuse(model.get_base_model()) == {"norms": 7, "gates": 3, "rotations": 1}
    assert fuse_adapter(model) == 6
    for ours, theirs in zip(measure(pair_of(model), Target(2, "mlp"), documents, cells), expected, strict=True):
        assert max(theirs.divergence) > 1e-3
        assert ours.divergence == pytest.approx(theirs.divergence, rel=1e-3)
        assert ours.injected == pytest.approx(theirs.injected, rel=1e-4)
