"""Patches as one would first write them: for every document and patch whole models with hooks, logits at every token.

The reference that crosscoder.interventions.causal is held to, in its speed and in its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.readers import SITES, Target, edited, site_module
from crosscoder.interventions.causal import Cell, measure
from crosscoder.interventions.sets import Reading, Whole


@torch.no_grad()
def plain_patch(pair: Any, target: Any, document: Any, cell: Any) -> tuple[float, bool, Tensor]:
    """Mean KL(fine-tuned || patched) over the completion in nats, whether the patched model's best tokens are the
    completion, and what was added [patched positions, d_model]."""
    ids = torch.tensor([document.ids], device=pair.instruct.device)
    sites: list[Tensor] = []
    outputs = [_run(side, ids, [(site_module(side.layers, target), sites.append)]) for side in pair]
    receiver = 0 if cell.direction == "sufficiency" else 1
    own, other = sites[receiver][0], sites[1 - receiver][0]
    patched = [place for place in range(len(document.ids)) if place not in document.untouched]
    added = cell.addition(Reading(torch.stack([sites[0][0], sites[1][0]], dim=1)[patched]))
    value = own.clone()
    sign = 1 if receiver == 0 else -1
    whole = isinstance(cell.addition, Whole)
    value[patched] = other[patched] if whole else (own[patched].float() + sign * added).to(own.dtype)

    side, block, states = pair[receiver], target.layer - 1, []
    put = site_module(side.layers, target), lambda _: value[None]
    logits = _run(side, ids, [put, (side.layers[block], states.append)])
    if cell.carrier == "other":
        above = pair[1 - receiver]
        logits = _run(above, ids, [(above.layers[block], lambda _: states[0])])
    predicting = slice(document.n_prompt - 1, len(document.ids) - 1)
    ours, theirs = (each[predicting].float().log_softmax(-1) for each in (logits, outputs[1]))
    true = ids[0, document.n_prompt :]
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).double().mean()
    return float(divergence), bool((ours.argmax(-1) == true).all()), added


def _run(side: Any, ids: Tensor, hooks: Sequence[tuple[Any, Any]]) -> Tensor:
    """[time, vocabulary] logits; a hook gives what takes the module's output's place, or None."""
    with side.active(), ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(edited(module, lambda own, hook=hook: own if (new := hook(own)) is None else new))
        return side.model(input_ids=ids, use_cache=False).logits[0]


def plain_patches(pair: Any, target: Any, documents: Sequence[Any], cells: Sequence[Any]) -> list[list[float]]:
    """[cell][document]: the divergences."""
    return [[plain_patch(pair, target, document, cell)[0] for document in documents] for cell in cells]


def nats_from_whole_models(pair: Any, target: Any, documents: Sequence[Any], cells: Sequence[Any]) -> dict[str, float]:
    """How far the divergences of `measure` are from these, and the mean of these."""
    measured = [found.divergence for found in measure(pair, target, documents, cells)]
    ours, theirs = (
        torch.tensor(each, dtype=torch.float64) for each in (measured, plain_patches(pair, target, documents, cells))
    )
    return {"largest_difference": float((ours - theirs).abs().max()), "mean_divergence": float(theirs.mean())}


def plain_ceilings(pair: Any, documents: Sequence[Any], layers: Sequence[int]) -> int:
    """Every site of these layers, both ways, with the carrier's own layers; returns how many patches that were."""
    cells = [Cell(Whole(), "sufficiency", "own"), Cell(Whole(), "necessity", "own")]
    targets = [Target(layer, site) for layer in layers for site in SITES]
    for target in targets:
        plain_patches(pair, target, documents, cells)
    return len(documents) * len(targets) * len(cells)
