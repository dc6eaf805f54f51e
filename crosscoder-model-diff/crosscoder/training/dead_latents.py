"""Which latents are dead, counted in tokens, and resampling of those that can never learn."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionaries.config import TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder

FRESH_ENCODER_SCALE = 0.2
"""Length of a resampled latent's encoder over its decoder's, so that its first scores push no working latent out."""


class DeadLatents:
    """Tokens since each latent was last selected, and since it was last positive at all.

    Both matter: values are taken after ReLU, so a latent that is positive for no token gets no gradient from any
    loss, the auxiliary one included.
    """

    def __init__(self, n_latents: int, window: int, device: torch.device):
        """A latent is dead after `window` tokens without a selection."""
        self.window = window
        self.since_selected = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.since_positive = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, positive: Tensor, selected: Tensor, n_tokens: int) -> None:
        """Count one training batch of `n_tokens` tokens. [latent] masks: positive after ReLU, and kept, for some."""
        self.since_selected = torch.where(selected, 0, self.since_selected + n_tokens)
        self.since_positive = torch.where(positive, 0, self.since_positive + n_tokens)

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
def resample_latents(
    model: BatchTopKCrosscoder,
    optimizer: torch.optim.Optimizer,
    latents: Tensor,
    mean_x: Tensor,
    config: TrainingConfig,
    generator: torch.Generator,
) -> int:
    """Give the masked latents the directions that a new dictionary would have, and no optimiser history.

    The encoder's bias is set so that the resampled latent's pre-activation is 0 for `mean_x` [2, d_model], the batch's
    mean input (of one model in a stage that reads one): it is positive for about half of the tokens whatever the mean
    activation is. A frozen decoder's vectors stay, and the encoder's begin anew beside them. Returns how many were
    resampled.
    """
    which = latents.nonzero().squeeze(-1)
    if not len(which):
        return 0
    numbers = which.cpu()
    if config.freeze_decoder:
        decoder = model.W_dec[which].cpu()
    else:
        decoder = model.fresh_decoder(numbers, config.decoder_norm, generator, config.directions)
        model.W_dec[which] = decoder.to(which.device)
    encoder = (FRESH_ENCODER_SCALE * model.fresh_encoder(numbers, decoder)).to(which.device)
    model.W_enc[:, :, which] = encoder
    model.encoder_bias[which] = -(mean_x.flatten() @ encoder[: len(mean_x)].flatten(0, 1))
    for parameter, rows in ((model.W_dec, (which,)), (model.W_enc, (..., which)), (model.encoder_bias, (which,))):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                optimizer.state[parameter][name][rows] = 0
    return len(which)
