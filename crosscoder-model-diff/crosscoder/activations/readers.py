"""Reads what chosen modules of a causal language model give for a batch, and runs nothing after the last of them.

Two readers with one result (tested to be equal bit by bit). nnsight is the default. Plain forward hooks do the same
where nnsight is not installed, or with --reader hooks.

No mask is passed: rows are padded on the right and the models are causal, so that no real token sees the padding, and
attention can use its fastest kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.names import SITES, Site
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Read = Callable[[Tensor], list[Tensor]]
"""Token ids [batch, time], padded on the right, to one activation [batch, time, d_model] for each target."""

Edit = Callable[[Tensor], Tensor]
"""[..., d_model] of a site to what it gives instead."""

ReaderKind = Literal["nnsight", "hooks"]


class Target(NamedTuple):
    """What is read."""

    layer: int
    """Counted from 1."""
    site: Site


def default_reader() -> ReaderKind:
    """nnsight where it is installed."""
    return "nnsight" if importlib.util.find_spec("nnsight") else "hooks"


def reader(model: PreTrainedModel, targets: Sequence[Target], kind: ReaderKind = "nnsight") -> Read:
    """A callable that gives the outputs of `targets`, in their order.

    With a LoRA adapter in the model's layers, what it reads is the model with or without the adapter, as the adapter
    is switched at the time of the call. UserError where the model has no such layers.
    """
    layers = llama_layers(model)
    for target in targets:
        if not 1 <= target.layer <= len(layers):
            raise UserError(f"--layer {target.layer}: the model has layers 1 to {len(layers)}")
    return _nnsight_reader(model, targets) if kind == "nnsight" else _hook_reader(model, targets)


def adapter_readers(
    model: PeftModel, targets: Sequence[Target], kind: ReaderKind = "nnsight", instruct: str | None = None
) -> tuple[Read, Read]:
    """(instruct, fine-tuned) readers of one model in memory, its adapter switched off and on.

    `instruct`: name of a second adapter of the model that is on, in place of none, for the first reader.
    """
    whole: Any = model.get_base_model()
    read = reader(whole, targets, kind)
    fine_tuned: Any = model.active_adapter

    def without_adapter(ids: Tensor) -> list[Tensor]:
        with model.disable_adapter():
            return read(ids)

    def with_the_other(ids: Tensor) -> list[Tensor]:
        model.set_adapter(instruct or fine_tuned)
        try:
            return read(ids)
        finally:
            model.set_adapter(fine_tuned)

    return with_the_other if instruct else without_adapter, read


def llama_layers(model: Any) -> Any:
    """The decoder layers of a Llama-like model; UserError where it has none."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UserError(f"{type(model).__name__} is no Llama-like model: it has no model.layers to read from")
    return layers


def in_the_models_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Give the adapter the dtype of its base model.

    peft loads a bf16 adapter in fp32, and products in fp32 take ten times as long as in bf16 on a GPU. In bf16 the
    adapter computes as it did in training under autocast and as it does in vLLM.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


class _EverythingRead(Exception):
    """Ends a forward pass."""


def _hook_reader(model: PreTrainedModel, targets: Sequence[Target]) -> Read:
    layers, in_order = llama_layers(model), sorted(set(targets), key=_when_it_runs)

    def read(ids: Tensor) -> list[Tensor]:
        seen: dict[Target, Tensor] = {}

        def keep(hidden: Tensor, target: Target) -> Tensor:
            seen[target] = hidden
            if target == in_order[-1]:
                raise _EverythingRead
            return hidden

        with ExitStack() as hooks, suppress(_EverythingRead), torch.no_grad():
            for target in in_order:
                hooks.enter_context(edited(site_module(layers, target), partial(keep, target=target)))
            model(input_ids=ids, use_cache=False)
        return [seen[target] for target in targets]

    return read


@contextmanager
def edited(module: nn.Module, edit: Edit) -> Iterator[None]:
    """While open, what the module gives goes through `edit`."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = edit(hidden_of(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _nnsight_reader(model: PreTrainedModel, targets: Sequence[Target]) -> Read:
    import nnsight

    traced: Any = nnsight.NNsight(model)
    in_order = sorted(set(targets), key=_when_it_runs)
    points = [site_module(traced.model.layers, target) for target in in_order]

    def read(ids: Tensor) -> list[Tensor]:
        with torch.no_grad(), traced.trace(input_ids=ids, use_cache=False) as tracer:
            seen = nnsight.save([hidden_of(point.output) for point in points])
            tracer.stop()
        by_target = dict(zip(in_order, seen, strict=True))
        return [by_target[target] for target in targets]

    return read


def site_module(layers: Any, target: Target) -> Any:
    """The module, of a model's decoder layers, whose output the target is."""
    block = layers[target.layer - 1]
    match target.site:
        case "attention":
            return block.self_attn
        case "mlp":
            return block.mlp
        case "residual":
            return block


def _when_it_runs(target: Target) -> tuple[int, int]:
    return target.layer, SITES.index(target.site)


def hidden_of(output: Any) -> Tensor:
    """The activation among what a module gives: attention gives its weights, too."""
    return output[0] if isinstance(output, tuple) else output
