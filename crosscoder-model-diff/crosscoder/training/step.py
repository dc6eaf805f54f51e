"""One training step: forward, backward, Adam. Through autograd for every method and device, by hand on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.objective import Weights, objective
from crosscoder.training.ranks import ALONE, Ranks
from finqa.runtime.errors import UserError

StepKind = Literal["auto", "autograd", "by-hand"]
"""`auto` is by hand where that does what the settings ask."""


class Step(NamedTuple):
    """What a step leaves for the log, the threshold and the counts of live latents. Nothing of it has been waited for.

    With several processes what is of the batch is of the whole batch, the same in all of them.
    """

    parts: Tensor
    """[5] fp32: loss, then reconstruction, difference, L1 and auxiliary loss before their weights."""
    gradient_norm: Tensor
    """[]: over all parameters, before clipping."""
    smallest_score: Tensor
    """[]: smallest positive score that was kept; infinity where none was."""
    positive: Tensor
    """[latent] bool: positive before the selection for a token of the batch."""
    selected: Tensor
    """[latent] bool: active for a token of the batch."""
    n_active: Tensor
    """[]: pairs of token and latent that are active."""
    x: Tensor
    """[batch, 2, d_model]: this process's rows, scaled."""
    error: Tensor
    """[batch, 2, d_model]: their reconstruction less `x`."""


class TakeStep(Protocol):
    """Takes one step of the model and the optimiser that it was made for."""

    def __call__(self, raw: Tensor, learning_rate: float, weights: Weights, dead: Tensor) -> Step:
        """On [batch, 2, d_model] activations as the models gave them; `dead` is the [latent] mask of the auxiliary
        loss."""
        ...

    def refresh(self) -> None:
        """To be called after weights were changed from outside."""
        ...


class AutogradStep:
    """The loss of objective.py, its gradients by autograd, the optimiser as it is."""

    def __init__(
        self,
        model: BatchTopKCrosscoder,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
    ):
        self.model, self.optimizer, self.config, self.ranks = model, optimizer, config, ranks

    def __call__(self, raw: Tensor, learning_rate: float, weights: Weights, dead: Tensor) -> Step:
        x = self.model.scale(raw)
        with self._products(raw.device):
            terms = objective(self.model, x, self.config, weights, dead, self.ranks)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        self.ranks.mean_gradients(self.model.parameters())
        self.model.correct_gradients()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.model.constrain()
        active = terms.selection.values.detach() > 0
        return Step(
            parts=self.ranks.mean(torch.stack(terms[:5]).detach().float()),
            gradient_norm=gradient_norm,
            smallest_score=terms.selection.smallest_score,
            positive=self.ranks.any((terms.values.detach() > 0).any(dim=0)),
            selected=self.ranks.any(active.any(dim=0)),
            n_active=self.ranks.sum(active.sum()),
            x=x,
            error=terms.xhat.detach() - x,
        )

    def refresh(self) -> None:
        """The optimiser and the model are all there is."""

    def _products(self, device: torch.device) -> AbstractContextManager[Any]:
        if product_dtype(self.config, device) == torch.bfloat16:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


def product_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Of the matrix products; parameters and optimiser are fp32."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def not_by_hand(
    crosscoder: CrosscoderConfig, config: TrainingConfig, device: torch.device, ranks: Ranks = ALONE
) -> str | None:
    """Why these settings have no step by hand; None where they have."""
    reasons: list[tuple[bool, Callable[[], str]]] = [
        (crosscoder.method != "batchtopk", lambda: f"method {crosscoder.method}"),
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
