"""The methods beside the BatchTopK crosscoder: each is that dictionary but for one thing.

l1               every positive latent is active; the loss has a price on values (Lindsey et al. 2024)
partition        shared latents have one decoder vector for both models, delta latents their own selection and
                 two vectors: they alone tell the models apart. After Delta-Crosscoder, arXiv 2603.04426, whose
                 code is not public; the formulation is ours
difference-sae   a BatchTopK autoencoder of x[1] - x[0], with a decoder of unit norm
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionaries.config import CrosscoderConfig, Directions
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.selection import Selection, batch_topk, smallest_positive
from finqa.runtime.errors import UserError


class L1Crosscoder(BatchTopKCrosscoder):
    """Every positive latent is active, in training and at inference; k is not used."""

    def select_batch_topk(self, values: Tensor, k: int | None = None, ranks: Ranks = ALONE) -> Selection:
        scores = values.detach() * self.selection_norms().detach()
        return Selection(values, ranks.smallest(smallest_positive(scores.flatten())))

    def groups(self) -> list[tuple[slice, int]]:
        return []

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.threshold = 0.0


class PartitionCrosscoder(BatchTopKCrosscoder):
    """Latents up to config.n_shared are shared, the others delta latents.

    The two decoder vectors of a shared latent are kept as two equal ones, so that a partition reads like any
    crosscoder; they start equal and get the same gradient. Both models have one scale (dictionaries.scaling), so what
    the shared latents add to both cancels in the difference exactly.
    """

    def select_batch_topk(self, values: Tensor, k: int | None = None, ranks: Ranks = ALONE) -> Selection:
        scores = values.detach() * self.selection_norms().detach()
        n_tokens, shared = len(values) * ranks.world, self.config.n_shared
        of_shared = batch_topk(values[:, :shared], scores[:, :shared], (k or self.config.k) * n_tokens, ranks)
        of_delta = batch_topk(values[:, shared:], scores[:, shared:], self.config.k_delta * n_tokens, ranks)
        return Selection(torch.cat([of_shared.values, of_delta.values], dim=1), of_shared.smallest_score)

    def groups(self) -> list[tuple[slice, int]]:
        shared = self.config.n_shared
        return [(slice(0, shared), self.config.k), (slice(shared, None), self.config.k_delta)]

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.threshold, self.delta_threshold = thresholds

    def latent_thresholds(self) -> Tensor:
        if self.threshold is None or self.delta_threshold is None:
            raise UserError("this crosscoder has no thresholds yet: they are set at the end of training")
        thresholds = torch.full_like(self.b_enc, self.threshold)
        thresholds[self.config.n_shared :] = self.delta_threshold
        return thresholds

    def fresh_decoder(
        self, latents: Tensor, norm: float, generator: torch.Generator | None, directions: Directions = "alike"
    ) -> Tensor:
        """Delta latents start with nothing to say about the instruct model."""
        decoder = super().fresh_decoder(latents, norm, generator, "alike")
        decoder[latents >= self.config.n_shared, 0] = 0
        return decoder

    def fresh_encoder(self, latents: Tensor, decoder: Tensor) -> Tensor:
        """Delta latents start as readers of the difference."""
        encoder = super().fresh_encoder(latents, decoder).clone()
        delta = latents >= self.config.n_shared
        encoder[0, :, delta] = -encoder[1, :, delta]
        return encoder

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """Give both copies of a shared decoder vector the gradient of the one vector that they are.

        That is the sum of the two; over sqrt(2), so that the two copies together have its length when clipped.
        """
        gradient = self.W_dec.grad
        if gradient is not None:
            shared = gradient[: self.config.n_shared]
            shared.copy_((shared.sum(dim=1, keepdim=True) / 2**0.5).expand_as(shared))


class DifferenceSAE(BatchTopKCrosscoder):
    """One input: x[1] - x[0]. Its parameters are W_enc [1, d_model, latent], W_dec [latent, 1, d_model]."""

    def inputs(self, raw: Tensor) -> Tensor:
        """[..., 2, d_model] -> [..., 1, d_model]; subtracted in the parameters' precision, not in the store's."""
        raw = super().inputs(raw)
        return raw[..., 1:, :] - raw[..., :1, :]

    def difference(self, vectors: Tensor) -> Tensor:
        return vectors[..., 0, :]

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """Take out what would change a decoder vector's length, so that Adam's moments hold directions alone."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient.sub_((gradient * self.W_dec).sum(dim=-1, keepdim=True) * self.W_dec)

    @torch.no_grad()
    def constrain(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))


CLASSES: dict[str, type[BatchTopKCrosscoder]] = {
    "batchtopk": BatchTopKCrosscoder,
    "l1": L1Crosscoder,
    "partition": PartitionCrosscoder,
    "difference-sae": DifferenceSAE,
}


def new_dictionary(
    config: CrosscoderConfig,
    decoder_norm: float = 1.0,
    generator: torch.Generator | None = None,
    directions: Directions = "alike",
) -> BatchTopKCrosscoder:
    """An untrained dictionary of the configuration's method; arguments as of BatchTopKCrosscoder."""
    return CLASSES[config.method](config, decoder_norm, generator, directions)
