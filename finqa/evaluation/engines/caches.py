"""Keys and values of a batch that is written: with room for new tokens, and read once of what prompts begin with alike.

Questions on one page share the page, few-shot prompts their examples, samples of one question the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

WORTH = 0.7
"""Beginnings are read by themselves where that leaves at most this share of the tokens, padding included."""
ROOM = 256
"""Tokens that keys and values can grow by before they are copied, where nobody knows how many will come."""


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are views of tensors with room, where transformers copies all at each token: that
    takes longer than to attend to them, and leaves the memory of a GPU in pieces.

    `most`: tokens that will come as far as is known. There is room for them at once; with more it grows by ROOM.
    """

    def __init__(self, most: int = 0):
        super().__init__()
        self.most = most
        self.rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [batch, heads, new, d] each; returns all of them, [batch, heads, time, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._added(0, self.keys, key_states), self._added(1, self.values, value_states)
        return self.keys, self.values

    def _added(self, which: int, kept: Any, new: Tensor) -> Tensor:
        before = kept.shape[-2] if kept.numel() else 0
        now, room = before + new.shape[-2], self.rooms[which]
        if room is None or now > room.shape[-2]:
            room = self._room(which, len(new), now, new)
            if before:
                room[:, :, :before] = kept
        room[:, :, before:now] = new
        return room[:, :, :now]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices` of what there is, with room again."""
        if self.get_seq_length():
            self.keys, self.values = self._selected(0, self.keys, indices), self._selected(1, self.values, indices)

    def _selected(self, which: int, kept: Any, indices: Tensor) -> Tensor:
        room = self._room(which, len(indices), kept.shape[-2], kept)[:, :, : kept.shape[-2]]
        room[:] = kept[indices]
        return room

    def _room(self, which: int, rows: int, time: int, like: Tensor) -> Tensor:
        time = self.most if time <= self.most else time + ROOM
        room = self.rooms[which] = like.new_empty(rows, like.shape[1], time, like.shape[-1])
        return room


class BatchCache(DynamicCache):
    """A cache of layers with room, where the model's layers keep all keys and values."""

    rows: Tensor | None = None
    """[prompts] int64, once beginnings are spread over prompts: the beginning of each. A cache that is kept beside this
    one does the same."""
    labels: Tensor | None = None
    """[rows] int64: the label of each row, for hooks that treat rows differently; None where nobody gave any."""

    def __init__(self, model: Any, most: int = 0):
        """`most`: tokens of each row as far as is known, for which there will be room."""
        super().__init__(config=model.config.get_text_config())
        self.most = most
        if keeps_all(model.config):
            self.layers = [RoomyLayer(most) for _ in self.layers]

    def spread(self, rows: Tensor) -> None:
        """From beginnings, go on with prompts: `rows` [prompts] int64 is the beginning of each, whose label it has."""
        self.batch_select_indices(rows)
        self.rows = rows
        self.labels = None if self.labels is None else self.labels[rows]


@dataclass(frozen=True)
class Shared:
    """How the prompts of a batch are divided."""

    lengths: list[int]
    """Tokens of each beginning: less than every prompt that begins so."""
    rows: list[int]
    """The beginning of each prompt."""


@dataclass(frozen=True)
class Laid:
    """The prompts of a batch side by side, padded on the left; where beginnings are shared, these and what follows them
    each by itself, so that there is padding between them too."""

    ids: Tensor
    """[prompts, time] int64."""
    mask: Tensor
    """[prompts, time] int64: 1 but for padding."""
    begun: tuple[Tensor, Tensor, Tensor] | None
    """Ids and mask of the beginnings, and the beginning of each prompt; None where each is read whole."""
    labels: Tensor | None
    """[beginnings, or prompts where each is read whole] int64: the label of each."""

    def read(self, model: Any, new_tokens: int) -> BatchCache:
        """An empty cache, or one of the beginnings, spread over the prompts; with room for so many new tokens."""
        cache = BatchCache(model, self.ids.shape[1] + new_tokens)
        cache.labels = self.labels
        if self.begun is None:
            return cache
        ids, mask, rows = self.begun
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        # No logits are needed; 0 would be all.
        model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
        cache.spread(rows)
        return cache


def laid_out(model: Any, prompts: Sequence[list[int]], pad: int, labels: Sequence[int] | None = None) -> Laid:
    """On the model's device. No beginnings are shared by a model of which a layer keeps a window alone: padding between
    would count in it. `labels`: one for each prompt; those of different labels share no beginning."""
    device = model.device
    shared = shared_beginnings(prompts, labels) if keeps_all(model.config) else None
    its = None if labels is None else torch.tensor(labels, device=device)
    if shared is None:
        return Laid(*_padded(prompts, pad, device), None, its)
    rows = torch.tensor(shared.rows, device=device)
    one_of = [shared.rows.index(number) for number in range(len(shared.lengths))]
    ids, mask = _padded([prompts[i][:n] for i, n in zip(one_of, shared.lengths, strict=True)], pad, device)
    rest = [prompt[shared.lengths[row] :] for row, prompt in zip(shared.rows, prompts, strict=True)]
    then = _padded(rest, pad, device)
    both = torch.cat([ids[rows], then[0]], dim=1), torch.cat([mask[rows], then[1]], dim=1)
    return Laid(*both, (ids, mask, rows), None if its is None else its[one_of])


def _padded(texts: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask [texts, time] int64, padded on the left."""
    longest = max(map(len, texts))
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
    return ids, mask


@dataclass(frozen=True)
class Extent:
    """What a batch takes room for."""

    rows: int
    time: int
    """Tokens of each row, padding included."""
    read: int
    """Tokens that the model reads at once at most: the beginnings, or what follows them."""


def extent(prompts: Sequence[list[int]], model: Any) -> Extent:
    """Of the prompts of one batch, as `laid_out` lays them; `model` is the model's config."""
    rows, longest = len(prompts), max(map(len, prompts))
    shared = shared_beginnings(prompts) if keeps_all(model) else None
    if shared is None:
        return Extent(rows, longest, rows * longest)
    begun = max(shared.lengths)
    rest = max(len(prompt) - shared.lengths[row] for prompt, row in zip(prompts, shared.rows, strict=True))
    return Extent(rows, begun + rest, max(len(shared.lengths) * begun, rows * rest))


def keeps_all(model: Any) -> bool:
    """Whether each layer of a model of this config keeps all keys and values, not those of a window alone."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.get_text_config()).layers)


def shared_beginnings(prompts: Sequence[list[int]], labels: Sequence[int] | None = None) -> Shared | None:
    """The division with the fewest tokens to read, padding included; None where that is not WORTH it.

    Prompts in the order of their tokens stand beside those that they begin alike with. They are in one group with the
    next where the two share some number of tokens, for each of the numbers that occur; those of different labels share
    none.
    """
    labels = labels or [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (labels[i], prompts[i]))
    common = [_alike(prompts[a], prompts[b]) if labels[a] == labels[b] else 0 for a, b in pairwise(order)]
    best, fewest = None, WORTH * len(prompts) * max(map(len, prompts))
    for least in sorted(set(common) - {0}):
        groups = [[order[0]]]
        for place, shared in zip(order[1:], common, strict=True):
            if shared >= least:
                groups[-1].append(place)
            else:
                groups.append([place])
        lengths = _lengths(prompts, groups, common)
        rest = max(len(prompts[i]) - n for n, group in zip(lengths, groups, strict=True) for i in group)
        tokens = len(groups) * max(lengths) + len(prompts) * rest
        if tokens <= fewest and min(lengths) > 0:
            best, fewest = (lengths, groups), tokens
    if best is None:
        return None
    rows = {i: number for number, group in enumerate(best[1]) for i in group}
    return Shared(best[0], [rows[i] for i in range(len(prompts))])


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin alike with, short of the last of either."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


def _lengths(prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], common: Sequence[int]) -> list[int]:
    """What all of a group share; of a prompt by itself as much as of the longest of the others."""
    ends = accumulate(map(len, groups))
    shared = [min(common[end - len(group) : end - 1], default=0) for end, group in zip(ends, groups, strict=True)]
    alone = max(shared)
    return [
        n if len(group) > 1 else min(alone, len(prompts[group[0]]) - 1) for n, group in zip(shared, groups, strict=True)
    ]
