"""Both readers give what a plain output hook sees in a whole forward pass, whatever the Llama-like model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscoder.activations.fused import fuse_adapter, fuse_norms
from crosscoder.activations.readers import (
    ReaderKind,
    Target,
    adapter_readers,
    default_reader,
    in_the_models_dtype,
    reader,
)
from crosscoder.names import SITES
from finqa.runtime.errors import UserError

KINDS: tuple[ReaderKind, ...] = ("nnsight", "hooks")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "Mistral": {"sliding_window": None},
    "Mistral with a window": {"sliding_window": 9},
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "Phi3": {"sliding_window": 9},
}
DOCUMENTS = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 23, 14, 31)]
TARGETS = [Target(layer, site) for layer in (1, 3) for site in SITES]


def made(architecture: str) -> Any:
    """A tiny random model of an architecture, in fp32."""
    import transformers

    name = architecture.split()[0]
    config = getattr(transformers, f"{name}Config")(**SMALL, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one, as if they were not there
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A tiny Mistral with a LoRA adapter that changes it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return get_peft_model(made("Mistral"), settings).eval()


def module_of(model: Any, target: Target) -> torch.nn.Module:
    block = model.model.layers[target.layer - 1]
    return {"attention": block.self_attn, "mlp": block.mlp, "residual": block}[target.site]


def hooked(model: Any, target: Target, ids: Tensor, mask: Tensor) -> Tensor:
    """The output of the target's module in a whole masked forward pass."""
    seen: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module_of(model, target).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return seen[0]


def right_padded() -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(DOCUMENTS, batch_first=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_reads_as_each_document_alone_by_a_hook(model, kind):
    read = reader(model, TARGETS, kind)(right_padded())
    for target, activations in zip(TARGETS, read, strict=True):
        for document, ours in zip(DOCUMENTS, activations, strict=True):
            expected = hooked(model, target, document[None], torch.ones(1, len(document), dtype=torch.int64))[0]
            assert torch.allclose(ours[: len(document)], expected, rtol=1e-4, atol=1e-4), target


def test_both_readers_give_the_same_bits(model):
    by_hooks, by_nnsight = (reader(model, TARGETS, kind)(right_padded()) for kind in ("hooks", "nnsight"))
    for ours, theirs in zip(by_hooks, by_nnsight, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_come_in_the_order_in_which_they_were_asked_for(model, kind):
    backwards = reader(model, TARGETS[::-1], kind)(right_padded())
    for ours, theirs in zip(backwards[::-1], reader(model, TARGETS, kind)(right_padded()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_gives_both_activations_with_the_adapter_off_and_on(adapted, kind):
    ids = DOCUMENTS[3][None]
    mask = torch.ones_like(ids)
    whole = adapted.get_base_model()
    instruct, fine_tuned = (read(ids) for read in adapter_readers(adapted, TARGETS, kind))
    for target, off, on in zip(TARGETS, instruct, fine_tuned, strict=True):
        with adapted.disable_adapter():
            assert torch.equal(off, hooked(whole, target, ids, mask))
        assert torch.equal(on, hooked(whole, target, ids, mask))
        assert not torch.equal(off, on)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("site", "ran"),
    [("attention", ["attention"]), ("mlp", ["attention", "mlp"]), ("residual", ["attention", "mlp"])],
)
def test_nothing_runs_after_what_is_read_last(adapted, kind, site, ran):
    whole = adapted.get_base_model()
    started: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: started.append(name)

    second, third = whole.model.layers[1:]
    modules = {"attention": second.self_attn, "mlp": second.mlp, "layer 3": third, "head": whole.lm_head}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    reader(whole, [Target(1, "mlp"), Target(2, site)], kind)(DOCUMENTS[0][None])
    for handle in handles:
        handle.remove()
    assert started == ran


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_read_computes_as_before(adapted, kind):
    ids = DOCUMENTS[1][None]
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        reader(adapted.get_base_model(), TARGETS, kind)(ids)
        assert torch.equal(adapted(input_ids=ids).logits, before)


@pytest.mark.parametrize(("architecture", "fused"), [("Mistral", 7), ("Qwen2", 7), ("Phi3", 7), ("Gemma2", 0)])
def test_norms_are_fused_where_the_kernel_computes_the_same(architecture, fused):
    model = made(architecture)
    before = reader(model, TARGETS, "hooks")(right_padded())
    assert fuse_norms(model) == fused
    for ours, theirs in zip(reader(model, TARGETS, "nnsight")(right_padded()), before, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_norm_that_computes_something_else_is_left_alone():
    model = made("Llama")

    class OtherRMSNorm(type(model.model.norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1e-3

    model.model.norm.__class__ = OtherRMSNorm
    assert fuse_norms(model) == 2 * SMALL["num_hidden_layers"]
    assert "forward" not in vars(model.model.norm)


def test_the_adapter_takes_the_dtype_of_its_model(adapted):
    in_the_models_dtype(adapted, torch.bfloat16)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in adapted.named_parameters() if "lora_" in name}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert adapted.get_base_model().model.embed_tokens.weight.dtype == torch.float32
    in_the_models_dtype(adapted, torch.float32)


def test_a_fused_adapter_computes_the_same_switched_on_off_and_in_training(adapted):
    def logits_and_gradient():
        with torch.no_grad():
            on = adapted(input_ids=DOCUMENTS[1][None]).logits
            with adapted.disable_adapter():
                off = adapted(input_ids=DOCUMENTS[1][None]).logits
        adapted.zero_grad()
        adapted(input_ids=DOCUMENTS[1][None]).logits.square().sum().backward()
        return [on, off, *(p.grad.clone() for p in adapted.parameters() if p.grad is not None)]

    layers = [m for m in adapted.modules() if hasattr(m, "lora_A")]
    expected = logits_and_gradient()
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert fuse_adapter(adapted) == len(layers) > 0
    assert all("forward" in vars(layer) for layer in layers)
    for ours, theirs in zip(logits_and_gradient(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for layer in layers:
        del layer.forward


def test_nnsight_reads_where_it_is_installed():
    assert default_reader() == "nnsight"


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_the_model_does_not_have_is_refused(adapted, layer):
    with pytest.raises(UserError, match=f"--layer {layer}: the model has layers 1 to 3"):
        reader(adapted.get_base_model(), [Target(layer, "mlp")])


def test_a_model_without_such_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(UserError, match="GPT2LMHeadModel is no Llama-like model"):
        reader(model, [Target(1, "mlp")])
