"""Measures of a crosscoder: explained variance, decoder norms, classes, cosines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from crosscoder.dictionaries.config import N_MODELS
from crosscoder.dictionaries.model import BatchTopKCrosscoder

LatentClass = Literal["instruct-only", "shared", "fine-tuned-only", "between"]
CLASSES: tuple[LatentClass, ...] = get_args(LatentClass)

INSTRUCT_ONLY_BELOW = 0.1
SHARED = (0.4, 0.6)
FINE_TUNED_ONLY_ABOVE = 0.9
"""Bounds on Delta (see `delta`), after Minder et al. 2025."""


class ExplainedVariance(NamedTuple):
    """Over all tokens given: 1 - sum of squared errors / sum of squared distances from the tokens' mean."""

    instruct: float | None
    """None, like the next two, for a difference SAE, which reconstructs neither model."""
    fine_tuned: float | None
    joint: float | None
    """Both sums over both models, in scaled space."""
    difference: float
    """Explained variance of x[1] - x[0] by xhat[1] - xhat[0], in the models' own units. It can be 0 although both
    models are well explained."""
    l0: float
    """Mean number of active latents per token: explained variances can be compared at equal L0 only."""
    n_tokens: int

    @property
    def parts(self) -> dict[str, float]:
        """Explained variance of each model and of their difference, by name; a difference SAE has the last alone."""
        every = {"instruct": self.instruct, "fine-tuned": self.fine_tuned, "difference": self.difference}
        return {name: value for name, value in every.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items()) + f", at L0 {self.l0:.1f}"


class _TargetSums:
    """fp64 sums for one target of width d, by group of tokens; `shift` keeps the difference of large sums exact."""

    def __init__(self, n_groups: int, d: int, device: torch.device):
        self.counts, self.errors, self.squares = torch.zeros(3, n_groups, dtype=torch.float64, device=device)
        self.sums = torch.zeros(n_groups, d, dtype=torch.float64, device=device)
        self.shift: Tensor | None = None

    def add(self, membership: Tensor, x: Tensor, xhat: Tensor) -> None:
        """[group, n] fp64, 1 where a token is of a group, else 0; [n, d] targets and reconstructions."""
        x, xhat = x.double(), xhat.double()
        if self.shift is None:
            self.shift = x.mean(dim=0)
        centred = x - self.shift
        self.counts += membership.sum(dim=1)
        self.errors += membership @ (x - xhat).pow(2).sum(dim=-1)
        self.squares += membership @ centred.pow(2).sum(dim=-1)
        self.sums += membership @ centred

    def error(self, groups: Sequence[int]) -> float:
        return float(self.errors[groups].sum())

    def total(self, groups: Sequence[int], common_mean: bool) -> float:
        """Squared distances of the groups' tokens from their own mean, or from that of all tokens."""
        over = range(len(self.counts)) if common_mean else groups
        mean = self.sums[over].sum(dim=0) / self.counts[over].sum()
        sums, n = self.sums[groups].sum(dim=0), self.counts[groups].sum()
        return float(self.squares[groups].sum() - 2 * mean @ sums + n * mean @ mean)


class VarianceSums:
    """What the explained variance of a dictionary follows from, added up batch by batch for each group of tokens.

    Reconstructions are by the inference threshold. Models are in scaled space, their difference is in their own units.
    """

    def __init__(self, model: BatchTopKCrosscoder, n_groups: int = 1):
        self.model = model
        shape = (n_groups, model.config.d_model, model.b_dec.device)
        self.inputs = [_TargetSums(*shape) for _ in range(model.config.n_inputs)]
        self.difference = _TargetSums(*shape)
        self.active = torch.zeros(n_groups, dtype=torch.float64, device=model.b_dec.device)

    @torch.no_grad()
    def add(self, raw: Tensor, groups: Tensor | None = None, read: tuple[Tensor, Tensor] | None = None) -> None:
        """Raw activations [n, 2, d_model], and [n] int64 the group of each token (None: all are of one); `read` is what
        `reconstruct` gives for them, where it is there already."""
        model, raw = self.model, raw.to(self.active.device)
        of = torch.zeros(len(raw), dtype=torch.int64) if groups is None else groups
        membership = torch.nn.functional.one_hot(of.to(raw.device), len(self.active)).T.double()
        x = model.scale(raw)
        f, xhat = read or model.reconstruct(x)
        self.active += membership @ (f > 0).sum(dim=-1).double()
        for m, sums in enumerate(self.inputs):
            sums.add(membership, x[:, m], xhat[:, m])
        truth = model.difference(model.inputs(raw).double())
        self.difference.add(membership, truth, model.difference(model.unscale(xhat.double())))

    def explained(self, groups: Sequence[int] = (0,), common_mean: bool = False) -> ExplainedVariance:
        """Explained variance on the tokens of some groups; distances are from the mean of these very tokens, or with
        `common_mean` from that of all."""
        groups = list(groups)
        errors = [sums.error(groups) for sums in self.inputs]
        totals = [sums.total(groups, common_mean) for sums in self.inputs]
        of_models = [*map(_one_less, errors, totals), _one_less(sum(errors), sum(totals))]
        instruct, fine_tuned, joint = of_models if len(errors) == N_MODELS else (None, None, None)
        n = self.difference.counts[groups].sum()
        difference = _one_less(self.difference.error(groups), self.difference.total(groups, common_mean))
        return ExplainedVariance(instruct, fine_tuned, joint, difference, float(self.active[groups].sum() / n), int(n))


def _one_less(error: float, total: float) -> float:
    """Not a number where nothing varies, as on a single token."""
    return 1 - error / total if total > 0 else float("nan")


def explained_variance(model: BatchTopKCrosscoder, batches: Iterable[Tensor]) -> ExplainedVariance:
    """Explained variance of raw activations [n, 2, d_model], reconstructed by the inference threshold.

    A ratio of two sums over all tokens, in fp64. Give it held-out documents, without BOS and padding.
    """
    sums = VarianceSums(model)
    for raw in batches:
        sums.add(raw)
    return sums.explained()


def decoder_norms(model: BatchTopKCrosscoder) -> Tensor:
    """[latent, 2], on the CPU: lengths of the decoder vectors in each model's own units."""
    return model.raw_decoder().norm(dim=-1).cpu()


def decoder_directions(model: BatchTopKCrosscoder) -> dict[str, Tensor]:
    """Decoder vectors [latent, d_model] in the models' own units, by model; a difference SAE's under `difference`."""
    if model.config.n_inputs == N_MODELS:
        return dict(zip(("instruct", "fine-tuned"), model.raw_decoder().unbind(dim=1), strict=True))
    return {"difference": model.difference_decoder()}


def relative_decoder_norm(norms: Tensor) -> Tensor:
    """[latent, 2] -> [latent]: n1 / (n0 + n1), near 0 for instruct-only, near 1 for fine-tuned-only latents."""
    return norms[:, 1] / norms.sum(dim=-1)


def delta(norms: Tensor) -> Tensor:
    """[latent, 2] -> [latent]: 0.5 * ((n1 - n0) / max(n0, n1) + 1), the measure that the classes are cut on."""
    return 0.5 * ((norms[:, 1] - norms[:, 0]) / norms.max(dim=-1).values + 1)


def relative_norm_at(delta_value: float) -> float:
    """The relative decoder norm of a latent with this Delta, to draw the bounds of the classes on its axis."""
    ratio = 2 * delta_value - 1
    return 1 / (2 - ratio) if ratio > 0 else (1 + ratio) / (2 + ratio)


def classify(delta_values: Tensor) -> list[LatentClass]:
    """Class of each latent by Delta; `between` is every latent that is in none of the other three."""

    def of(value: float) -> LatentClass:
        if value < INSTRUCT_ONLY_BELOW:
            return "instruct-only"
        if value > FINE_TUNED_ONLY_ABOVE:
            return "fine-tuned-only"
        return "shared" if SHARED[0] <= value <= SHARED[1] else "between"

    return [of(value) for value in delta_values.tolist()]


def latent_classes(model: BatchTopKCrosscoder) -> list[LatentClass]:
    """Class of each latent: by Delta, or where the dictionary reserves latents for either model, by that."""
    n_reserved = model.config.n_reserved
    if not n_reserved:
        return classify(delta(decoder_norms(model)))
    groups: list[tuple[LatentClass, int]] = [
        ("shared", model.config.n_shared),
        ("instruct-only", n_reserved),
        ("fine-tuned-only", n_reserved),
    ]
    return [kind for kind, n in groups for _ in range(n)]


def class_masks(kinds: Sequence[LatentClass], among: Tensor) -> dict[LatentClass, Tensor]:
    """For each class a [latent] bool mask: its latents (`latent_classes`) that are in the mask `among`."""
    return {kind: torch.tensor([its == kind for its in kinds], dtype=torch.bool) & among for kind in CLASSES}


def decoder_cosines(model: BatchTopKCrosscoder) -> Tensor:
    """[latent], on the CPU: cosine of a latent's two decoder vectors; a scale for each model does not change it.

    Not a number where one of them has no length, as a partition's delta latents can have, and those that are reserved
    for one model have.
    """
    with torch.no_grad():
        # Rounding can take the cosine of two equal vectors above 1, and out of a histogram that ends there.
        cosines = torch.cosine_similarity(model.W_dec[:, 0], model.W_dec[:, 1], dim=-1).clamp(-1, 1)
        without_length = (model.W_dec.norm(dim=-1) == 0).any(dim=-1)
        return cosines.masked_fill(without_length, torch.nan).cpu()


def median(values: Tensor) -> float | None:
    """Median of the values that are numbers; None where there are none."""
    numbers = values[values.isfinite()]
    return float(numbers.median()) if len(numbers) else None
