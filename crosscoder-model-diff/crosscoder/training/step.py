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
        parts, alive, n_active = self._of_all(
            torch.stack(terms[:5]), torch.stack(((terms.values.detach() > 0).any(dim=0), active.any(dim=0))), active
        )
        for gradient, sent in self._sent:
            sent.wait()
            gradient.div_(self.ranks.world)
        self._sent.clear()
        self.model.correct_gradients()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.model.constrain()
        return Step(
            parts=parts,
            gradient_norm=gradient_norm,
            smallest_score=terms.selection.smallest_score,
            positive=alive[0],
            selected=alive[1],
            n_active=n_active,
            x=x,
            error=terms.xhat.detach() - x,
        )

    def _send(self, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        self._sent.append((parameter.grad, self.ranks.begin_sum(parameter.grad)))

    def _of_all(self, parts: Tensor, alive: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What Step says of the batch, exchanged as one: the mean of the `parts` [5], whether a latent is `alive`
        [2, latent] in some process, and how many of all pairs are `active`."""
        parts, n_active = parts.detach().float(), active.sum()
        if self.ranks.world == 1:
            return parts, alive, n_active
        summed = self.ranks.sum(torch.cat((parts, n_active[None].float(), alive.flatten().float())))
        return summed[:5] / self.ranks.world, summed[6:].view_as(alive) > 0, summed[5]

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
