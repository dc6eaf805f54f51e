"""Patches at one site of one layer: batches of documents, both models as far as the patch, and what follows it.

A patch puts something else in place of a site's activation in one model, for every position but BOS (or whatever a
document has untouched); what that recovers is measured on gold programs, teacher-forced.

Direction: `sufficiency` changes the instruct model, `necessity` the fine-tuned one. Carrier: whose layers run above the
patch, the receiving model's own (`own`), or the other model's (`other`): the fine-tuned upper half above a patched
instruct lower half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder.activations.collection import Document, batches_by_length
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import Ends, Frame, LayerRecord, Pair, Side, after_patch, ends_of, record_layers

Direction = Literal["sufficiency", "necessity"]
Carrier = Literal["own", "other"]
BATCH_TOKENS = 2_048
"""Padded; small batches stay in a processor's cache."""
GPU_NUMBERS = 1 << 25
"""Numbers that a batch's activations hold on a GPU: 8,192 tokens at a width of 4,096. Below that a layer is done before
the next one has been launched."""


def batch_tokens_for(pair: Pair) -> int:
    """Tokens of a batch, padded, where nothing is kept for a backward pass."""
    width = pair.instruct.model.config.hidden_size
    return BATCH_TOKENS if pair.instruct.device.type == "cpu" else max(BATCH_TOKENS, GPU_NUMBERS // width)


@dataclass(frozen=True)
class Batch:
    """Documents side by side, padded on the right."""

    ids: Tensor
    """[documents, time] int64."""
    predicting: Tensor
    """[documents, time] bool: positions whose next token is of the program or its end."""
    patched: Tensor
    """[documents, time] bool: positions that a patch may change; neither padding nor untouched."""
    length: Tensor
    """[documents] int64: ids, padding left out."""

    @cached_property
    def patched_at(self) -> Tensor:
        """[positions] int64: `patched` as places in the flattened ids. Choosing by a mask would make a GPU wait for
        every patch."""
        return self.patched.flatten().nonzero().squeeze(-1)

    @cached_property
    def predicted(self) -> tuple[Tensor, Tensor]:
        """[predicting positions] int64 each: the document, and the token that follows."""
        return self.predicting.nonzero()[:, 0], torch.roll(self.ids, -1, dims=1)[self.predicting]


@dataclass(frozen=True)
class Agreement:
    """How near a model is to the fine-tuned one on programs, a number for each document; on the models' device."""

    divergence: Tensor
    """[documents] fp64: mean over the program's tokens of KL(fine-tuned || model), nats."""
    exact: Tensor
    """[documents] bool: the model's best next token is the true one throughout the program."""


def batch_of(documents: Sequence[Document], device: Any = "cpu") -> Batch:
    longest = max(len(document.ids) for document in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    patched = torch.zeros_like(predicting)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length] = torch.tensor(document.ids)
        predicting[row, document.n_prompt - 1 : length - 1] = True
        patched[row, :length] = True
        patched[row, list(document.untouched)] = False
    lengths = torch.tensor([len(document.ids) for document in documents])
    return Batch(*(tensor.to(device) for tensor in (ids, predicting, patched, lengths)))


def batches(
    documents: Sequence[Document], device: Any = "cpu", batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Tensor, Batch]]:
    """Batches of like length, each with the indices of its documents."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    for run in batches_by_length([len(documents[i].ids) for i in order], batch_tokens):
        chosen = [order[place] for place in run]
        yield torch.tensor(chosen), batch_of([documents[i] for i in chosen], device=device)


@dataclass(frozen=True)
class Halves:
    """Both models on one batch, as far as the layers that are patched."""

    batch: Batch
    frame: Frame
    ends: Ends
    records: tuple[dict[int, LayerRecord], dict[int, LayerRecord]]
    """What the patched layers of the instruct and of the fine-tuned model gave, by layer (from 1)."""
    reference: Tensor
    """[predicting positions, vocabulary] fp32: the fine-tuned model's logits, document after document."""


@torch.no_grad()
def run_halves(pair: Pair, batch: Batch, layers: Sequence[int]) -> Halves:
    """Run the instruct model up to the last of `layers`, the fine-tuned one to its end."""
    records = []
    for side in pair:
        hidden = side.embedded(batch.ids)
        frame = side.frame(hidden)
        records.append(record_layers(side, hidden, frame, layers))
    last, ends = max(layers), ends_of(frame, batch.predicting)
    hidden = pair.fine_tuned.to_the_end(records[1][last].residual, last, frame, ends)
    return Halves(batch, frame, ends, (records[0], records[1]), pair.fine_tuned.logits(hidden))


def sides(pair: Pair, direction: Direction, carrier: Carrier) -> tuple[int, Side, Side]:
    """Index of the receiving model, that model, and whose layers run above the patch."""
    receiver = 0 if direction == "sufficiency" else 1
    above = receiver if carrier == "own" else 1 - receiver
    return receiver, pair[receiver], pair[above]


@torch.no_grad()
def patched_logits(
    pair: Pair, halves: Halves, target: Target, direction: Direction, carrier: Carrier, value: Tensor | None
) -> Tensor:
    """[predicting positions, vocabulary] fp32 where the site gives `value` [documents, time, d_model]; None: its own.

    `value` holds for every position: the receiver's own activation where nothing is patched.
    """
    number, receiver, above = sides(pair, direction, carrier)
    record = halves.records[number][target.layer]
    return above.logits(after_patch(receiver, above, record, target, value, halves.frame, halves.ends))


@torch.no_grad()
def agreement(logits: Tensor, fine_tuned: Tensor, batch: Batch) -> Agreement:
    """How near a model's logits at the predicting positions are to the fine-tuned model's."""
    ours, theirs = logits.log_softmax(-1), fine_tuned.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).double()
    document, true = batch.predicted
    wrong = logits.argmax(-1) != true
    counts = batch.predicting.sum(1)
    sums = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, document, divergence)
    mistakes = torch.zeros_like(counts).index_add_(0, document, wrong.long())
    return Agreement(sums / counts, mistakes == 0)
