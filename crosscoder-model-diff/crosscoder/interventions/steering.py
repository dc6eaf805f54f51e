"""Steering: latents turned up or taken out of a model while it generates.

    pair = pair_of(base, fine_tuned)
    means = active_means(dictionary, (raw for _, raw in store.batches(indices)), [81])
    with steered(pair, Target(17, "mlp"), dictionary, means, "base", {81: 2.0}, half="fine-tuned") as model:
        model.generate(**inputs)

Turning up adds the same vector at every token, so one model runs, as fast as without. Taking out needs the latent's
value at every token, which both models give: the other one runs as far as the site.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from crosscoder.dictionaries.config import N_MODELS
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.causal import Cell
from crosscoder.interventions.halves import Pair
from crosscoder.interventions.patched_generation import patched
from crosscoder.interventions.sets import Addition, Reading, Scaled, digest
from finqa.evaluation.engines.serving import MODELS, Model
from finqa.runtime.errors import UserError


@contextlib.contextmanager
def steered(
    pair: Pair,
    target: Target,
    dictionary: BatchTopKCrosscoder,
    means: Tensor,
    model: Model,
    steer: Mapping[int, float] | None = None,
    ablate: Collection[int] = (),
    half: Model | None = None,
) -> Iterator[Any]:
    """One model of a pair with latents turned up or taken out while the block is open: call it, or its `generate`.

    What its site gives, x [batch, time, d_model], becomes at every token but BOS and padding

        x + sum over `steer` of factor_j mean_j d_j - sum over `ablate` of f_j d_j

    So factor 0 changes nothing, an ablated latent's value is 0, and the value of one that is both is factor_j mean_j.

    Args:
        pair: halves.pair_of any two models of one shape, or one with an adapter.
        target: The site that the dictionary reads.
        dictionary: On the models' device. d_j is latent j's decoder vector in the models' own units; f_j is its value
            on what both models read so far, which takes both models (`ablate` alone does).
        means: [2, latent], `active_means`: mean_j is the latent's mean value where it is active.
        model: Which of the two is steered.
        steer: Factor of each latent; any finite number.
        half: Whose decoder vectors (and of a stagewise SAE, values) these are; None is the steered model's own.

    As with `patched`, any sampling will do, but no beams. Raises UserError where `check_steering` does.
    """
    check_steering(dictionary, means, steer or {}, ablate, half)
    number = MODELS.index(model)
    addition: Addition = Steered(dictionary, means, MODELS.index(half or model), steer or {}, ablate)
    # Necessity takes away from the fine-tuned model what it is given.
    cell = Cell(Scaled(addition, -1.0), "necessity", "own") if number else Cell(addition, "sufficiency", "own")
    with patched(pair, target, cell) as patched_model:
        yield patched_model


def check_steering(
    dictionary: BatchTopKCrosscoder,
    means: Tensor,
    steer: Mapping[int, float],
    ablate: Collection[int],
    half: Model | None = None,
) -> None:
    """UserError for a latent that is not there or that was never active, a factor that is no number, and a `half` in
    which a latent writes nothing. `means` [2, latent]."""
    for latent in (*steer, *ablate):
        if not 0 <= latent < dictionary.config.n_latents:
            last = dictionary.config.n_latents - 1
            raise UserError(f"there is no latent {latent}; give one of this dictionary's, 0 to {last}")
        if half and not half_vectors(dictionary, MODELS.index(half), [latent]).any():
            other = next(each for each in MODELS if each != half)
            raise UserError(
                f"latent {latent} of this dictionary ({dictionary.config.method}) has no vector for the {half} model; "
                f"take that of the {other} one (--from {other})"
            )
    for latent, factor in steer.items():
        if not math.isfinite(factor):
            raise UserError(f"latent {latent}: the factor {factor} is no finite number; give one such as 2 or -0.5")
        if means[MODELS.index(half) if half else slice(None), latent].isnan().all():
            raise UserError(
                f"latent {latent} is dead: it is active on no token of the activations, so it has no mean to scale by; "
                "choose one whose frequency in latents.csv is above 0"
            )


class Steered:
    """An addition: what `steered` adds to x, with the vectors of one half (0 base, 1 fine-tuned)."""

    def __init__(
        self,
        dictionary: BatchTopKCrosscoder,
        means: Tensor,
        half: int,
        steer: Mapping[int, float],
        ablate: Collection[int],
    ):
        self.half, self.reads = half, bool(ablate)
        turned, ablated = sorted(steer), sorted(set(ablate))
        vectors = half_vectors(dictionary, half, turned)
        amounts = torch.tensor([steer[latent] for latent in turned]) * means[half, turned].nan_to_num().float()
        self.constant = amounts.to(vectors) @ vectors
        self.dictionary = dictionary.only(ablated)
        self.vectors = half_vectors(dictionary, half, ablated)
        self.label = {"kind": "steered", "n": len({*steer, *ablate}), "digest": digest(self.constant, self.vectors)}

    def __call__(self, reading: Reading) -> Tensor:
        constant = self.constant.expand(len(reading.pairs), -1)
        if not self.reads:
            return constant
        return constant - half_values(reading.parts(self.dictionary), self.half) @ self.vectors


def half_vectors(dictionary: BatchTopKCrosscoder, half: int, latents: Sequence[int]) -> Tensor:
    """[latents, d_model] fp32, in the models' own units: what one unit of each latent adds to one model.

    Of a difference SAE, which says what the fine-tuned model has beside the base, nothing to the base.
    """
    vectors = dictionary.only(latents).raw_decoder().float()
    if dictionary.config.n_inputs == N_MODELS:
        return vectors[:, half]
    return vectors[:, 0] if half else torch.zeros_like(vectors[:, 0])


def half_values(parts: Tensor, half: int) -> Tensor:
    """[tokens, part, latent] -> [tokens, latent] fp32: a stagewise SAE has a value for either model, that of the
    fine-tuned one first; other methods have one for both."""
    return parts[:, 0 if half else -1].float()


@torch.no_grad()
def active_means(dictionary: BatchTopKCrosscoder, raw: Iterable[Tensor], latents: Sequence[int]) -> Tensor:
    """[2, latent] fp64, on the CPU: mean value of `latents` where they are active, for base and fine-tuned half.

    Not a number where one never is, and for all others. `raw` gives activations [n, 2, d_model], unscaled."""
    chosen = sorted(set(latents))
    only = dictionary.only(chosen)
    sums, counts = (torch.zeros(N_MODELS, len(chosen), dtype=torch.float64) for _ in range(2))
    for rows in raw:
        parts = Reading(rows.to(only.b_dec.device)).parts(only)
        for half in range(N_MODELS):
            values = half_values(parts, half)
            sums[half] += values.sum(dim=0, dtype=torch.float64).cpu()
            counts[half] += (values > 0).sum(dim=0).cpu()
    means = torch.full((N_MODELS, dictionary.config.n_latents), torch.nan, dtype=torch.float64)
    means[:, chosen] = sums / counts
    return means
