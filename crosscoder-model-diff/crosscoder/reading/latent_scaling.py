"""Latent scaling: which latents that look exclusive to one model are, and which are artefacts (Minder et al. 2025).

A latent whose decoder vector D in one model is long and in the other short may still be present in the other model:
the training may have shrunk the second vector (complete shrinkage), or written the same direction there with another
latent (latent decoupling). So each model is asked directly how much of f_j D there is in it, by least squares:

    beta_err[m] = slope of x[m] - (xhat[m] - f_j W_dec[j,m]) on f_j D     what latent j leaves or takes, in model m
    beta_rec[m] = slope of xhat[m] on f_j D                               what the whole dictionary writes there

with the latent's own model's vector as D. nu is the other model's beta over the own model's: near 0 where the latent
is exclusive, near 1 where the other model has it as well. High nu_err is shrinkage, high nu_rec decoupling.

One pass for all latents. With E = x - xhat (b_dec inside xhat) and C_j = sum_i f_ij^2 the slopes are

    beta_err[m] = sum_i f_ij <E_i[m], D_j> / (|D_j|^2 C_j) + <D_j, W_dec[j,m]> / |D_j|^2
    beta_rec[m] = sum_i f_ij <xhat_i[m], D_j> / (|D_j|^2 C_j)

All of it in the models' own units, products in the parameters' precision and at least fp32, sums in fp64 (of a few
batches at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from crosscoder.config import N_MODELS
from crosscoder.model import BatchTopKCrosscoder
from crosscoder.reading import analysis
from finqa.errors import UserError

Condition = Literal["n", "beta", "nu_range", "nu_err", "nu_rec"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
"""What an exclusive latent must meet: enough firings, positive slopes in its own model, slopes' ratios that mean
something, and that both are small."""

MIN_FIRINGS = 50
NU_RANGE = (-0.1, 2.0)
NU_ERR_BELOW = 0.2
NU_REC_BELOW = 0.5
BATCHES_IN_PRODUCTS_PRECISION = 8
"""Batches that are summed in the precision of the products, before their sum is added in fp64."""


@dataclass(frozen=True)
class LatentScaling:
    """Of every latent; on the CPU, fp64. The second axis is the model whose decoder vector is the probe."""

    n: Tensor
    """[latent] int64: tokens on which it is active."""
    beta_err: Tensor
    """[latent, probe, model]; not a number where it is never active, or the probe has no length."""
    beta_rec: Tensor
    """The same."""

    @property
    def nu_err(self) -> Tensor:
        """[latent, probe]: beta_err of the other model over that of the probe's own."""
        return _ratio(self.beta_err)

    @property
    def nu_rec(self) -> Tensor:
        """[latent, probe]: the same of beta_rec."""
        return _ratio(self.beta_rec)

    def of(self, latents: Tensor) -> LatentScaling:
        """Of the latents of a mask, or of these numbers, alone."""
        return LatentScaling(self.n[latents], self.beta_err[latents], self.beta_rec[latents])

    def failures(self, latent: int, own: int) -> list[Condition]:
        """The conditions that a latent does not meet as one that only model `own` has; none, and it is exclusive."""
        err, rec = self.beta_err[latent, own, own].item(), self.beta_rec[latent, own, own].item()
        nu_err, nu_rec = self.nu_err[latent, own].item(), self.nu_rec[latent, own].item()
        low, high = NU_RANGE
        # Written so that what is not a number fails.
        met: dict[Condition, bool] = {
            "n": int(self.n[latent]) >= MIN_FIRINGS,
            "beta": err > 0 and rec > 0,
            "nu_range": low <= nu_err <= high and low <= nu_rec <= high,
            "nu_err": nu_err < NU_ERR_BELOW,
            "nu_rec": nu_rec < NU_REC_BELOW,
        }
        return [condition for condition in CONDITIONS if not met[condition]]


@dataclass(frozen=True)
class ExclusiveCounts:
    """The latents that Delta calls exclusive to one model, and what latent scaling says of them."""

    by_delta: int
    confirmed: int
    fail: dict[str, int]
    """How many fail each condition; a latent can fail several."""


@torch.no_grad()
def latent_scaling(model: BatchTopKCrosscoder, batches: Iterable[Tensor]) -> LatentScaling:
    """Of raw activations [n, 2, d_model], at the inference threshold. Give it held-out documents.

    UserError for a difference SAE: it has one decoder vector a latent, and no model to compare with another.
    """
    if model.config.n_inputs != N_MODELS:
        raise UserError(f"latent scaling compares two models' decoder vectors; a {model.config.method} has one")
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
        f = model.encode(model.scale(raw.to(device)))
        reconstruction = model.unscale(model.decode(f))
        n += (f > 0).sum(dim=0)
        squares += f.pow(2).sum(dim=0, dtype=torch.float64)
        for sums, vectors in zip(weighted, (inputs - reconstruction, reconstruction), strict=True):
            sums.addmm_(f.T, vectors.flatten(1))
        if number % BATCHES_IN_PRODUCTS_PRECISION == 0:
            take_along_probes()
    take_along_probes()
    probe_squares = exact.pow(2).sum(dim=-1)[:, :, None]
    own = torch.einsum("jpd,jmd->jpm", exact, exact) / probe_squares
    scale = probe_squares * squares[:, None, None]
    beta_err = torch.where(n[:, None, None] > 0, of_error / scale + own, torch.nan)
    return LatentScaling(n.cpu(), beta_err.cpu(), (of_reconstruction / scale).cpu())


def own_model(kind: analysis.LatentClass) -> int | None:
    """The model that a latent of this class is exclusive to; None for the other classes."""
    return {"instruct-only": 0, "fine-tuned-only": 1}.get(kind)


def verdict(scaling: LatentScaling, latent: int, kind: analysis.LatentClass) -> str:
    """What latent scaling says of a latent of a class: confirmed, or why not; empty where the class claims nothing.

    `unreliable` where the slopes cannot be trusted, else `complete shrinkage` or `latent decoupling` or both.
    """
    own = own_model(kind)
    if own is None:
        return ""
    failed = scaling.failures(latent, own)
    if {"n", "beta", "nu_range"} & set(failed):
        return "unreliable"
    names = {"nu_err": "complete shrinkage", "nu_rec": "latent decoupling"}
    return " and ".join(names[condition] for condition in failed) or "confirmed"


def exclusive_counts(
    scaling: LatentScaling, kinds: Sequence[analysis.LatentClass]
) -> dict[analysis.LatentClass, ExclusiveCounts]:
    """For both exclusive classes of `kinds` (every latent's class by Delta): how many there are, and are confirmed.

    Latents that are never active in the data of the scaling are among them, and fail.
    """
    counts: dict[analysis.LatentClass, ExclusiveCounts] = {}
    for kind in ("instruct-only", "fine-tuned-only"):
        own = own_model(kind)
        assert own is not None
        failures = [scaling.failures(j, own) for j, its in enumerate(kinds) if its == kind]
        fail = {condition: sum(condition in failed for failed in failures) for condition in CONDITIONS}
        counts[kind] = ExclusiveCounts(len(failures), sum(not failed for failed in failures), dict(fail))
    return counts


def _ratio(beta: Tensor) -> Tensor:
    """[latent, probe, model] -> [latent, probe]: other model over own."""
    return torch.stack([beta[:, 0, 1] / beta[:, 0, 0], beta[:, 1, 0] / beta[:, 1, 1]], dim=-1)
