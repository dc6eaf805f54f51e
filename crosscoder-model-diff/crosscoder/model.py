"""The BatchTopK crosscoder: one dictionary of latents that reads and writes the activations of two models.

Lindsey et al. 2024 (crosscoders), Bussmann et al. 2024, arXiv 2412.06410 (BatchTopK), Minder et al. 2025,
arXiv 2504.02922 (the two together, for two models). With input x[m] of model m (0 instruct, 1 fine-tuned):

    f       = ReLU( sum_m x[m] W_enc[m] + b_enc )
    xhat[m] = (f where selected) W_dec[:, m] + b_dec[m]
    score   = f * (norm of W_dec[:, 0] + norm of W_dec[:, 1])

In training the k*B largest scores of a batch of B tokens are selected; at inference the scores above a fixed
threshold, so that samples do not influence each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crosscoder.config import N_MODELS, CrosscoderConfig
from finqa.errors import UserError


class Selection(NamedTuple):
    """What batch top-k kept."""

    values: Tensor
    """[batch, latent]: the unscaled value where kept, 0 elsewhere; gradients flow to the kept values alone."""
    smallest_score: Tensor
    """[]: smallest positive score that was kept; infinity where none was positive."""


def batch_topk(values: Tensor, scores: Tensor, n_keep: int) -> Selection:
    """Keep the values of the `n_keep` largest scores of the whole batch; of equal scores exactly so many.

    `values` and `scores` are [batch, latent], scores without gradient.
    """
    top = torch.topk(scores.flatten(), min(n_keep, scores.numel()), sorted=False)
    kept = torch.zeros_like(values).flatten().scatter(0, top.indices, values.flatten()[top.indices])
    smallest = torch.where(top.values > 0, top.values, torch.inf).min()
    return Selection(kept.view_as(values), smallest)


class BatchTopKCrosscoder(nn.Module):
    """A crosscoder of two models. `encode`, `decode` and `forward` work on *scaled* activations (see `scale`).

    Parameters: W_enc [2, d_model, latent], b_enc [latent], W_dec [latent, 2, d_model], b_dec [2, d_model].
    """

    def __init__(self, config: CrosscoderConfig, decoder_norm: float = 1.0, generator: torch.Generator | None = None):
        """Random directions of length `decoder_norm`, the same for both models; the encoder is their transpose."""
        super().__init__()
        self.config = config
        self.threshold: float | None = None
        """Score above which a latent is active at inference; a Python number, so no cast of the module rounds it.
        None until training has set it."""
        self.activation_scales: tuple[float, float] = (1.0, 1.0)
        """c_m: what raw activations of model m are multiplied by before they enter."""
        directions = random_directions(config.n_latents, config.d_model, decoder_norm, generator)
        self.W_dec = nn.Parameter(directions[:, None, :].repeat(1, N_MODELS, 1))
        self.W_enc = nn.Parameter(self.W_dec.detach().permute(1, 2, 0).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(N_MODELS, config.d_model))

    def scale(self, raw: Tensor) -> Tensor:
        """Raw activations [..., 2, d_model] as the crosscoder reads them: model m times c_m."""
        return raw.to(self.b_dec.dtype) * self._scales(raw.device)

    def unscale(self, scaled: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return scaled / self._scales(scaled.device)

    def activations(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] -> [batch, latent]: every latent's value after ReLU, before any selection."""
        joint = x.reshape(-1, N_MODELS * self.config.d_model)
        product = joint @ self.W_enc.reshape(N_MODELS * self.config.d_model, -1)
        return torch.relu(product.to(self.b_enc.dtype) + self.b_enc)

    def selection_norms(self) -> Tensor:
        """[latent]: what a value is multiplied by to give its score (config.score_norm)."""
        if self.config.score_norm == "l2":
            return self.W_dec.flatten(1).norm(dim=-1)
        return self.W_dec.norm(dim=-1).sum(dim=-1)

    def select_batch_topk(self, values: Tensor) -> Selection:
        """Training's selection: the k * batch largest scores of [batch, latent] `values`."""
        scores = values.detach() * self.selection_norms().detach()
        return batch_topk(values, scores, self.config.k * len(values))

    def select_by_threshold(self, values: Tensor) -> Tensor:
        """Inference's selection: [batch, latent] `values` where the score is above the threshold, else 0."""
        if self.threshold is None:
            raise UserError("this crosscoder has no threshold yet: it is set at the end of training")
        return values * (values * self.selection_norms() > self.threshold)

    def encode(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] scaled activations -> [batch, latent] values of the active latents, 0 elsewhere."""
        return self.select_by_threshold(self.activations(x))

    def decode(self, f: Tensor) -> Tensor:
        """[batch, latent] -> [batch, 2, d_model], scaled."""
        return self.decode_without_bias(f) + self.b_dec

    def decode_without_bias(self, f: Tensor) -> Tensor:
        """`decode` less b_dec: what the latents alone add."""
        product = f @ self.W_dec.reshape(self.config.n_latents, -1)
        return product.to(self.b_dec.dtype).view(-1, N_MODELS, self.config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] scaled activations -> their reconstruction, of the same shape, by the threshold."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def raw_decoder(self) -> Tensor:
        """[latent, 2, d_model]: decoder vectors in the models' own units, W_dec[j, m] / c_m."""
        return self.unscale(self.W_dec)

    def save_pretrained(self, folder: Path | str, **about: object) -> Path:
        """Write model.safetensors and config.json (shape, scales, threshold; `about` holds further JSON sections)."""
        from crosscoder.checkpoint import save_model

        return save_model(self, Path(folder), about)

    @classmethod
    def from_pretrained(cls, name: Path | str, revision: str | None = None) -> BatchTopKCrosscoder:
        """Load from a local folder, or from the Hub where no such folder is. On the CPU, in fp32."""
        from crosscoder.checkpoint import load_model

        return load_model(name, revision)

    def _scales(self, device: torch.device) -> Tensor:
        return torch.tensor(self.activation_scales, dtype=self.b_dec.dtype, device=device).unsqueeze(-1)


def random_directions(n: int, d_model: int, norm: float, generator: torch.Generator | None) -> Tensor:
    """[n, d_model]: directions drawn uniformly, of length `norm`."""
    directions = torch.randn(n, d_model, generator=generator)
    return norm * directions / directions.norm(dim=-1, keepdim=True)
