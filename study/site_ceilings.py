"""Whole-site patches: how much of what fine-tuning added does one site of one layer carry?

The activation of a site in one model is put in place of the other model's (crosscoder.interventions.patching), and what
that recovers is the ceiling of what any set of latents read at that site can do, so it is measured first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import pair_of
from crosscoder.interventions.patching import (
    BATCH_TOKENS,
    Agreement,
    Carrier,
    Direction,
    agreement,
    batches,
    patched_logits,
    run_halves,
    sides,
)

Key = tuple[Target, Direction, Carrier]


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
    whole.divergence[chosen], whole.exact[chosen] = part.divergence.cpu(), part.exact.cpu()
