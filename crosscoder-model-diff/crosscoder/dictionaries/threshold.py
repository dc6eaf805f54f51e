"""The score above which a latent is active at inference: followed while training, set exactly at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.scaling import sample_of
from finqa.runtime.errors import UserError


class RunningThreshold:
    """Average of the smallest positive score that batch top-k kept; the first value is taken as it is."""

    def __init__(self, from_step: int, decay: float):
        self.from_step = from_step
        self.decay = decay
        self._average = torch.tensor(torch.inf)

    def update(self, step: int, smallest_score: Tensor) -> None:
        """Follow a training step, counted from 1; steps before `from_step`, and batches without a positive score,
        leave the average alone."""
        if step >= self.from_step:
            before = self._average.to(smallest_score.device)
            score = torch.where(smallest_score.isfinite(), smallest_score, before)
            self._average = torch.where(before.isfinite(), self.decay * before + (1 - self.decay) * score, score)

    @property
    def value(self) -> float | None:
        return float(self._average) if self._average.isfinite() else None

    @value.setter
    def value(self, value: float | None) -> None:
        self._average = torch.tensor(torch.inf if value is None else value)


def calibrate(model: BatchTopKCrosscoder, store: ActivationStore, indices: Tensor, max_tokens: int, seed: int) -> None:
    """Set the model's thresholds, one for each group of latents in each of its stages, on at most `max_tokens` tokens
    of `indices`."""
    sample = sample_of(indices, max_tokens, seed)
    for stage in model.stages:
        model.stage = stage
        model.set_thresholds([calibrated_threshold(model, store, sample, latents, k) for latents, k in model.groups()])
    model.stage = None


@torch.no_grad()
def calibrated_threshold(
    model: BatchTopKCrosscoder, store: ActivationStore, sample: Tensor, latents: slice, k: float
) -> float:
    """The threshold at which the mean number of active ones among `latents`, over the tokens at `sample`, is k.

    Exact on these tokens: of their round(k * tokens) + 1 largest scores it is the smallest, and active means strictly
    above. Scores are taken in fp32, as at inference.
    """
    wanted = round(k * len(sample)) + 1
    norms = model.selection_norms()
    largest = torch.empty(0, device=norms.device)
    for _, raw in store.batches(sample):
        scores = (model.activations(model.scale(raw.to(norms.device))) * norms)[:, latents].flatten()
        largest = torch.cat([largest, scores[scores > 0]])
        if len(largest) > wanted:
            largest = torch.topk(largest, wanted, sorted=False).values
    if not len(largest):
        raise UserError("no latent of the crosscoder is active for any token; train it at a lower learning rate")
    # With fewer positive scores than wanted, all of them are active: any threshold below the smallest does.
    return float(largest.min()) if len(largest) == wanted else 0.0
