"""Generation by a patched model, and what its programs answer: the hard measure.

    with patched(pair, target, cell) as model:
        model.generate(**inputs)

Hooks change the model whose layers run above the patch, so it is called, and generates, as any model of its library. A
patch that reads the other model too has that one read the same tokens as far as the patched layer, into a cache of its
own: it takes 1 + layer / layers times as long as plain generation. One that adds the same vector everywhere reads none.

Several patches of one direction and carrier write in the same batches (`replies_of_cells`): a step takes a GPU hardly
longer for many rows than for few.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.readers import Edit, Target, edited, site_module
from crosscoder.interventions.causal import Cell, patched_value
from crosscoder.interventions.halves import Pair, Side
from crosscoder.interventions.patching import sides
from crosscoder.interventions.sets import Reading
from finqa.evaluation.engines.caches import BatchCache
from finqa.evaluation.engines.hugging_face_engine import hugging_face
from finqa.evaluation.generation import GenerationConfig, Reply, all_replies
from finqa.runtime.errors import UserError
from finqa.sandbox.running import Sandbox
from finqa.task import answers, prompts


@contextlib.contextmanager
def patched(pair: Pair, target: Target, *cells: Cell) -> Iterator[Any]:
    """The model whose layers run above the patch, patched while the block is open: call it, or its `generate`.

    Every token is patched but BOS and padding. Any prompts and any sampling will do, but no beams: they would reorder
    one model's cache and not the other's. With several cells each row has the patch of one: the labels of the cache
    that a call is given (BatchCache.labels) say of which, by its place among `cells`.

    Raises UserError for cells of several directions or carriers, and in a call ValueError where rows have no labels.
    """
    if len({(cell.direction, cell.carrier) for cell in cells}) != 1:
        raise UserError("patches of several directions or carriers change different models; write by each in turn")
    number, receiver, above = sides(pair, cells[0].direction, cells[0].carrier)
    giver, block, site = pair[1 - number], above.layers[target.layer - 1], site_module(above.layers, target)
    follower = _Follower(giver if above is receiver else receiver, target)
    call = _Call(len(cells))
    reads = any(cell.addition.reads for cell in cells)
    given: list[Tensor] = []

    def before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not follower.running:
            call.enter(model, args, kwargs)

    def value(own: Tensor, other: Tensor) -> Tensor:
        both = (own, other) if number == 0 else (other, own)
        pairs = torch.stack(both, dim=-2).flatten(0, 1)
        for cell, at in zip(cells, call.at, strict=True):
            if at is None or len(at):
                reading = Reading(pairs if at is None else pairs[at])
                own = patched_value(own, other, cell.addition(reading), at, cell)
        return own

    def at_own_site(own: Tensor) -> Tensor:
        if follower.running:
            return own
        return value(own, follower.site(call) if reads else own)

    def at_givers_site(its: Tensor) -> Tensor:
        if not follower.running:
            given[:] = [its]
        return its

    def at_givers_layer(its: Tensor) -> Tensor:
        return its if follower.running else follower.layer(call, lambda own: value(own, given[0]))

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(above.active())
        hooks.callback(above.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.enter_context(edited(site, at_own_site if above is receiver else at_givers_site))
        if above is not receiver:
            hooks.enter_context(edited(block, at_givers_layer))
        yield above.model


class _Call:
    """One forward pass under way: what was given to read."""

    inputs: dict[str, Any]
    first: bool
    """Nothing was read before: a new text."""
    rows: Tensor | None
    """[batch] int64: of the texts that were read before, the one that each goes on from; None where it is its own."""
    most: int
    """Tokens of a row for which the model's cache has room from the start."""
    at: Sequence[Tensor | None]
    """Where each cell patches it, as places in the flattened [batch, new] tokens; None is everywhere."""

    def __init__(self, n_cells: int):
        self.n_cells = n_cells
        self._labels: Tensor | None = None
        self._rows_of: list[Tensor] = []
        """The rows of each cell by `_labels`."""

    def enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        past = kwargs.get("past_key_values")
        self.inputs = {name: kwargs[name] for name in ("attention_mask", "position_ids") if name in kwargs}
        self.inputs["input_ids"] = ids
        self.first = past is None or past.get_seq_length() == 0
        of_batch = past if isinstance(past, BatchCache) else None
        self.rows, self.most = (of_batch.rows, of_batch.most) if of_batch else (None, 0)
        at = None
        if self.first or ids.shape[1] > 1:
            mask = self.inputs.get("attention_mask")
            attended = (torch.ones_like(ids) if mask is None else mask).bool()
            begins = (attended.cumsum(-1) == 1)[:, -ids.shape[1] :] & self.first
            is_bos = ids == (-1 if (bos := model.config.get_text_config().bos_token_id) is None else bos)
            at = (attended[:, -ids.shape[1] :] & ~(begins & is_bos)).flatten().nonzero().squeeze(-1)
        self.at = [at] if self.n_cells == 1 else self._by_cell(at, of_batch.labels if of_batch else None, ids.shape[1])

    def _by_cell(self, at: Tensor | None, labels: Tensor | None, new: int) -> list[Tensor]:
        """The places of each cell's rows among `at`, `new` to a row; None is one to a row, all of which count."""
        if labels is None:
            raise ValueError("several cells, and the cache says of no row which one it is of")
        if at is not None:
            its = labels.repeat_interleave(new)[at]
            return [at[its == number] for number in range(self.n_cells)]
        if labels is not self._labels:
            # A GPU waits where places are looked for, so that is done once for all tokens that follow.
            self._labels = labels
            self._rows_of = [(labels == number).nonzero().squeeze(-1) for number in range(self.n_cells)]
        return self._rows_of


class _Read(Exception):
    """Ends a forward pass with what it was run for."""


class _Follower:
    """A model that reads what another one reads, as far as a layer, into a cache of its own."""

    def __init__(self, side: Side, target: Target):
        self.side, self.target = side, target
        self.cache: Any = None
        self.spread = False
        """Whether the cache is of the rows of the call, not of beginnings that they share."""
        self.running = False
        """So that hooks tell its pass from the other model's, which with an adapter is the same model."""

    def site(self, call: _Call) -> Tensor:
        """[batch, new, d_model] of the site."""
        with edited(site_module(self.side.layers, self.target), _stop):
            return self._run(call)

    def layer(self, call: _Call, edit: Edit) -> Tensor:
        """[batch, new, d_model] of the layer, where `edit` changes the site."""
        block = self.side.layers[self.target.layer - 1]
        with edited(site_module(self.side.layers, self.target), edit), edited(block, _stop):
            return self._run(call)

    def _run(self, call: _Call) -> Tensor:
        if call.first:
            self.cache, self.spread = BatchCache(self.side.model, call.most), False
        elif call.rows is not None and not self.spread:
            self.cache.batch_select_indices(call.rows)
            self.spread = True
        self.running = True
        try:
            with self.side.active():
                self.side.model(**call.inputs, past_key_values=self.cache, use_cache=True)
        except _Read as read:
            return read.args[0]
        finally:
            self.running = False
        raise AssertionError("the layer was not reached")


def _stop(hidden: Tensor) -> Tensor:
    raise _Read(hidden)


def patched_replies(
    pair: Pair,
    target: Target,
    cell: Cell,
    asked: Sequence[Sequence[int]],
    tokenizer: Any,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    stop: tuple[str, ...] = prompts.STOP,
) -> list[Reply]:
    """The greedy reply to each prompt (token ids, BOS first), in their order; as plain generation gives them."""
    return replies_of_cells(pair, target, [(cell, asked)], tokenizer, max_new_tokens, batch_size, stop)[0]


def replies_of_cells(
    pair: Pair,
    target: Target,
    sets: Sequence[tuple[Cell, Sequence[Sequence[int]]]],
    tokenizer: Any,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    stop: tuple[str, ...] = prompts.STOP,
) -> list[list[Reply]]:
    """For each cell and its prompts what `patched_replies` gives, where batches are filled with the prompts of all.

    Raises UserError for cells of several directions or carriers.
    """
    config = GenerationConfig(False, max_new_tokens, batch_size, stop)
    labels = [number for number, (_, asked) in enumerate(sets) for _ in asked]
    together = [list(ids) for _, asked in sets for ids in asked]
    with patched(pair, target, *(cell for cell, _ in sets)) as model:
        replies = iter(all_replies(hugging_face(model, tokenizer, config, labels), together))
    return [list(islice(replies, len(asked))) for _, asked in sets]


@dataclass(frozen=True)
class Answered:
    """What became of each reply's program."""

    right: list[bool]
    """Its answer is the label, under the strict rule."""
    runs: list[bool]
    """It gave an answer."""


def answered(replies: Sequence[Reply], expected: Sequence[str], sandbox: Sandbox) -> Answered:
    """Run the program of each reply and hold its answer against the label."""
    runs = sandbox.run_many([prompts.extract_code(reply.text) for reply in replies])
    return Answered(
        right=[answers.match(run.answer, label) for run, label in zip(runs, expected, strict=True)],
        runs=[run.error_kind is None for run in runs],
    )
