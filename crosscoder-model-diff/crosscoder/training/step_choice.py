"""Which step a run takes: by hand on a GPU where the settings have one, else through autograd."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.training.step import AutogradStep, StepKind, product_dtype
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from crosscoder.training.gpu.step import GpuStep


def not_by_hand(
    crosscoder: CrosscoderConfig, config: TrainingConfig, device: torch.device, processes: int = 1
) -> str | None:
    """Why these settings have no step by hand; None where they have."""
    reasons = {
        f"method {crosscoder.method}": crosscoder.method != "batchtopk",
        "a frozen decoder": config.freeze_decoder,
        "a difference term": config.difference_weight != 0,
        "an L1 penalty": config.l1_weight > 0,
        f"the device {device.type}": device.type != "cuda",
        f"{crosscoder.n_latents} latents that do not divide among {processes} processes": crosscoder.n_latents
        % processes
        > 0,
        "no Triton is installed": find_spec("triton") is None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def new_step(
    kind: StepKind,
    model: BatchTopKCrosscoder,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    ranks: Ranks = ALONE,
) -> AutogradStep | GpuStep:
    """The step of a model whose parameters and optimiser state are those to go on from.

    Raises UserError where `by-hand` is asked for and the settings have no such step.
    """
    device = model.b_dec.device
    reason = not_by_hand(model.config, config, device, ranks.world)
    if kind == "by-hand" and reason is not None:
        raise UserError(f"there is no step by hand for {reason}: --step autograd, or auto")
    if kind == "autograd" or (kind == "auto" and reason is not None):
        return AutogradStep(model, optimizer, config, ranks)
    from crosscoder.training.gpu.step import GpuStep

    return GpuStep(model, optimizer, config, product_dtype(config, device), ranks)
