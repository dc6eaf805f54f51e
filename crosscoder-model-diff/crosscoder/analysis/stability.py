"""Do features survive a change of seed? Latents of two dictionaries matched one to one, and the subspaces they span.

A feature that another seed does not find is a property of the run, not of the models. Latents are matched by the
assignment with the largest summed cosine (Hungarian), so that no latent is the partner of two; a share of matched
latents is always given with its cosine.

    first, second = (features(load_dictionary(folder), store, store.split(0.1, 0).train) for folder in folders)
    rows = stability_rows(first, second)

Every row also has what chance gives: the same figures with the second dictionary turned by a random rotation, one for
both models. Its norms, classes and inner cosines stay as they are, and only its directions lose their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.statistics import latent_statistics
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError

COSINES = (0.7, 0.8, 0.9, 0.95)
"""Cosines for which the share of matched latents is given."""
RANK_TOLERANCE = 1e-4
"""Share of the largest singular value, below which a direction does not belong to a set's span."""

OVERLAP_AT_MOST = 2048
"""Largest set whose span is computed; the span of more latents is nearly the whole space, and takes minutes."""
ROWS_AT_ONCE = 2048
ALL = "all"


class Matching(NamedTuple):
    """One to one, min(a, b) pairs in the order of the first set's latents."""

    first: Tensor
    """[pairs]: latents of the first set."""
    second: Tensor
    """[pairs]: their partners."""
    cosines: Tensor
    """[pairs]: of the pairs."""


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


class Features(NamedTuple):
    """The active latents of one dictionary, and which sets they form."""

    method: str
    vectors: Tensor
    """[n, inputs, d_model]: decoder vectors in scaled space."""
    sets: dict[str, Tensor]
    """[n] bool masks by name; `all` is the first."""


def features(
    model: BatchTopKCrosscoder,
    store: ActivationStore,
    indices: Tensor,
    further: Mapping[str, Tensor] | None = None,
) -> Features:
    """The latents that are active on some token at `indices` of the store, and the sets that they form.

    The sets are the classes (measures.latent_classes), and the two parts of a partition; the latents of a difference
    SAE and of a stagewise SAE are of one kind.
    `further` holds [latent] masks by name, such as that of the latents that latent scaling confirms.
    """
    alive = ~latent_statistics(model, store, indices, n_top=1).dead
    sets = {ALL: torch.ones_like(alive)}
    if model.config.compares_models:
        sets |= analysis.class_masks(analysis.latent_classes(model), sets[ALL])
    if model.config.n_delta:
        is_delta = torch.arange(model.config.n_latents) >= model.config.n_shared
        sets |= {"shared latents": ~is_delta, "delta latents": is_delta}
    sets |= further or {}
    of_alive = {name: mask.cpu()[alive] for name, mask in sets.items()}
    return Features(model.config.method, model.W_dec.detach().float().cpu()[alive], of_alive)


def stability_rows(first: Features, second: Features, n_rotations: int = 3) -> list[dict[str, Any]]:
    """A flat row for each set that both have, to be written as CSV or JSON; a figure that does not exist is None.

    n_first, n_second     latents of the set
    matched_<c>           share of the larger set whose partner in the other one's set has at least this cosine
    chance_<c>            the most that chance gives: share of the latents with any such partner in a turned dictionary
    median_cosine         of the pairs, and chance_median_cosine of the best partners in a turned dictionary
    same_set_<c>          of the set's latents matched at <c> among *all* latents, the share whose partner is of the set
    subspace_overlap      and chance_overlap, of a turned dictionary; None for sets of more than OVERLAP_AT_MOST latents

    UserError where the dictionaries are of two methods or widths.
    """
    if first.method != second.method or first.vectors.shape[1:] != second.vectors.shape[1:]:
        raise UserError(
            f"dictionaries of two kinds cannot be matched: {first.method} {tuple(first.vectors.shape[1:])} "
            f"and {second.method} {tuple(second.vectors.shape[1:])}"
        )
    generator = torch.Generator().manual_seed(0)
    at_chance = [turned(second.vectors, generator) for _ in range(n_rotations)]
    everything = match(first.vectors.flatten(1), second.vectors.flatten(1))
    rows = []
    for name in (name for name in first.sets if name in second.sets):
        own, other = first.sets[name], second.sets[name]
        a, b = first.vectors[own].flatten(1), second.vectors[other].flatten(1)
        matching = everything if name == ALL else match(a, b)
        chance = [best_cosines(a, vectors[other].flatten(1)) for vectors in at_chance]
        best = torch.cat(chance) if chance else torch.empty(0)
        larger = max(len(a), len(b))
        in_set, partner = own[everything.first], other[everything.second]
        row: dict[str, Any] = {"set": name, "n_first": len(a), "n_second": len(b)}
        for c in COSINES:
            there = in_set & (everything.cosines >= c)
            row[f"matched_{c}"] = _share(matching.cosines >= c, larger)
            row[f"chance_{c}"] = _share(best >= c, len(best))
            row[f"same_set_{c}"] = _share(there & partner, int(there.sum()))
        row["median_cosine"] = float(matching.cosines.median()) if len(matching.cosines) else None
        row["chance_median_cosine"] = float(best.median()) if len(best) else None
        small = min(len(a), len(b)) > 0 and larger <= OVERLAP_AT_MOST
        row["subspace_overlap"] = subspace_overlap(a, b) if small else None
        overlaps = [subspace_overlap(a, vectors[other].flatten(1)) for vectors in at_chance] if small else []
        row["chance_overlap"] = sum(overlaps) / len(overlaps) if overlaps else None
        rows.append(row)
    return rows


def turned(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """[n, inputs, d] vectors turned by one random rotation, the same for every input."""
    square = torch.randn(vectors.shape[-1], vectors.shape[-1], generator=generator)
    return vectors @ torch.linalg.qr(square).Q.to(vectors)


def best_cosines(first: Tensor, second: Tensor) -> Tensor:
    """[max(n, m)]: for every vector of the larger set its largest cosine with one of the smaller. No one-to-one
    matching can have more pairs above a cosine."""
    if not len(first) or not len(second):
        return torch.zeros(max(len(first), len(second)))
    larger, smaller = (first, second) if len(first) >= len(second) else (second, first)
    other = _unit(smaller).float().T
    return torch.cat([(_unit(some).float() @ other).max(dim=1).values for some in larger.split(ROWS_AT_ONCE)])


def _share(mask: Tensor, of: int) -> float | None:
    return int(mask.sum()) / of if of else None


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def _basis(vectors: Tensor) -> Tensor:
    """[rank, d]: an orthonormal basis of the span of the vectors, each taken at length 1."""
    if not len(vectors):
        return vectors.double()
    _, singular, basis = torch.linalg.svd(_unit(vectors), full_matrices=False)
    return basis[singular > RANK_TOLERANCE * singular[0]]
