"""Which latents are alive: counts in tokens, and drawing anew those that can never learn."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.model import BatchTopKCrosscoder, random_directions

FRESH_ENCODER_SCALE = 0.2
"""Of a fresh latent's encoder to its decoder, so that its first scores do not push working latents out."""


class Liveness:
    """Tokens since each latent was last selected, and since it was last positive at all.

    Both matter: values are taken after ReLU, so a latent that is positive for no token gets no gradient from any
    loss, the auxiliary one included.
    """

    def __init__(self, n_latents: int, window: int, device: torch.device):
        """A latent is dead after `window` tokens without a selection."""
        self.window = window
        self.since_selected = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.since_positive = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, values: Tensor, selected: Tensor) -> None:
        """Count one training batch: [batch, latent] values after ReLU, and those that were kept."""
        n_tokens = len(values)
        self.since_selected = torch.where((selected > 0).any(dim=0), 0, self.since_selected + n_tokens)
        self.since_positive = torch.where((values > 0).any(dim=0), 0, self.since_positive + n_tokens)

    @property
    def dead(self) -> Tensor:
        """[latent] mask: not selected for a window of tokens."""
        return self.since_selected >= self.window

    @property
    def never_positive(self) -> Tensor:
        """[latent] mask: not positive for a window of tokens."""
        return self.since_positive >= self.window

    def reset(self, latents: Tensor) -> None:
        """Begin the counts of the masked latents anew."""
        self.since_selected[latents] = 0
        self.since_positive[latents] = 0


@torch.no_grad()
def draw_anew(
    model: BatchTopKCrosscoder,
    optimizer: torch.optim.Optimizer,
    latents: Tensor,
    x: Tensor,
    decoder_norm: float,
    generator: torch.Generator,
) -> int:
    """Give the masked latents fresh directions, the same for both models, and no optimiser history.

    The encoder's bias is set so that the fresh latent's mean pre-activation over `x` [batch, 2, d_model] is 0: it is
    positive for about half of the tokens whatever the mean activation is. Returns how many were drawn.
    """
    which = latents.nonzero().squeeze(-1)
    if not len(which):
        return 0
    directions = random_directions(len(which), model.config.d_model, decoder_norm, generator).to(x.device)
    encoder = FRESH_ENCODER_SCALE * directions.T
    model.W_dec[which] = directions[:, None, :].repeat(1, 2, 1)
    model.W_enc[:, :, which] = encoder
    model.b_enc[which] = -(x.sum(dim=1).mean(dim=0) @ encoder)
    for parameter, rows in ((model.W_dec, (which,)), (model.W_enc, (..., which)), (model.b_enc, (which,))):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                optimizer.state[parameter][name][rows] = 0
    return len(which)
