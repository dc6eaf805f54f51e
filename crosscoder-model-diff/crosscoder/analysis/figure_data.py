"""The numbers behind the figures of latents: the figures draw them, and analysis.json holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.analysis.measures import LatentClass

NORM_BINS = 100
FREQUENCY_BINS_PER_DECADE = 8
REGIONS = ("exclusive", "complete shrinkage", "latent decoupling", "both")
"""Regions of the plane of nu_err and nu_rec, as latent scaling cuts it."""


class Histogram(NamedTuple):
    """Counts between edges; the last bin holds its upper edge too."""

    edges: list[float]
    counts: list[int]

    @property
    def n(self) -> int:
        return sum(self.counts)


def histogram(values: Tensor, edges: Tensor) -> Histogram:
    """Histogram of [n] numbers over ascending edges; numbers outside the edges, and NaN, are not counted."""
    values = values.double().cpu()
    counts, _ = torch.histogram(values[values.isfinite()], edges.double())
    return Histogram(edges.tolist(), [int(count) for count in counts.tolist()])


def relative_norms(norms: Tensor) -> Histogram:
    """Histogram of the relative decoder norms of [latent, 2] `norms`."""
    return histogram(analysis.relative_decoder_norm(norms), torch.linspace(0, 1, NORM_BINS + 1, dtype=torch.float64))


STRETCHES: tuple[tuple[LatentClass, float, float], ...] = (
    ("instruct-only", 0.0, analysis.INSTRUCT_ONLY_BELOW),
    ("between", analysis.INSTRUCT_ONLY_BELOW, analysis.SHARED[0]),
    ("shared", *analysis.SHARED),
    ("between", analysis.SHARED[1], analysis.FINE_TUNED_ONLY_ABOVE),
    ("fine-tuned-only", analysis.FINE_TUNED_ONLY_ABOVE, 1.0),
)
"""The classes along the axis of Delta, each with its bounds."""


class ClassCount(NamedTuple):
    """A stretch of the axis of relative decoder norms, and how many latents lie in it."""

    kind: LatentClass
    low: float
    high: float
    n: int


def class_counts(norms: Tensor) -> list[ClassCount]:
    """Latents of [latent, 2] norms in each of STRETCHES; the bounds are relative decoder norms."""
    deltas = analysis.delta(norms)
    kinds = analysis.classify(deltas)
    at = analysis.relative_norm_at
    return [
        ClassCount(
            kind,
            at(below),
            at(above),
            sum(k == kind and below <= d <= above for k, d in zip(kinds, deltas.tolist(), strict=True)),
        )
        for kind, below, above in STRETCHES
    ]


def frequencies(
    frequency: Tensor, n_tokens: int, kinds: Sequence[LatentClass] | None = None
) -> Mapping[LatentClass | None, Histogram]:
    """Histograms of how often latents are active, on a log axis from one token in `n_tokens` to all; dead latents are
    not counted.

    By class where `kinds` gives each latent's, without those that have none; else one, under None.
    """
    edges = _frequency_edges(n_tokens)
    if kinds is None:
        return {None: histogram(frequency, edges)}
    of_class = analysis.class_masks(kinds, frequency.cpu() > 0)
    return {kind: histogram(frequency[mask], edges) for kind, mask in of_class.items() if mask.any()}


def _frequency_edges(n_tokens: int) -> Tensor:
    """Edges that rise by a constant factor, moved halfway between two numbers of tokens: a bin of no such number would
    be empty whatever the latents do."""
    n_bins = math.ceil(math.log10(max(n_tokens, 2)) * FREQUENCY_BINS_PER_DECADE)
    firings = torch.logspace(0, math.log10(n_tokens), n_bins + 1, dtype=torch.float64).round().unique()
    return torch.cat([firings - 0.5, firings[-1:] + 0.5]) / n_tokens


class ScalingPoints(NamedTuple):
    """Latents of one class in the plane of nu_err and nu_rec."""

    latents: list[int]
    nu_err: list[float]
    nu_rec: list[float]
    regions: dict[str, int]
    """How many lie in each of REGIONS."""
    too_few: int
    """Latents that are left out because they are active on fewer than latent_scaling.MIN_FIRINGS tokens of the held-out
    documents."""
    outside: int
    """Latents that are left out because a slope of their own model is not positive, or a ratio of slopes lies outside
    latent_scaling.NU_RANGE and means nothing."""

    @property
    def n(self) -> int:
        return len(self.latents)


def scaling_points(
    scaling: LatentScaling, kinds: Sequence[LatentClass], dead: Tensor
) -> dict[LatentClass, ScalingPoints]:
    """The points of each class, of latents that are not `dead` ([latent] mask); a class without any is left out.

    A latent is shown by one of its two probes (LatentScaling.probes): the one by which it is exclusive, if any.
    So the region `exclusive` holds every latent that meets the conditions for either model, whatever its class.
    """
    probes, of_class = scaling.probes(kinds), analysis.class_masks(kinds, ~dead)
    return {
        kind: _points(scaling, mask.nonzero().squeeze(-1), probes[mask])
        for kind, mask in of_class.items()
        if mask.any()
    }


def _points(scaling: LatentScaling, chosen: Tensor, probe: Tensor) -> ScalingPoints:
    met = {condition: mask[chosen, probe] for condition, mask in scaling.met.items()}
    enough, inside = met["n"], met["beta"] & met["nu_range"]
    shown = enough & inside
    shrunk, decoupled = ~met["nu_err"][shown], ~met["nu_rec"][shown]
    in_region = (~shrunk & ~decoupled, shrunk & ~decoupled, ~shrunk & decoupled, shrunk & decoupled)
    return ScalingPoints(
        latents=chosen[shown].tolist(),
        nu_err=scaling.nu_err[chosen, probe][shown].tolist(),
        nu_rec=scaling.nu_rec[chosen, probe][shown].tolist(),
        regions={name: int(mask.sum()) for name, mask in zip(REGIONS, in_region, strict=True)},
        too_few=int((~enough).sum()),
        outside=int((enough & ~inside).sum()),
    )
