"""The latents of two dictionaries of the same activations, of two seeds or two methods, matched one to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from crosscoder.analysis import tables
from crosscoder.analysis.stability import best_cosines, match, turned
from crosscoder.analysis.statistics import latent_statistics

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.analysis.findings import Findings
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

ALIKE = 0.7
"""Cosine from which two latents are counted as the same."""


def matched(found: Findings, name: str, second: BatchTopKCrosscoder) -> tuple[dict[str, list[Any]], str]:
    """Columns about each latent's partner in a second dictionary, called `name`, and a sentence for the summary.

    Latents are matched by the cosine of their decoder vectors, those of both models joined (stability.match); where one
    of the dictionaries is a difference SAE, by what a latent adds to the difference. Dead latents have no partner.
    """
    opened = found.opened
    statistics = latent_statistics(second, opened.store, torch.arange(len(opened.store)))
    rows = tables.latent_table(second, statistics, opened.store, opened.tokenizer, opened.unembedding)
    both = opened.model.config.n_inputs == second.config.n_inputs
    alive, others = found.alive.nonzero().squeeze(-1), (~statistics.dead).nonzero().squeeze(-1)
    own, other = vectors(opened.model, both)[alive], vectors(second, both)[others]
    pairs = match(own.flatten(1), other.flatten(1))
    names = ("match", "match_cosine", "match_kind", "match_frequency", "match_tokens")
    columns: dict[str, list[Any]] = {key: [None] * len(found.rows) for key in names}
    for i, j, cosine in zip(alive[pairs.first].tolist(), others[pairs.second].tolist(), pairs.cosines, strict=True):
        row = rows[j]
        kind = row.kind if row.relative_decoder_norm is not None else None
        values = (row.latent, float(cosine), kind, row.frequency, row.top_tokens)
        for key, value in zip(names, values, strict=True):
            columns[key][i] = value
    chance = best_cosines(own.flatten(1), turned(other, torch.Generator().manual_seed(0)).flatten(1))
    sentence = (
        f"Of the {len(alive):,} active latents {int((pairs.cosines >= ALIKE).sum()):,} have a partner of their own in "
        f"{name} ({len(others):,} active latents), with a cosine of their decoder vectors of at least {ALIKE}; the "
        f"median of all partners is {float(pairs.cosines.median()):.2f}. With its directions turned at random "
        f"{int((chance >= ALIKE).sum()):,} would."
    )
    return columns, sentence


def vectors(model: BatchTopKCrosscoder, both: bool) -> Tensor:
    """[latent, 1 or 2, d_model] fp32, on the CPU: the decoder vectors of `both` models, or what each latent adds to the
    difference."""
    found = model.W_dec.detach() if both else model.difference_decoder()[:, None]
    return found.float().cpu()
