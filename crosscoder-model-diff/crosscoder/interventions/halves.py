"""Two models layer by layer: what a site gave in each, and what follows where it gives something else.

A patch at a layer leaves the layers below it as they are. So the lower halves run once for a batch, and every patch
runs the layers above alone, the last of them only at the tokens whose predictions are read. Two models in memory, or
one with an adapter that is switched on and off.

The layers are called as the model itself calls them: the hidden states are the model's, bit by bit, and the logits
those of the whole model within 1e-5 in fp32, since fewer rows are multiplied at a time (both tested).
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

from crosscoder.activations.readers import Edit, Target, edited, hidden_of, llama_layers, site_module
from finqa.runtime.errors import UserError


class Frame(NamedTuple):
    """Where the tokens of a batch stand, as every layer wants to be told."""

    mask: Any
    positions: Tensor
    rotary: Any


class Ends(NamedTuple):
    """The tokens of each text whose predictions are read, as the last layer wants to be told."""

    places: Tensor
    """[batch, most] int64; a text with fewer than the most goes on with whatever follows."""
    chosen: Tensor
    """[read] int64: which of the flattened places are read."""
    frame: Frame


def ends_of(frame: Frame, read: Tensor) -> Ends:
    """Of the tokens `read` [batch, time] bool, which are neighbours in each text."""
    counts, n_texts, time = read.sum(1), *read.shape
    steps = torch.arange(int(counts.max()), device=read.device)
    places = (read.int().argmax(1)[:, None] + steps).clamp_max(time - 1)
    if frame.mask is None:
        mask = torch.arange(time, device=read.device) <= places[:, None, :, None]
    else:
        rows = places[:, None, :, None].expand(-1, frame.mask.shape[1], -1, time)
        mask = frame.mask.expand(n_texts, -1, -1, -1).gather(2, rows)
    rotary = tuple(part.expand(n_texts, -1, -1).gather(1, _wide(places, part)) for part in frame.rotary)
    return Ends(places, (steps < counts[:, None]).flatten().nonzero().squeeze(-1), Frame(mask, places, rotary))


def _wide(places: Tensor, values: Tensor) -> Tensor:
    """[batch, most] -> [batch, most, values' last dimension], to gather with."""
    return places[..., None].expand(-1, -1, values.shape[-1])


class _Cache:
    """Stands in for the cache of a layer: keeps the keys and values of all tokens and ends the layer there; then gives
    them to the few tokens that the layer is run for."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_settings: Any) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            self.kept = keys, values
            raise _Kept
        return self.kept


class _Kept(Exception):
    """Ends a layer whose keys and values are there."""


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

    def through(self, hidden: Tensor, layers: range, frame: Frame, cache: Any = None) -> Tensor:
        """Run layers (counted from 0) on [batch, time, d_model]."""
        with self.active():
            for number in layers:
                output = self.layers[number](
                    hidden,
                    attention_mask=frame.mask,
                    position_ids=frame.positions,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    position_embeddings=frame.rotary,
                )
                hidden = hidden_of(output)
        return hidden

    def to_the_end(self, hidden: Tensor, first: int, frame: Frame, ends: Ends) -> Tensor:
        """Run the layers from `first` (counted from 0) on [batch, time, d_model] -> [read, d_model] of the last layer:
        all of it but its keys and values is run for the tokens that are read alone."""
        last = len(self.layers) - 1
        hidden = self.through(hidden, range(first, last), frame)
        few = hidden.gather(1, _wide(ends.places, hidden))
        if first <= last:
            cache = _Cache()
            with contextlib.suppress(_Kept):
                self.through(hidden, range(last, last + 1), frame, cache)
            few = self.through(few, range(last, last + 1), ends.frame, cache)
        return few.flatten(0, 1)[ends.chosen]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] of the last layer -> [..., vocabulary] fp32."""
        with self.active():
            return self.model.lm_head(self.model.model.norm(hidden)).float()


class Pair(NamedTuple):
    """The models whose difference is studied."""

    instruct: Side
    fine_tuned: Side


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
    receiver: Side,
    carrier: Side,
    record: LayerRecord,
    target: Target,
    value: Tensor | None,
    frame: Frame,
    ends: Ends | None = None,
) -> Tensor:
    """[batch, time, d_model] of the last layer, or with `ends` [read, d_model], where the site of the receiver gives
    `value` for every token, or with None what it gave.

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
    if ends is not None:
        return carrier.to_the_end(hidden, target.layer, frame, ends)
    return carrier.through(hidden, range(target.layer, len(carrier.layers)), frame)


def _kept(seen: dict[str, Tensor], name: str) -> Edit:
    def keep(hidden: Tensor) -> Tensor:
        seen[name] = hidden
        return hidden

    return keep
