"""Latent scaling: which latents that look exclusive to one model are, and which are artefacts (Minder et al. 2025).

A latent whose decoder vector D in one model is long and in the other short may still be present in the other model:
the training may have shrunk the second vector (complete shrinkage), or written the same direction there with another
latent (latent decoupling). So how much of f_j D each model contains is measured directly, by least squares:

    beta_err[m] = slope of x[m] - (xhat[m] - f_j W_dec[j,m]) on f_j D     what latent j leaves or takes, in model m
    beta_rec[m] = slope of xhat[m] on f_j D                               what the whole dictionary writes there

D is the probe: the vector of the model that the latent is said to be exclusive to. nu is the other model's beta over
that model's own: near 0 where the latent is exclusive, near 1 where the other model has it as well. A high nu_err is
shrinkage, a high nu_rec decoupling.

Both vectors of every latent are taken as the probe, whatever its class by Delta: a latent whose vector in the other
model is not short enough for Delta to call it exclusive can still meet the conditions.

One pass for all latents. With E = x - xhat (b_dec inside xhat) and C_j = sum_i f_ij^2 the slopes are

    beta_err[m] = sum_i f_ij <E_i[m], D_j> / (|D_j|^2 C_j) + <D_j, W_dec[j,m]> / |D_j|^2
    beta_rec[m] = sum_i f_ij <xhat_i[m], D_j> / (|D_j|^2 C_j)

All of it in the models' own units, products in the parameters' precision and at least fp32, sums in fp64 (of a few
batches at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from crosscoder.analysis import measures as analysis
from crosscoder.dictionaries.config import N_MODELS
from crosscoder.dictionaries.model import BatchTopKCrosscoder, sparse_product
from finqa.runtime.errors import UserError

Condition = Literal["n", "beta", "nu_range", "nu_err", "nu_rec"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
"""What an exclusive latent must meet: enough firings (n), positive slopes in its own model (beta), ratios of slopes
that are in NU_RANGE, and small ratios nu_err and nu_rec."""

MIN_FIRINGS = 50
NU_RANGE = (-0.1, 2.0)
NU_ERR_BELOW = 0.2
NU_REC_BELOW = 0.5
BATCHES_IN_PRODUCTS_PRECISION = 8
"""Batches that are summed in the precision of the products, before their sum is added in fp64."""


@dataclass(frozen=True)
class LatentScaling:
    """Slopes of every latent, on the CPU in fp64. The second axis is the model whose decoder vector is the probe."""

    n: Tensor
    """[latent] int64: tokens on which it is active."""
    beta_err: Tensor
    """[latent, probe, model]; not a number where it is never active, or the probe has no length."""
    beta_rec: Tensor
    """[latent, probe, model]; NaN as in `beta_err`."""

    @cached_property
    def nu_err(self) -> Tensor:
        """[latent, probe]: beta_err of the other model over that of the probe's own."""
        return _ratio(self.beta_err)

    @cached_property
    def nu_rec(self) -> Tensor:
        """[latent, probe]: the same of beta_rec."""
        return _ratio(self.beta_rec)

    @property
    def trusted(self) -> Tensor:
        """[latent] mask: nu_err of the fine-tuned model's probe can be read (n, beta and nu_range of `met`)."""
        nu, (low, high) = self.nu_err[:, 1], NU_RANGE
        return (self.n >= MIN_FIRINGS) & (self.beta_err[:, 1, 1] > 0) & (nu >= low) & (nu <= high)

    @cached_property
    def met(self) -> dict[Condition, Tensor]:
        """For each condition a [latent, probe] mask: whether a latent meets it as one that only the probe's model has.
        NaN meets none."""
        err, rec = (beta.diagonal(dim1=1, dim2=2) for beta in (self.beta_err, self.beta_rec))
        low, high = NU_RANGE
        within = [(nu >= low) & (nu <= high) for nu in (self.nu_err, self.nu_rec)]
        return {
            "n": (self.n >= MIN_FIRINGS)[:, None].expand(-1, N_MODELS),
            "beta": (err > 0) & (rec > 0),
            "nu_range": within[0] & within[1],
            "nu_err": self.nu_err < NU_ERR_BELOW,
            "nu_rec": self.nu_rec < NU_REC_BELOW,
        }

    @cached_property
    def exclusive(self) -> Tensor:
        """[latent, probe] mask: it meets every condition."""
        return torch.stack([self.met[condition] for condition in CONDITIONS]).all(dim=0)

    def failures(self, latent: int, own: int) -> list[Condition]:
        """The conditions that a latent fails as one that only model `own` has; an exclusive latent fails none."""
        return [condition for condition in CONDITIONS if not self.met[condition][latent, own]]

    def probes(self, kinds: Sequence[analysis.LatentClass]) -> Tensor:
        """[latent] int64: the probe by which figures and tables show each latent. It is the model that the latent is
        exclusive to by these conditions; where that is neither or both, the instruct model for latents of the class
        instruct-only (`kinds`, by Delta), and the fine-tuned model for all others."""
        by_class = torch.tensor([0 if kind == "instruct-only" else 1 for kind in kinds])
        instruct, fine_tuned = self.exclusive.unbind(dim=1)
        return torch.where(instruct == fine_tuned, by_class, fine_tuned.long())


@dataclass(frozen=True)
class ExclusiveCounts:
    """Counts for one exclusive class: its latents by Delta, and those of any class that latent scaling accepts."""

    by_delta: int
    confirmed: int
    fail: dict[str, int]
    """How many of them fail each condition; a latent can fail several."""
    meet: dict[analysis.LatentClass, list[int]]
    """Which latents of each class by Delta meet every condition, those of this class first."""


@torch.no_grad()
def latent_scaling(
    model: BatchTopKCrosscoder, batches: Iterable[Tensor], variance: analysis.VarianceSums | None = None
) -> LatentScaling:
    """Slopes on raw activations [n, 2, d_model], at the inference threshold. Give it held-out documents; they are added
    to `variance` in the same pass.

    UserError for a difference SAE, which has one decoder vector a latent, and a stagewise SAE, which has two values.
    """
    if not model.config.compares_models:
        raise UserError(
            f"latent scaling compares what one latent writes into two models; a {model.config.method} has no such "
            "latents"
        )
    n_latents, device = model.config.n_latents, model.b_dec.device
    exact = model.raw_decoder().double()
    n = torch.zeros(n_latents, dtype=torch.int64, device=device)
    squares = torch.zeros(n_latents, dtype=torch.float64, device=device)
    of_error = torch.zeros(n_latents, N_MODELS, N_MODELS, dtype=torch.float64, device=device)
    of_reconstruction = torch.zeros_like(of_error)
    # [latent, model * d_model]: sums over some batches of f_ij times the vector. To go along the probes in fp64 after
    # every batch would move as much memory as the product itself does.
    weighted = [torch.zeros(exact.flatten(1).shape, dtype=model.b_dec.dtype, device=device) for _ in range(2)]

    def take_along_probes() -> None:
        for sums, vectors in zip((of_error, of_reconstruction), weighted, strict=True):
            sums += torch.einsum("jmd,jpd->jpm", vectors.view(exact.shape).double(), exact)
            vectors.zero_()

    for number, raw in enumerate(batches, start=1):
        inputs = model.inputs(raw.to(device))
        f, xhat = read = model.reconstruct(model.scale(raw.to(device)))
        if variance is not None:
            variance.add(raw, read=read)
        reconstruction = model.unscale(xhat)
        n += (f > 0).sum(dim=0)
        squares += f.pow(2).sum(dim=0, dtype=torch.float64)
        for sums, vectors in zip(weighted, (inputs - reconstruction, reconstruction), strict=True):
            sums += sparse_product(f.T, vectors.flatten(1))
        if number % BATCHES_IN_PRODUCTS_PRECISION == 0:
            take_along_probes()
    take_along_probes()
    probe_squares = exact.pow(2).sum(dim=-1)[:, :, None]
    own = torch.einsum("jpd,jmd->jpm", exact, exact) / probe_squares
    scale = probe_squares * squares[:, None, None]
    beta_err = torch.where(n[:, None, None] > 0, of_error / scale + own, torch.nan)
    return LatentScaling(n.cpu(), beta_err.cpu(), (of_reconstruction / scale).cpu())


EXCLUSIVE: Mapping[analysis.LatentClass, int] = {"instruct-only": 0, "fine-tuned-only": 1}
"""The exclusive classes, each with the index of the model that its latents belong to."""


def verdict(scaling: LatentScaling, latent: int, own: int) -> str:
    """What latent scaling says of a latent as one that only model `own` has: confirmed, or why not.

    `unreliable` where the slopes cannot be trusted, else `complete shrinkage` or `latent decoupling` or both.
    """
    failed = scaling.failures(latent, own)
    if {"n", "beta", "nu_range"} & set(failed):
        return "unreliable"
    names = {"nu_err": "complete shrinkage", "nu_rec": "latent decoupling"}
    return " and ".join(names[condition] for condition in failed) or "confirmed"


def exclusive_counts(
    scaling: LatentScaling, kinds: Sequence[analysis.LatentClass], alive: Tensor
) -> dict[analysis.LatentClass, ExclusiveCounts]:
    """For both exclusive classes: how many latents they have, how many are confirmed, and which others would be.

    Only latents that are `alive` ([latent] mask) are counted; `kinds` is every latent's class by Delta. A latent that
    is alive but never active in the data of the scaling fails.
    """
    of_class = analysis.class_masks(kinds, alive)
    counts: dict[analysis.LatentClass, ExclusiveCounts] = {}
    for kind, own in EXCLUSIVE.items():
        order: list[analysis.LatentClass] = sorted(
            analysis.CLASSES, key=lambda its: (its != kind, its in EXCLUSIVE, its == "shared")
        )
        meet: dict[analysis.LatentClass, list[int]] = {
            its: (of_class[its] & scaling.exclusive[:, own]).nonzero().squeeze(-1).tolist() for its in order
        }
        fail: dict[str, int] = {c: int((of_class[kind] & ~scaling.met[c][:, own]).sum()) for c in CONDITIONS}
        counts[kind] = ExclusiveCounts(int(of_class[kind].sum()), len(meet[kind]), fail, meet)
    return counts


def meet_lines(counts: Mapping[analysis.LatentClass, ExclusiveCounts]) -> list[str]:
    """One line per exclusive class: how many latents of each class meet its conditions."""
    lines = []
    for kind, of in counts.items():
        n = sum(map(len, of.meet.values()))
        meet = "1 latent meets" if n == 1 else f"{n:,} latents meet"
        classes = ", ".join(f"{len(latents):,} {its}" for its, latents in of.meet.items())
        lines.append(f"{meet} latent scaling's conditions for {kind}: {classes}")
    return lines


def _ratio(beta: Tensor) -> Tensor:
    """[latent, probe, model] -> [latent, probe]: other model over own."""
    return torch.stack([beta[:, 0, 1] / beta[:, 0, 0], beta[:, 1, 0] / beta[:, 1, 1]], dim=-1)
