"""Which step a run takes: by hand on a GPU where the settings have one, else through autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.training.step import AutogradStep, StepKind, TakeStep, product_dtype
from finqa.runtime.errors import UserError


def not_by_hand(
    crosscoder: CrosscoderConfig, config: TrainingConfig, device: torch.device, ranks: Ranks = ALONE
) -> str | None:
    """Why these settings have no step by hand; None where they have."""
    reasons: list[tuple[bool, Callable[[], str]]] = [
        (crosscoder.method != "batchtopk", lambda: f"method {crosscoder.method}"),
        (config.freeze_decoder, lambda: "a frozen decoder"),
        (config.difference_weight != 0, lambda: "a difference term"),
        (config.l1_weight > 0, lambda: "a price of L1"),
        (ranks.world > 1, lambda: f"{ranks.world} processes"),
        (device.type != "cuda", lambda: f"the device {device.type}"),
        (not _has_triton(), lambda: "no Triton is installed"),
    ]
    return next((reason() for applies, reason in reasons if applies), None)


def new_step(
    kind: StepKind,
    model: BatchTopKCrosscoder,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    ranks: Ranks = ALONE,
) -> TakeStep:
    """The step of a model whose parameters and optimiser state are those to go on from.

    Raises UserError where `by-hand` is asked for and the settings have no such step.
    """
    device = model.b_dec.device
    reason = not_by_hand(model.config, config, device, ranks)
    if kind == "by-hand" and reason is not None and not _interpreted(device):
        raise UserError(f"there is no step by hand for {reason}: --step autograd, or auto")
    if kind == "autograd" or (kind == "auto" and reason is not None):
        return AutogradStep(model, optimizer, config, ranks)
    from crosscoder.training.gpu.step import GpuStep

    return GpuStep(model, optimizer, config, product_dtype(config, device))


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _interpreted(device: torch.device) -> bool:
    """Whether Triton's kernels run on the CPU, as they do to be checked."""
    import os

    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()
