"""Which items tell a family from the rest: chosen on half of the pages, scored on the other half."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from study.measures.auroc import auroc
from study.measures.scores import StratumScores
from study.measures.strata import Questions

SELECTIVE_AT = 0.9
"""AUROC of a family against the rest from which an item counts as specific to it."""


@dataclass(frozen=True)
class Selectivity:
    """AUROCs of every item on one stratum: a family's questions against others of the same half, either all of them or
    those of the same page."""

    chosen: Tensor
    """[items, families] fp64: AUROC on the half of the pages where items are chosen; not a number for a family that
    has no question there."""
    scored: Tensor
    """AUROCs as in `chosen`, on the other half."""
    n_of_family: Tensor
    """[families] int64: questions of each on that other half; within pages, those with another one on their page."""
    n_others: Tensor
    """[families] int64: the questions that these are held against."""
    n_chosen: int
    """Questions of the first half."""
    n_scored: int

    @property
    def best(self) -> Tensor:
        """[items]: the family that the choosing half gives an item."""
        return self.chosen.nan_to_num(nan=-1.0).argmax(dim=1)

    @property
    def best_scored(self) -> Tensor:
        """[items] fp64: the other half's AUROC for that family; 0.5 on average for an item that says nothing."""
        return self.scored.gather(1, self.best[:, None])[:, 0]

    def specific(self, families: Tensor, at: float = SELECTIVE_AT) -> Tensor:
        """[items] bool: chosen for one of `families` [families] bool, and at least `at` on the other half."""
        return families[self.best] & (self.best_scored >= at)

    def best_of(self, items: Tensor) -> Tensor:
        """[families] fp64: AUROC, on the scoring half, of the item of a mask that the choosing half likes best for a
        family; not a number where there is no item or a half lacks the family. For several sets of items, such as
        those of two fine-tunes, these are the rows of the matrix of sets against families."""
        if not items.any():
            return torch.full((self.chosen.shape[1],), torch.nan, dtype=torch.float64)
        best = self.chosen[items].nan_to_num(nan=-1.0).argmax(dim=0)
        areas = self.scored[items].gather(0, best[None])[0]
        return torch.where(self.chosen[0].isnan(), torch.nan, areas)

    def found(self, items: Tensor, at: float = SELECTIVE_AT) -> Tensor:
        """[families] bool: `best_of` is at least `at`."""
        return self.best_of(items) >= at


def selectivity(
    scores: StratumScores, questions: Questions, choosing: Tensor, within_pages: bool = False
) -> Selectivity:
    """Selectivity of a stratum's scores; `choosing` [questions] bool is the half to choose on (`halves`).

    Within pages the negatives are the other families on the same page alone (minimal pairs: the same template, rows
    and years), so that nothing that a page or a template gives away counts; a page of one question has no say.
    """
    is_family = questions.is_family()[scores.question]
    page = questions.page[scores.question]
    first = choosing[scores.question]
    areas = []
    for half in (first, ~first):
        values, member = scores.values[half], is_family[half]
        areas.append(auroc_within(values, member, page[half]) if within_pages else auroc(values, member))
    member, its_page = is_family[~first], page[~first]
    n_of_family = member.sum(dim=0)
    n_others = len(member) - n_of_family
    if within_pages:
        positive, negative = pairs_within(member, its_page)
        n_of_family = member[positive.unique()].sum(dim=0)
        held_against = [negative[member[positive, f]].unique() for f in range(member.shape[1])]
        n_others = torch.tensor([len(others) for others in held_against])
    return Selectivity(
        chosen=areas[0],
        scored=areas[1],
        n_of_family=n_of_family,
        n_others=n_others,
        n_chosen=int(first.sum()),
        n_scored=int((~first).sum()),
    )


def pairs_within(is_family: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
    """[pairs] twice: rows of one page and of two families, every such pair in both orders."""
    family = is_family.int().argmax(dim=1)
    differ = (page[:, None] == page) & (family[:, None] != family)
    positive, negative = differ.nonzero(as_tuple=True)
    return positive, negative


def auroc_within(values: Tensor, is_family: Tensor, page: Tensor) -> Tensor:
    """[n, items], [n, families] bool and [n] -> [items, families] fp64: over all pairs of a family's question and one
    of another family on the same page, the share in which the family's has the larger value, ties by half. Not a
    number for a family without such a pair."""
    positive, negative = pairs_within(is_family, page)
    above = (values[positive] > values[negative]).double() + 0.5 * (values[positive] == values[negative])
    member = is_family[positive].double()
    return above.T @ member / member.sum(dim=0)


def halves(questions: Questions, seed: int = 0) -> Tensor:
    """[questions] bool: a random half of the pages, and with a page all its questions.

    Pages are shuffled, ordered by the family of their first question and taken alternately, so that both halves have
    every family alike where pages have one question.
    """
    n_pages = int(questions.page.max()) + 1
    first_family = torch.zeros(n_pages, dtype=torch.int64)
    # The last write is what stays; backwards, that is a page's first question.
    for page, family in zip(questions.page.flip(0).tolist(), questions.family.flip(0).tolist(), strict=True):
        first_family[page] = family
    order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(seed))
    order = order[first_family[order].argsort(stable=True)]
    in_first = torch.zeros(n_pages, dtype=torch.bool)
    in_first[order[::2]] = True
    return in_first[questions.page]
