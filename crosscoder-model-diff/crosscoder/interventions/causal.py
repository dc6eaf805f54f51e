"""Patches by what a dictionary writes, teacher-forced: one cell is an addition, a direction and a carrier.

`sufficiency` adds to the instruct model, `necessity` takes from the fine-tuned one. The carrier's layers run above:
with `other`, an addition to the instruct model is read by the fine-tuned upper half (Minder et al. 2025), with `own`
by its own. Latents read both models on the same prefix; what a document has untouched (BOS) is never changed.

The lower halves of both models are run once for a batch and a group of cells, and each cell runs the layers above.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import Pair
from crosscoder.interventions.patching import (
    BATCH_TOKENS,
    Carrier,
    Direction,
    Halves,
    agreement,
    batches,
    patched_logits,
    run_halves,
    sides,
)
from crosscoder.interventions.ranking import reading_of
from crosscoder.interventions.sets import Addition, Reading, Whole, digest, weights_digest
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.time_left import Say, TimeLeft


class Cell(NamedTuple):
    """One patch."""

    addition: Addition
    direction: Direction = "sufficiency"
    carrier: Carrier = "other"

    @property
    def label(self) -> dict[str, Any]:
        # Every position is patched: the reports say so, and journals of earlier versions have it in their keys.
        where = {"direction": self.direction, "carrier": self.carrier, "positions": "all"}
        return {**self.addition.label, **where}


@dataclass(frozen=True)
class Measured:
    """What one cell gives, a number for each document."""

    divergence: list[float]
    """Mean over the completion's tokens of KL(fine-tuned || patched), nats."""
    exact: list[bool]
    """The patched model's best next token is the document's, throughout the completion."""
    injected: float
    """Root mean square length of what was added, over the positions that were patched."""


def patched_value(own: Tensor, given: Tensor, added: Tensor, where: Tensor | None, cell: Cell) -> Tensor:
    """What the site of the receiving model gives: `own` [..., d_model], changed at `where` [...]; None is everywhere.

    `added` [tokens, d_model] is the addition at these tokens. The whole difference is put there as the other model's
    `given` is, with no rounding.
    """
    sign = 1.0 if cell.direction == "sufficiency" else -1.0
    if where is None:  # choosing tokens makes a GPU wait
        whole = isinstance(cell.addition, Whole)
        return given.to(own.dtype) if whole else (own.float() + sign * added.view(own.shape)).to(own.dtype)
    if isinstance(cell.addition, Whole):
        return torch.where(where[..., None], given.to(own.dtype), own)
    value = own.clone()
    value[where] = (own[where].float() + sign * added).to(own.dtype)
    return value


@torch.no_grad()
def measure(
    pair: Pair, target: Target, documents: Sequence[Document], cells: Sequence[Cell], batch_tokens: int = BATCH_TOKENS
) -> list[Measured]:
    """Every cell over all documents. Two floats a document and cell are kept, nothing else."""
    n = len(documents)
    divergence = torch.zeros(len(cells), n, dtype=torch.float64)
    exact = torch.zeros(len(cells), n, dtype=torch.bool)
    squares, tokens = torch.zeros(len(cells), dtype=torch.float64), torch.zeros(len(cells))
    for chosen, batch in batches(documents, pair.instruct.device, batch_tokens):
        halves = run_halves(pair, batch, [target.layer])
        reading = reading_of(halves, target)
        for number, cell in enumerate(cells):
            logits, added = _patched(pair, halves, target, cell, reading)
            found = agreement(logits, halves.reference, batch)
            divergence[number, chosen], exact[number, chosen] = found.divergence, found.exact
            squares[number] += added.double().square().sum().cpu()
            tokens[number] += len(added)
    injected = (squares / tokens.clamp_min(1)).sqrt().tolist()
    return [Measured(d.tolist(), e.tolist(), i) for d, e, i in zip(divergence, exact, injected, strict=True)]


def _patched(pair: Pair, halves: Halves, target: Target, cell: Cell, reading: Reading) -> tuple[Tensor, Tensor]:
    """Logits of the patched model, and what was added [patched positions, d_model]."""
    where = halves.batch.patched
    number = sides(pair, cell.direction, cell.carrier)[0]
    own, given = (halves.records[m][target.layer].site(target) for m in (number, 1 - number))
    added = reading.added(cell.addition)
    value = patched_value(own, given, added, where, cell)
    return patched_logits(pair, halves, target, cell.direction, cell.carrier, value), added


def experiment_key(pair: Pair, target: Target, documents: Sequence[Document], completions: str) -> str:
    """Key of the two models' weights, the site and the very documents."""
    made_of = [[d.id, d.n_prompt, digest(torch.tensor(d.ids)), d.untouched] for d in documents]
    weights = [weights_digest(side.model) for side in pair]
    return _hash([weights, list(target), completions, made_of])


def cell_key(experiment: str, what: str, label: dict[str, Any]) -> str:
    return _hash([experiment, what, label])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def measure_missing(
    pair: Pair,
    target: Target,
    documents: Sequence[Document],
    cells: Sequence[Cell],
    journal: KeyedJournal,
    experiment: str,
    cells_at_once: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    say: Say = lambda line: None,
) -> list[Measured]:
    """Every cell, from the journal where it is there. `say` hears how long the others will take."""
    keys = [cell_key(experiment, "teacher-forced", cell.label) for cell in cells]
    if len(set(keys)) < len(keys):
        raise UserError("two cells of a causal report are the same; name each set once")
    missing = [i for i in _mixed(cells) if keys[i] not in journal.found]
    if 0 < len(missing) < len(cells):
        say(f"going on: {len(cells) - len(missing)} of {len(cells)} cells are there")
    left = TimeLeft(f"{len(missing)} cells on {len(documents)} documents", len(missing), say)
    for start in range(0, len(missing), cells_at_once):
        group = missing[start : start + cells_at_once]
        for i, found in zip(
            group, measure(pair, target, documents, [cells[i] for i in group], batch_tokens), strict=True
        ):
            rounded = [float(f"{value:.9g}") for value in found.divergence]
            record = {"divergence": rounded, "exact": [int(e) for e in found.exact], "injected": found.injected}
            journal.add(keys[i], {"what": "teacher-forced", **cells[i].label, **record})
        left.add(len(group))
    records = [journal.found[key] for key in keys]
    return [Measured(r["divergence"], [bool(e) for e in r["exact"]], r["injected"]) for r in records]


def _mixed(cells: Sequence[Cell]) -> list[int]:
    """Places of the cells, additions in a fixed random order: the first group's time is then that of any other. The
    cells of one addition stay together, since they share what it adds."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, cell in enumerate(cells):
        places[id(cell.addition)].append(place)
    order = list(places.values())
    random.Random(0).shuffle(order)
    return [place for own in order for place in own]
