"""Greedy replies of a patched model, and what their programs answer: the hard measure.

Both models read the prompt and then, token by token, what the patched model writes. Each keeps a cache of its own: the
giving model as far as the site, the receiving model as far as the site's layer, and the carrier above it. Prompts of
like length go together, padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from crosscoder.interventions.causal import Cell, patched_value
from crosscoder.interventions.halves import Pair, edited, site_module
from crosscoder.interventions.patching import sides
from crosscoder.interventions.sets import Reading
from finqa.evaluation.generation import Reply, cut_at_stop, end_ids, is_reasoning
from finqa.sandbox.running import Sandbox
from finqa.task import answers, prompts

STOP_TAIL = 32
"""Tokens that a stop string is looked for in, at the end of what is written."""


@dataclass(frozen=True)
class Answered:
    """What became of each reply's program."""

    right: list[bool]
    """Its answer is the label, under the strict rule."""
    runs: list[bool]
    """It gave an answer."""


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
    """The reply to each prompt (token ids, BOS first), in their order; ends at an end token or a stop string."""
    order = sorted(range(len(asked)), key=lambda place: -len(asked[place]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        written = written_tokens(pair, target, cell, [list(asked[p]) for p in places], tokenizer, max_new_tokens, stop)
        for place, tokens in zip(places, written, strict=True):
            replies[place] = _reply(tokens, len(asked[place]), tokenizer, stop, _ends(pair, tokenizer))
    return [replies[place] for place in range(len(asked))]


class _Writer:
    """A batch under way: both models' caches, and where the patch is."""

    def __init__(self, pair: Pair, target: Target, cell: Cell):
        from transformers import DynamicCache

        self.pair, self.target, self.cell = pair, target, cell
        self.number, self.receiver, self.above = sides(pair, cell.direction, cell.carrier)
        self.giver = pair[1 - self.number]
        self.caches = [DynamicCache(config=side.model.config) for side in (self.giver, self.receiver)]

    def step(self, ids: Tensor, attended: Tensor, positions: Tensor, where: Tensor) -> Tensor:
        """Read `ids` [batch, new], patched at `where` [batch, new]; [batch, vocabulary] of the token that follows.

        `attended` [batch, all so far] bool.
        """
        below = range(self.target.layer)
        given: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            given.append(output)
            return output

        hidden = self.giver.embedded(ids)
        frame = self.giver.frame(hidden, attended, positions, self.caches[0])
        with edited(site_module(self.giver, self.target), keep):
            self.giver.through(hidden, below, frame, self.caches[0])
        hidden = self.receiver.embedded(ids)
        frame = self.receiver.frame(hidden, attended, positions, self.caches[1])
        with edited(site_module(self.receiver, self.target), lambda own: self._patched(own, given[0], where)):
            hidden = self.receiver.through(hidden, below, frame, self.caches[1])
        hidden = self.above.through(hidden, range(self.target.layer, self.pair.depth), frame, self.caches[1])
        return self.above.logits(hidden[:, -1])

    def _patched(self, own: Tensor, given: Tensor, where: Tensor) -> Tensor:
        if not where.any():
            return own
        both = (own, given) if self.number == 0 else (given, own)
        reading = Reading(torch.stack([site[where] for site in both], dim=1))
        return patched_value(own, given, self.cell.addition(reading), where, self.cell)


@torch.no_grad()
def written_tokens(
    pair: Pair,
    target: Target,
    cell: Cell,
    asked: list[list[int]],
    tokenizer: Any,
    max_new_tokens: int,
    stop: tuple[str, ...],
) -> list[list[int]]:
    """New tokens of each prompt of a batch, up to and with the one that ends it."""
    device, longest = pair.instruct.device, max(map(len, asked))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in asked], device=device)
    attended = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=device).bool()
    place = attended.long().cumsum(-1) - 1
    where = attended & (place > 0)
    writer, ends = _Writer(pair, target, cell), _ends(pair, tokenizer)
    logits = writer.step(ids, attended, place.clamp_min(0), where)
    written: list[list[int]] = [[] for _ in asked]
    done = [False] * len(asked)
    later = torch.ones_like(where[:, :1])
    for number in range(max_new_tokens):
        best = logits.argmax(-1)
        for row, token in enumerate(best.tolist()):
            if not done[row]:
                written[row].append(token)
                done[row] = token in ends or _stops(written[row], tokenizer, stop)
        if all(done) or number == max_new_tokens - 1:
            break
        attended = torch.cat([attended, torch.ones_like(attended[:, :1])], dim=1)
        place = attended.long().sum(-1, keepdim=True) - 1
        logits = writer.step(best[:, None], attended, place, later)
    return written


def _stops(tokens: list[int], tokenizer: Any, stop: tuple[str, ...]) -> bool:
    if not stop:
        return False
    tail = tokenizer.decode(tokens[-STOP_TAIL:], skip_special_tokens=True)
    if not any(string in tail for string in stop):
        return False
    return not is_reasoning(tokenizer.decode(tokens, skip_special_tokens=True))


def _reply(tokens: list[int], n_prompt: int, tokenizer: Any, stop: tuple[str, ...], ends: set[int]) -> Reply:
    ended = bool(tokens) and tokens[-1] in ends
    text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    cut = cut_at_stop(text, stop)
    return Reply(cut, n_prompt, len(tokens), "stop" if ended or cut.endswith(stop) else "length")


def _ends(pair: Pair, tokenizer: Any) -> set[int]:
    return end_ids(pair.instruct.model.generation_config.eos_token_id, tokenizer.eos_token_id)


def answered(replies: Sequence[Reply], expected: Sequence[str], sandbox: Sandbox) -> Answered:
    """Run the program of each reply and hold its answer against the label."""
    runs = sandbox.run_many([prompts.extract_code(reply.text) for reply in replies])
    return Answered(
        right=[answers.match(run.answer, label) for run, label in zip(runs, expected, strict=True)],
        runs=[run.error_kind is None for run in runs],
    )
