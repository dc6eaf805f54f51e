"""Two models layer by layer: what a site gave in each, and what follows where it gives something else.

A patch at a layer leaves the layers below it as they are. So the lower halves run once for a batch, and every patch
runs the layers above alone. Two models in memory, or one with an adapter that is switched on and off.

The layers are called as the model itself calls them (tested: the logits are the model's, bit by bit).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.activations.readers import Target, hidden_of, llama_layers, site_module
from finqa.runtime.errors import UserError

Edit = Callable[[Tensor], Tensor]
"""[..., d_model] of a site to what it gives instead."""


class Frame(NamedTuple):
    """Where the tokens of a batch stand, as every layer wants to be told."""

    mask: Any
    positions: Tensor
    rotary: Any


class Side:
    """One model of a pair."""

    def __init__(self, model: Any, active: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext):
        """`active` opens the context in which the model is this side: its adapter switched off, say."""
        self.model = model
        self.active = active
        self.layers: Sequence[nn.Module] = llama_layers(model)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def embedded(self, ids: Tensor) -> Tensor:
        """[batch, time] -> [batch, time, d_model]: what enters the first layer."""
        with self.active():
            return self.model.model.embed_tokens(ids)

    def frame(self, hidden: Tensor) -> Frame:
        """For `hidden` [batch, time, d_model], padded on the right: causal models need no mask for that."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        config = self.model.config
        if len(set(getattr(config, "layer_types", None) or ["one"])) > 1:
            raise UserError(f"{type(self.model).__name__} mixes kinds of attention; patches know models of one kind")
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        make: Any = create_causal_mask
        if getattr(config, "sliding_window", None) is not None:
            make = create_sliding_window_causal_mask
        mask = make(
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        return Frame(mask, positions, self.model.model.rotary_emb(hidden, position_ids=positions))

    def through(self, hidden: Tensor, layers: range, frame: Frame) -> Tensor:
        """Run layers (counted from 0) on [batch, time, d_model]."""
        with self.active():
            for number in layers:
                output = self.layers[number](
                    hidden,
                    attention_mask=frame.mask,
                    position_ids=frame.positions,
                    past_key_values=None,
                    use_cache=False,
                    position_embeddings=frame.rotary,
                )
                hidden = hidden_of(output)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] of the last layer -> [..., vocabulary] fp32."""
        with self.active():
            return self.model.lm_head(self.model.model.norm(hidden)).float()


class Pair(NamedTuple):
    """The models whose difference is studied."""

    instruct: Side
    fine_tuned: Side

    @property
    def depth(self) -> int:
        return len(self.instruct.layers)


def pair_of(instruct: Any, fine_tuned: Any = None) -> Pair:
    """A pair of two whole models, or of one with an adapter (a PeftModel). UserError where they cannot be paired."""
    if fine_tuned is None:
        whole = instruct.get_base_model()
        return Pair(Side(whole, _switch(instruct, off=True)), Side(whole, _switch(instruct, off=False)))
    pair = Pair(Side(instruct), Side(fine_tuned))
    shapes = [(len(side.layers), side.model.config.hidden_size) for side in pair]
    if shapes[0] != shapes[1]:
        raise UserError(f"the two models differ in shape (layers, width): {shapes[0]} and {shapes[1]}")
    return pair


def _switch(model: Any, off: bool) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the adapter is off, or on; either opens inside the other.

    The same as PeftModel.disable_adapter, which walks all modules: milliseconds, twice for each token that is written.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @contextlib.contextmanager
    def switched() -> Iterator[None]:
        before = [module._disable_adapters for module in adapted]
        for module in adapted:
            module._disable_adapters = off
        try:
            yield
        finally:
            for module, was in zip(adapted, before, strict=True):
                module._disable_adapters = was

    return switched


@dataclass(frozen=True)
class LayerRecord:
    """What one layer of one model read and gave; all [batch, time, d_model]."""

    entering: Tensor
    attention: Tensor
    mlp: Tensor
    residual: Tensor

    def site(self, target: Target) -> Tensor:
        return getattr(self, target.site)

    @cached_property
    def between(self) -> Tensor | None:
        """The stream between attention and MLP; None where the layer does more than add both to it."""
        between = self.entering + self.attention
        return between if torch.equal(between + self.mlp, self.residual) else None


def record_layers(side: Side, hidden: Tensor, frame: Frame, layers: Sequence[int]) -> dict[int, LayerRecord]:
    """Records of `layers` (counted from 1); runs up to the last of them."""
    records: dict[int, LayerRecord] = {}
    done = 0
    for layer in sorted(set(layers)):
        entering = side.through(hidden, range(done, layer - 1), frame)
        block: Any = side.layers[layer - 1]
        seen: dict[str, Tensor] = {}
        with edited(block.self_attn, _kept(seen, "attention")), edited(block.mlp, _kept(seen, "mlp")):
            hidden = side.through(entering, range(layer - 1, layer), frame)
        records[layer] = LayerRecord(entering, seen["attention"], seen["mlp"], hidden)
        done = layer
    return records


def after_patch(
    receiver: Side, carrier: Side, record: LayerRecord, target: Target, value: Tensor | None, frame: Frame
) -> Tensor:
    """[batch, time, d_model] of the last layer where the site of the receiver gives `value` for every token, or with
    None what it gave.

    The receiver's layer runs up to the site's end, the carrier's layers above it.
    """
    if value is None:
        hidden = record.residual
    elif target.site == "residual":
        hidden = value
    elif target.site == "mlp" and record.between is not None:
        hidden = record.between + value
    else:
        with edited(site_module(receiver.layers, target), lambda _: value):
            hidden = receiver.through(record.entering, range(target.layer - 1, target.layer), frame)
    return carrier.through(hidden, range(target.layer, len(carrier.layers)), frame)


@contextlib.contextmanager
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


def _kept(seen: dict[str, Tensor], name: str) -> Edit:
    def keep(hidden: Tensor) -> Tensor:
        seen[name] = hidden
        return hidden

    return keep
