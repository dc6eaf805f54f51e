"""Whole-site patches: how much of what fine-tuning added does one site of one layer carry?

The activation of a site in one model is put in place of the other model's, for every position but BOS (or whatever
a document has untouched), and what that recovers is measured on gold programs, teacher-forced. It is the ceiling of
what any set of latents read at that site can do, so it is measured first.

Direction: `sufficiency` puts the fine-tuned activation into the instruct model; `necessity` puts the instruct
activation into the fine-tuned model. Carrier: whose layers run above the patch, the receiving model's own (`own`), or
the other model's (`other`): the fine-tuned upper half above a patched instruct lower half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from crosscoder.activations.collection import Document, batches_by_length
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import Frame, LayerRecord, Pair, Side, after_patch, pair_of, record_layers

Direction = Literal["sufficiency", "necessity"]
Carrier = Literal["own", "other"]
Key = tuple[Target, Direction, Carrier]
BATCH_TOKENS = 2_048
"""Padded; small batches stay in a processor's cache."""


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


@dataclass(frozen=True)
class Agreement:
    """How near a model is to the fine-tuned one on programs, a number for each document; on the CPU."""

    divergence: Tensor
    """[documents] fp64: mean over the program's tokens of KL(fine-tuned || model), nats."""
    exact: Tensor
    """[documents] bool: the model's best next token is the true one throughout the program."""


@dataclass(frozen=True)
class Ceiling:
    """What a patch of one site recovers."""

    target: Target
    direction: Direction
    carrier: Carrier
    divergence_closed: float
    """Sufficiency: 1 - KL(patched) / KL(instruct); necessity: KL(patched) / KL(instruct), the share of the gap that
    taking the site away opens. Sums over documents; not a number where the models agree."""
    exact: float
    """Share of programs that are exact with the patch."""
    exact_recovered: float
    """Sufficiency: (exact - instruct) / (fine-tuned - instruct); necessity: (fine-tuned - exact) over the same."""
    unpatched_closed: float
    """`divergence_closed` with nothing patched: what the carrier's layers alone do. 0 for `own`."""
    unpatched_exact: float
    """`exact` with nothing patched."""
    n: int
    """Documents."""


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
    records: tuple[dict[int, LayerRecord], dict[int, LayerRecord]]
    """Of the instruct and the fine-tuned model, by layer (from 1)."""
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
    last = max(layers)
    hidden = pair.fine_tuned.through(records[1][last].residual, range(last, pair.depth), frame)
    reference = pair.fine_tuned.logits(hidden[batch.predicting])
    return Halves(batch, frame, (records[0], records[1]), reference)


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
    if value is None:
        hidden = above.through(record.residual, range(target.layer, pair.depth), halves.frame)
    else:
        hidden = after_patch(receiver, above, record, target, value, halves.frame)
    return above.logits(hidden[halves.batch.predicting])


@torch.no_grad()
def agreement(logits: Tensor, fine_tuned: Tensor, batch: Batch) -> Agreement:
    """Of a model's logits at the predicting positions with the fine-tuned model's."""
    ours, theirs = logits.log_softmax(-1), fine_tuned.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).double()
    true = torch.roll(batch.ids, -1, dims=1)[batch.predicting]
    wrong = logits.argmax(-1) != true
    document = batch.predicting.nonzero()[:, 0]
    counts = batch.predicting.sum(1)
    sums = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, document, divergence)
    mistakes = torch.zeros_like(counts).index_add_(0, document, wrong.long())
    return Agreement((sums / counts).cpu(), (mistakes == 0).cpu())


def ceilings(
    instruct: Any,
    fine_tuned: Any,
    documents: Sequence[Document],
    targets: Sequence[Target],
    batch_tokens: int = BATCH_TOKENS,
) -> list[Ceiling]:
    """Every target, direction and carrier over all documents, both models in eval mode.

    `fine_tuned` None: `instruct` is a PeftModel, whose adapter is switched off and on.
    """
    pair = pair_of(instruct, fine_tuned)
    keys: list[Key] = [(t, d, c) for t in targets for d in get_args(Direction) for c in get_args(Carrier)]
    base, full = _blank(len(documents)), _blank(len(documents))
    patched = {key: _blank(len(documents)) for key in keys}
    # By layer alone: with nothing patched a site is as good as another.
    unpatched: dict[Key, Agreement] = {_any_site(key): _blank(len(documents)) for key in keys}
    for chosen, batch in batches(documents, pair.instruct.device, batch_tokens):
        halves = run_halves(pair, batch, [target.layer for target in targets])
        first: Key = (targets[0], "sufficiency", "own")
        _put(base, chosen, agreement(patched_logits(pair, halves, *first, None), halves.reference, batch))
        _put(full, chosen, agreement(halves.reference, halves.reference, batch))
        for key, found in unpatched.items():
            _put(found, chosen, agreement(patched_logits(pair, halves, *key, None), halves.reference, batch))
        for target, direction, carrier in keys:
            number = sides(pair, direction, carrier)[0]
            own, given = (halves.records[m][target.layer].site(target) for m in (number, 1 - number))
            value = torch.where(batch.patched[..., None], given, own)
            logits = patched_logits(pair, halves, target, direction, carrier, value)
            _put(patched[target, direction, carrier], chosen, agreement(logits, halves.reference, batch))
    return [_ceiling(key, patched[key], unpatched[_any_site(key)], base, full) for key in keys]


def _ceiling(key: Key, patched: Agreement, unpatched: Agreement, base: Agreement, full: Agreement) -> Ceiling:
    target, direction, carrier = key
    gap = float(base.divergence.sum())

    def closed(found: Agreement) -> float:
        remaining = float(found.divergence.sum()) / gap if gap > 0 else float("nan")
        return 1 - remaining if direction == "sufficiency" else remaining

    low, high, exact, without = (float(a.exact.double().mean()) for a in (base, full, patched, unpatched))
    distance = exact - low if direction == "sufficiency" else high - exact
    return Ceiling(
        target=target,
        direction=direction,
        carrier=carrier,
        divergence_closed=closed(patched),
        exact=exact,
        exact_recovered=distance / (high - low) if high != low else float("nan"),
        unpatched_closed=closed(unpatched),
        unpatched_exact=without,
        n=len(patched.exact),
    )


def _any_site(key: Key) -> Key:
    return Target(key[0].layer, "residual"), key[1], key[2]


def _blank(n: int) -> Agreement:
    return Agreement(torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool))


def _put(whole: Agreement, chosen: Tensor, part: Agreement) -> None:
    whole.divergence[chosen], whole.exact[chosen] = part.divergence, part.exact
