"""What the best of many items would score if families said nothing: labels permuted within templates.

Questions of one template name the same things (two years, a row, ...), so their families can change places without
touching what a look-up gives away; an item that only knows the template has no advantage here. For each permutation and
family the largest AUROC over all items is kept: what an item must beat accounts for how many were tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from study.measures.auroc import ranks
from study.measures.scores import StratumScores
from study.measures.strata import Questions

N_PERMUTATIONS = 1000
ALPHA = 0.05
PERMUTATIONS_AT_ONCE = 250
EXACT_IN_FP32 = 2**24
"""Whole numbers up to here have a float32 of their own."""


@dataclass(frozen=True)
class PermutationNull:
    """The null for families that share their template with another; the labels of others cannot be permuted."""

    families: Tensor
    """[tested] int64: which families."""
    p: Tensor
    """[items, tested] fp64: share of permutations whose best item is at least as good as this one, itself counted."""
    n_permutations: int

    @property
    def family_p(self) -> Tensor:
        """[tested]: p of each family's best item."""
        return self.p.min(dim=0).values

    @property
    def family_q(self) -> Tensor:
        """[tested]: the same after Benjamini and Hochberg, over the families."""
        from scipy.stats import false_discovery_control

        if not len(self.families):
            return self.family_p
        return torch.from_numpy(false_discovery_control(self.family_p.numpy(), method="bh"))

    def significant(self, alpha: float = ALPHA) -> Tensor:
        """[items, tested] bool: items that beat the null, at a false discovery rate of `alpha` over the families.

        Families are selected by Benjamini and Hochberg on the p of their best items; within a selected family an item's
        p, which is corrected for all items, is held against alpha times the share of families selected (Benjamini and
        Bogomolov, JRSS B 76 (2014) 297-318).
        """
        selected = self.family_q <= alpha
        if not selected.any():
            return torch.zeros_like(self.p, dtype=torch.bool)
        return selected & (self.p <= alpha * float(selected.double().mean()))


def permutation_null(
    scores: StratumScores,
    questions: Questions,
    items: Tensor | None = None,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PermutationNull:
    """The permutation null of a stratum's scores over all pages. With `items` [items] bool, of those; others have p 1.

    Ranks are taken once; a permutation's rank sums, which order items as their AUROCs do, are a row of one product of
    matrices. They are doubled to be whole numbers, and so compared exactly.
    """
    family, template = questions.family[scores.question], questions.template[scores.question]
    tested = torch.tensor([f for f in family.unique().tolist() if _shares_a_template(f, family, template)]).long()
    p = torch.ones(scores.values.shape[1], len(tested), dtype=torch.float64)
    chosen = torch.arange(scores.values.shape[1]) if items is None else items.nonzero().squeeze(-1)
    if not len(tested) or not len(chosen):
        return PermutationNull(tested, p, n_permutations)
    n = len(family)
    # On a GPU fp32 may be rounded to less in a product.
    exact = n * (n + 1) < EXACT_IN_FP32 and torch.device(device).type == "cpu"
    dtype = torch.float32 if exact else torch.float64
    doubled = (2 * ranks(scores.values[:, chosen])).to(dtype).to(device)
    observed = doubled.T @ (family[:, None] == tested).to(doubled)
    at_least = torch.zeros_like(observed, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n_permutations, PERMUTATIONS_AT_ONCE):
        labels = permuted(family, template, min(PERMUTATIONS_AT_ONCE, n_permutations - start), generator).to(device)
        for column, number in enumerate(tested.tolist()):
            best = ((labels == number).to(dtype) @ doubled).max(dim=1).values
            # How many of the maxima are at least the observed sum: those at or after its place among them.
            below = torch.searchsorted(best.sort().values, observed[:, column].contiguous())
            at_least[:, column] += len(best) - below
    p[chosen] = ((1 + at_least) / (1 + n_permutations)).double().cpu()
    return PermutationNull(tested, p, n_permutations)


def permuted(labels: Tensor, groups: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[rows] labels -> [n, rows]: n random permutations of them within each group."""
    result = labels.repeat(n, 1)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().squeeze(-1)
        order = torch.rand(n, len(rows), generator=generator).argsort(dim=1)
        result[:, rows] = labels[rows][order]
    return result


def _shares_a_template(family: int, families: Tensor, templates: Tensor) -> bool:
    its = templates[families == family].unique()
    return bool(((families != family) & torch.isin(templates, its)).any())
