"""One training step: forward, backward, Adam. Through autograd for every method and device, by hand on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from crosscoder.dictionaries.config import TrainingConfig
from crosscoder.dictionaries.losses import Weights, objective
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks

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


def of_whole_batch(step: Step, ranks: Ranks) -> Step:
    """The step of the whole batch from that of each process's rows, exchanged as one message: the mean of `parts`,
    what is `positive` or `selected` in some process, and the sum of `n_active`. All else is the same in all of them,
    or of one's own rows."""
    if ranks.world == 1:
        return step
    own = (step.parts, step.n_active[None], step.positive, step.selected)
    summed = ranks.sum(torch.cat([tensor.float() for tensor in own]))
    parts, n_active, positive, selected = summed.split([len(tensor) for tensor in own])
    return step._replace(parts=parts / ranks.world, n_active=n_active[0], positive=positive > 0, selected=selected > 0)


class AutogradStep:
    """The loss of losses.py, its gradients by autograd, the optimiser as it is.

    With several processes a gradient is on its way to the others while the next one is computed.
    """

    def __init__(
        self,
        model: BatchTopKCrosscoder,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
    ):
        self.model, self.optimizer, self.config, self.ranks = model, optimizer, config, ranks
        self._sent: list[tuple[Tensor, Any]] = []
        for parameter in model.parameters() if ranks.world > 1 else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._send)

    def __call__(self, raw: Tensor, learning_rate: float, weights: Weights, dead: Tensor) -> Step:
        """Take one step on [batch, 2, d_model] activations as the models gave them; `dead` is the [latent] mask of the
        auxiliary loss."""
        x = self.model.scale(raw)
        with self._products(raw.device):
            terms = objective(self.model, x, self.config, weights, dead, self.ranks)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        active = terms.selection.values.detach() > 0
        for gradient, sent in self._sent:
            sent.wait()
            gradient.div_(self.ranks.world)
        self._sent.clear()
        self.model.correct_gradients()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.model.constrain()
        step = Step(
            parts=torch.stack(terms[:5]).detach().float(),
            gradient_norm=gradient_norm,
            smallest_score=terms.selection.smallest_score,
            positive=(terms.values.detach() > 0).any(dim=0),
            selected=active.any(dim=0),
            n_active=active.sum(),
            x=x,
            error=terms.xhat.detach() - x,
        )
        return of_whole_batch(step, self.ranks)

    def _send(self, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        self._sent.append((parameter.grad, self.ranks.begin_sum(parameter.grad)))

    def gather(self) -> None:
        """To be called by all processes before the model or its optimiser is read; here every one has all of both."""

    def refresh(self) -> None:
        """To be called after weights were changed from outside; here the model is all there is."""

    def _products(self, device: torch.device) -> AbstractContextManager[Any]:
        if product_dtype(self.config, device) == torch.bfloat16:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


def product_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products; parameters and optimiser are fp32."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32
