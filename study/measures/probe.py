"""The ceiling: how well a linear probe tells families apart at a site, from what tells the models apart there.

No set of latents that are read off x[1] - x[0] linearly says more of a family than the difference itself. Beside it
the same probe on either model's activation: a family that the instruct model shows as well is no finding of a diff.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from study.measures.auroc import auroc
from study.measures.scores import read_means
from study.measures.strata import STRATA, Questions, Stratum

RIDGE = 1.0
"""Weight of |w|^2 / 2 beside the summed log loss, for inputs of unit variance; fixed, so that nothing is tuned."""
INPUTS = ("instruct", "fine-tuned", "difference")
"""In the order of scores.read_means."""
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class ProbeCeiling:
    """The probe's figures for one stratum and one of INPUTS, whose mean over the stratum's tokens the probe reads."""

    stratum: Stratum
    input: str
    auroc: Tensor
    """[families] fp64: of a family against the rest, on pages that its probe was not fitted on; the mean over both
    halves in that part. Not a number for a family that a half lacks."""
    n_questions: int


def probe_ceilings(
    store: ActivationStore,
    questions: Questions,
    choosing: Tensor,
    strata: Sequence[Stratum] = STRATA,
    device: torch.device | str = "cpu",
) -> list[ProbeCeiling]:
    """One for each stratum and input, cross-fitted on the halves of `choosing` [questions] bool; one pass over the set.

    They say nothing of a dictionary: one call serves all that are trained on the set.
    """
    means = read_means(store, questions, device)
    return [
        probe_ceiling(means[STRATA.index(stratum), :, number], questions, stratum, name, choosing)
        for stratum in strata
        for number, name in enumerate(INPUTS)
    ]


def probe_ceiling(vectors: Tensor, questions: Questions, stratum: Stratum, name: str, choosing: Tensor) -> ProbeCeiling:
    """The probe's figures on [questions, d_model] vectors; a question without a vector has NaN."""
    there = ~vectors[:, 0].isnan()
    x, is_family, first = vectors[there].double(), questions.is_family()[there], choosing[there]
    areas = []
    for fitted in (first, ~first):
        weights, bias = logistic(x[fitted], is_family[fitted])
        areas.append(auroc(x[~fitted] @ weights + bias, is_family[~fitted]).diagonal())
    return ProbeCeiling(stratum, name, torch.stack(areas).mean(dim=0), int(there.sum()))


def logistic(x: Tensor, positive: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """[n, d] fp64 and [n, classes] bool -> weights [d, classes] and biases [classes] of a logistic regression for each
    class, on inputs of mean 0 and variance 1, given back for `x` as it is. The sums are convex and fitted together."""
    mean = x.mean(dim=0)
    spread = x.std(dim=0, unbiased=False)
    spread = torch.where(spread > 0, spread, 1)
    inputs, target = (x - mean) / spread, positive.to(x)
    weights = torch.zeros(x.shape[1], positive.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(positive.shape[1], dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = inputs @ weights + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        value = value + ridge / 2 * weights.pow(2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    own = weights.detach() / spread[:, None]
    return own, bias.detach() - mean @ own
