"""Do features survive a change of seed? Latents of two dictionaries matched one to one, and the subspaces they span.

A feature that another seed does not find is a property of the run, not of the models. Matching is the assignment of the
largest summed cosine (Hungarian), so that no latent answers for two; a share matched is always given with its cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.model import BatchTopKCrosscoder
from finqa.errors import UserError

COSINES = (0.7, 0.8, 0.9, 0.95)
"""At which shares are given."""
RANK_TOLERANCE = 1e-4
"""Of the largest singular value, below which a direction does not count to a set's span."""


class Matching(NamedTuple):
    """One to one, min(a, b) pairs in the order of the first set's latents."""

    first: Tensor
    """[pairs]: latents of the first set."""
    second: Tensor
    """[pairs]: their partners."""
    cosines: Tensor
    """[pairs]: of the pairs."""


class Stability(NamedTuple):
    """Of two sets of latents."""

    n_first: int
    n_second: int
    matched: dict[float, float]
    """Share of the larger set whose partner has at least this cosine; not a number where both are empty."""
    median_cosine: float
    """Of the pairs; not a number where there is none."""
    subspace_overlap: float
    """See `subspace_overlap`; not a number where a set is empty."""
    overlap_by_chance: float
    """What two random subspaces of these ranks have on average."""


def vectors_of(model: BatchTopKCrosscoder, latents: Tensor | None = None) -> Tensor:
    """[n, inputs * d_model]: both decoder vectors of a latent as one, in scaled space, where both models weigh alike.

    `latents` is a mask or their numbers; all where none are given.
    """
    decoder = model.W_dec.detach().flatten(1)
    return decoder if latents is None else decoder[latents]


def match(first: Tensor, second: Tensor) -> Matching:
    """[n, d] and [m, d] vectors -> the one-to-one matching of the largest summed cosine.

    Signs count: a latent is positive, so the opposite direction is another feature.
    """
    from scipy.optimize import linear_sum_assignment

    if first.shape[1] != second.shape[1]:
        raise UserError(f"vectors of {first.shape[1]} and {second.shape[1]} numbers cannot be matched")
    cosines = _unit(first) @ _unit(second).T
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
    return Matching(rows, columns, cosines.cpu()[rows, columns])


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of two sets of vectors [n, d] and [m, d].

    1 where the smaller span lies in the larger, whatever the vectors in them are; 0 where they are orthogonal. Two
    random subspaces of ranks a <= b have b / d on average.
    """
    a, b = _basis(first), _basis(second)
    return float((a @ b.T).pow(2).sum() / min(len(a), len(b))) if len(a) and len(b) else float("nan")


def stability(first: Tensor, second: Tensor, cosines: Sequence[float] = COSINES) -> Stability:
    """Of two sets of vectors [n, d] and [m, d], such as the fine-tuned-only latents of two seeds (`vectors_of`)."""
    matching = match(first, second)
    larger = max(len(first), len(second))
    nan = float("nan")
    ranks = (len(_basis(first)), len(_basis(second)))
    return Stability(
        n_first=len(first),
        n_second=len(second),
        matched={c: float((matching.cosines >= c).sum()) / larger if larger else nan for c in cosines},
        median_cosine=float(matching.cosines.median()) if len(matching.cosines) else nan,
        subspace_overlap=subspace_overlap(first, second),
        overlap_by_chance=max(ranks) / first.shape[1] if min(ranks) else nan,
    )


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def _basis(vectors: Tensor) -> Tensor:
    """[rank, d]: an orthonormal basis of the span of the vectors, each taken at length 1."""
    if not len(vectors):
        return vectors.double()
    _, singular, basis = torch.linalg.svd(_unit(vectors), full_matrices=False)
    return basis[singular > RANK_TOLERANCE * singular[0]]
