"""Patches by what a dictionary writes, teacher-forced: one cell is an addition, a direction and a carrier.

`sufficiency` adds to the instruct model, `necessity` takes from the fine-tuned one. The carrier's layers run above:
with `other`, an addition to the instruct model is read by the fine-tuned upper half (Minder et al. 2025), with `own`
by its own. Latents read both models on the same prefix; what a document has untouched (BOS) is never changed.

The lower halves of both models are run once for a batch, and each cell runs the layers above.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import Pair
from crosscoder.interventions.patching import (
    Batch,
    Carrier,
    Direction,
    agreement,
    batch_tokens_for,
    batches,
    patched_logits,
    run_halves,
    sides,
)
from crosscoder.interventions.ranking import reading_of
from crosscoder.interventions.sets import Addition, Whole, digest, weights_digest
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.progress import Progress, say


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


def patched_value(own: Tensor, given: Tensor, added: Tensor, at: Tensor | None, cell: Cell) -> Tensor:
    """What the site of the receiving model gives: `own` [..., d_model], changed at the places `at` of its flattened
    tokens; None is everywhere.

    `added` [tokens, d_model] is the addition at these tokens. The whole difference is put there as the other model's
    `given` is, with no rounding.
    """
    sign = 1.0 if cell.direction == "sufficiency" else -1.0
    whole, flat = isinstance(cell.addition, Whole), own.flatten(0, -2)
    value = given.flatten(0, -2) if whole else flat
    value = value if at is None else value[at]
    value = (value if whole else value.float() + sign * added).to(own.dtype)
    return (value if at is None else flat.index_copy(0, at, value)).view(own.shape)


class _Part(NamedTuple):
    """What a batch of documents gives in every cell; the divergence and the exact programs as in Measured."""

    divergence: list[list[float]]
    exact: list[list[int]]
    squares: list[float]
    """For each cell the squared length of what was added, summed over the positions that were patched."""
    positions: int


@torch.no_grad()
def _measure_batch(pair: Pair, target: Target, batch: Batch, cells: Sequence[Cell], progress: Progress) -> _Part:
    """Nothing is brought to the CPU before the last cell, since a GPU would wait there for the next one."""
    halves = run_halves(pair, batch, [target.layer])
    reading = reading_of(halves, target)
    found, squares = [], []
    for cell in cells:
        number = sides(pair, cell.direction, cell.carrier)[0]
        own, given = (halves.records[m][target.layer].site(target) for m in (number, 1 - number))
        added = reading.added(cell.addition)
        value = patched_value(own, given, added, batch.patched_at, cell)
        logits = patched_logits(pair, halves, target, cell.direction, cell.carrier, value)
        found.append(agreement(logits, halves.reference, batch))
        squares.append(added.square().sum(dtype=torch.float64))
        progress.advance(batch.ids.numel())
    divergence, exact = (torch.stack(each).tolist() for each in zip(*map(astuple, found), strict=True))
    rounded = [[float(f"{value:.9g}") for value in row] for row in divergence]
    whether = [[int(e) for e in row] for row in exact]
    return _Part(rounded, whether, torch.stack(squares).tolist(), len(batch.patched_at))


def _kept_part(record: dict[str, Any] | None, names: Sequence[str]) -> _Part | None:
    """The cells of these keys in the journal's record of a batch; None where one is not there."""
    place = {name: number for number, name in enumerate(record["cells"])} if record else {}
    if not record or not set(names) <= set(place):
        return None
    part = _Part(**record["part"])
    at = [place[name] for name in names]
    divergence, exact, squares = ([each[i] for i in at] for each in part[:3])
    return part._replace(divergence=divergence, exact=exact, squares=squares)


def measure(
    pair: Pair,
    target: Target,
    documents: Sequence[Document],
    cells: Sequence[Cell],
    journal: KeyedJournal | None = None,
    experiment: str = "",
    batch_tokens: int | None = None,
) -> list[Measured]:
    """Every cell over all documents. The lower halves run once for a batch, and a batch that is done in all cells is
    written to the journal."""
    whole = list(batches(documents, pair.instruct.device, batch_tokens or batch_tokens_for(pair)))
    names = [cell_key(experiment, "teacher-forced", cell.label) for cell in cells]
    keys = [cell_key(experiment, "batch", {"documents": chosen.tolist()}) for chosen, _ in whole]
    found = {key: part for key in keys if journal and (part := _kept_part(journal.found.get(key), names))}
    work = sum(batch.ids.numel() for key, (_, batch) in zip(keys, whole, strict=True) if key not in found)
    progress = Progress(f"{len(cells)} cells on {len(documents)} documents, tokens", work * len(cells))
    for key, (_, batch) in zip(keys, whole, strict=True):
        if key not in found:
            found[key] = _measure_batch(pair, target, batch, cells, progress)
            if journal:
                journal.add(key, {"what": "batch", "cells": names, "part": found[key]._asdict()})
    progress.close()
    place = torch.cat([chosen for chosen, _ in whole]).argsort()
    parts = [found[key] for key in keys]
    positions = max(1, sum(part.positions for part in parts))
    divergence, exact = (
        torch.cat([torch.tensor(getattr(part, name), dtype=kind) for part in parts], dim=1)[:, place].tolist()
        for name, kind in (("divergence", torch.float64), ("exact", torch.bool))
    )
    injected = [(sum(squares) / positions) ** 0.5 for squares in zip(*(part.squares for part in parts), strict=True)]
    return [Measured(*each) for each in zip(divergence, exact, injected, strict=True)]


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
) -> list[Measured]:
    """Every cell, from the journal where it is there."""
    keys = [cell_key(experiment, "teacher-forced", cell.label) for cell in cells]
    if len(set(keys)) < len(keys):
        raise UserError("two cells of a causal report are the same; name each set once")
    missing = [i for i, key in enumerate(keys) if key not in journal.found]
    if 0 < len(missing) < len(cells):
        say(f"going on: {len(cells) - len(missing)} of {len(cells)} cells are there")
    new = [cells[i] for i in missing]
    measured = measure(pair, target, documents, new, journal, experiment) if new else []
    for i, found in zip(missing, measured, strict=True):
        record = {**cells[i].label, **asdict(found), "exact": [int(e) for e in found.exact]}
        journal.add(keys[i], {"what": "teacher-forced", **record})
    records = [journal.found[key] for key in keys]
    return [Measured(r["divergence"], [bool(e) for e in r["exact"]], r["injected"]) for r in records]
