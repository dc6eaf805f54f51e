"""A number for each question, item and stratum: the mean of an item's values on the stratum's tokens.

The mean, since the largest of several values grows with their number, and the number of look-ups alone gives some
families away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from study.measures.readouts import BATCH_TOKENS, Subject, difference
from study.measures.strata import STRATA, Questions, Stratum


@dataclass(frozen=True)
class StratumScores:
    """Scores on one stratum, on the CPU."""

    values: Tensor
    """[n, items] fp32: mean over the stratum's tokens."""
    question: Tensor
    """[n]: which questions these are, those that have a token in the stratum."""


@dataclass(frozen=True)
class Scores:
    """Scores of one subject over all questions of a set, on the CPU."""

    means: Tensor
    """[strata, questions, items] fp32; not a number where a question has no token in a stratum."""
    n_firings: Tensor
    """[items] int64: tokens of the set on which an item is above 0, whatever the stratum."""

    @property
    def alive(self) -> Tensor:
        """[items] bool: above 0 on some token."""
        return self.n_firings > 0

    def of(self, stratum: Stratum) -> StratumScores:
        """The questions that have the stratum, and their scores there."""
        values = self.means[STRATA.index(stratum)]
        there = ~values[:, 0].isnan()
        return StratumScores(values[there], there.nonzero().squeeze(-1))


@torch.no_grad()
def read_scores(store: ActivationStore, questions: Questions, subject: Subject) -> Scores:
    """Every token of the set once, through the subject on its device."""
    group = questions.stratum * len(questions) + questions.document
    sums: Tensor | None = None
    n_firings: Tensor | None = None
    for chunk, raw in store.batches(torch.arange(len(store)), BATCH_TOKENS):
        values = subject.read(raw.to(subject.device)).float()
        if sums is None or n_firings is None:
            n_groups, n_items = len(STRATA) * len(questions), values.shape[1]
            sums = values.new_zeros(n_groups, n_items)
            n_firings = torch.zeros(n_items, dtype=torch.int64, device=values.device)
        sums.index_add_(0, group[chunk].to(values.device), values)
        n_firings += (values > 0).sum(dim=0)
    assert sums is not None and n_firings is not None
    means = sums.cpu() / torch.bincount(group, minlength=len(sums))[:, None]
    return Scores(means.view(len(STRATA), len(questions), -1), n_firings.cpu())


def read_means(store: ActivationStore, questions: Questions, device: torch.device | str = "cpu") -> Tensor:
    """[strata, questions, 3, d_model] fp32, on the CPU: mean over a stratum's tokens of x[0], x[1] and x[1] - x[0].

    Not a number where a question has no token in a stratum. What a linear probe reads.
    """
    group = questions.stratum * len(questions) + questions.document
    sums = torch.zeros(len(STRATA) * len(questions), 3, store.config.d_model, device=device)
    counts = torch.zeros(len(sums), device=device)
    for chunk, raw in store.batches(torch.arange(len(store)), BATCH_TOKENS):
        raw = raw.to(device)
        rows = group[chunk].to(device)
        sums.index_add_(0, rows, torch.cat([raw.float(), difference(raw)[:, None]], dim=1))
        counts.index_add_(0, rows, torch.ones(len(rows), device=device))
    return (sums / counts[:, None, None]).view(len(STRATA), len(questions), 3, -1).cpu()
