"""The methods beside the BatchTopK crosscoder: each is that dictionary but for one thing.

l1               every positive latent is active; the loss has an L1 penalty (Lindsey et al. 2024)
partition        shared latents have one decoder vector for both models, delta latents their own selection and
                 two vectors: they alone tell the models apart. After Delta-Crosscoder, arXiv 2603.04426, whose
                 code is not public; the formulation is ours
dedicated        shared latents, and latents that are reserved for either model: they neither read nor write the other.
                 Shared ones and those of each model are selected apart, each with its share of k. After the dedicated
                 feature crosscoder, arXiv 2602.11729, whose code is not public; the formulation is ours
difference-sae   a BatchTopK autoencoder of x[1] - x[0], with a decoder of unit norm
stagewise-sae    a BatchTopK autoencoder of x[0] that is then trained on with x[1]: latents are compared by how far they
                 turned (after stage-wise model diffing, Bricken et al. 2024)
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.dictionaries.config import CrosscoderConfig, Directions
from crosscoder.dictionaries.model import BatchTopKCrosscoder, sparse_product
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.selection import Selection, batch_topk, smallest_positive
from finqa.runtime.errors import UserError


class L1Crosscoder(BatchTopKCrosscoder):
    """Every positive latent is active, in training and at inference; k is not used."""

    def select_batch_topk(self, values: Tensor, k: int | None = None, ranks: Ranks = ALONE) -> Selection:
        scores = values.detach() * self.selection_norms().detach()
        return Selection(values, ranks.smallest(smallest_positive(scores.flatten())))

    def groups(self, k: int | None = None) -> list[tuple[slice, float]]:
        return []

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.threshold = 0.0


class GroupedCrosscoder(BatchTopKCrosscoder):
    """The `groups` of latents are selected each by itself, and have a threshold each."""

    def select_batch_topk(self, values: Tensor, k: int | None = None, ranks: Ranks = ALONE) -> Selection:
        scores = values.detach() * self.selection_norms().detach()
        n_tokens = len(values) * ranks.world
        of = [batch_topk(values[:, its], scores[:, its], round(k * n_tokens), ranks) for its, k in self.groups(k)]
        return Selection(torch.cat([each.values for each in of], dim=1), of[0].smallest_score)

    def thresholds(self) -> tuple[float | None, ...]:
        """One for each of `groups`, where training has set them."""
        return self.threshold, *self.further_thresholds

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.threshold, *further = thresholds
        self.further_thresholds = tuple(further)

    def latent_thresholds(self) -> Tensor:
        found = torch.empty_like(self.b_enc)
        groups, thresholds = self.groups(), [each for each in self.thresholds() if each is not None]
        if len(thresholds) != len(groups):
            raise UserError("this crosscoder has no thresholds yet: they are set at the end of training")
        for (its, _), threshold in zip(groups, thresholds, strict=True):
            found[its] = threshold
        return found


class PartitionCrosscoder(GroupedCrosscoder):
    """Latents up to config.n_shared are shared, the others delta latents.

    The two decoder vectors of a shared latent are kept as two equal ones, so that a partition reads like any
    crosscoder; they start equal and get the same gradient. Both models have one scale (dictionaries.scaling), so what
    the shared latents add to both cancels in the difference exactly.
    """

    def groups(self, k: int | None = None) -> list[tuple[slice, float]]:
        shared = self.config.n_shared
        return [(slice(0, shared), k or self.config.k), (slice(shared, None), self.config.k_delta)]

    def thresholds(self) -> tuple[float | None, ...]:
        return self.threshold, self.delta_threshold

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.threshold, self.delta_threshold = thresholds

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


class DedicatedCrosscoder(GroupedCrosscoder):
    """Latents up to config.n_shared are shared; then come those of the instruct, then those of the fine-tuned model.

    What a reserved latent has for the other model, in encoder and decoder, is 0 from the start and gets no gradient, so
    Adam never moves it.
    """

    def groups(self, k: int | None = None) -> list[tuple[slice, float]]:
        k, share, shared = k or self.config.k, self.config.reserved_share, self.config.n_shared
        return [(slice(0, shared), (1 - 2 * share) * k), *((its, share * k) for its, _ in self.reserved())]

    def reserved(self) -> list[tuple[slice, int]]:
        """The latents of the instruct and of the fine-tuned model, with the number of the model that they do not have
        to do with."""
        shared, n = self.config.n_shared, self.config.n_reserved
        return [(slice(shared, shared + n), 1), (slice(shared + n, None), 0)]

    def fresh_decoder(
        self, latents: Tensor, norm: float, generator: torch.Generator | None, directions: Directions = "alike"
    ) -> Tensor:
        decoder = super().fresh_decoder(latents, norm, generator, directions)
        for its, other in self.reserved():
            decoder[torch.isin(latents, torch.arange(self.config.n_latents)[its]), other] = 0
        return decoder

    @torch.no_grad()
    def correct_gradients(self) -> None:
        for its, other in self.reserved():
            if self.W_dec.grad is not None:
                self.W_dec.grad[its, other] = 0
            if self.W_enc.grad is not None:
                self.W_enc.grad[other, :, its] = 0


class UnitNormSAE(BatchTopKCrosscoder):
    """A decoder of unit norm."""

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """Take out what would change a decoder vector's length, so that Adam's moments hold directions alone."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient.sub_((gradient * self.W_dec).sum(dim=-1, keepdim=True) * self.W_dec)

    @torch.no_grad()
    def constrain(self) -> None:
        if self.W_dec.requires_grad:
            trained = self.W_dec if self.stage is None else self.W_dec[:, self.stage : self.stage + 1]
            trained.div_(trained.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(trained.dtype).tiny))


class DifferenceSAE(UnitNormSAE):
    """One input: x[1] - x[0]. Its parameters are W_enc [1, d_model, latent], W_dec [latent, 1, d_model]."""

    def inputs(self, raw: Tensor) -> Tensor:
        """[..., 2, d_model] -> [..., 1, d_model]; subtracted in the parameters' precision, not in the store's."""
        raw = super().inputs(raw)
        return raw[..., 1:, :] - raw[..., :1, :]

    def difference(self, vectors: Tensor) -> Tensor:
        return vectors[..., 0, :]


class StagewiseSAE(UnitNormSAE):
    """An autoencoder of the instruct model (index 0 of every parameter), and what it became when it was trained on with
    the fine-tuned one (index 1).

    A latent's value, as `encode` gives it, is the second one's on x[1]. Reconstructions, and what a latent adds to the
    difference of the models, are of both: f[1] W_dec[:, 1] - f[0] W_dec[:, 0], with f[0] the first one's value on
    x[0] by its own threshold. Both models have one scale, else a latent would change where nothing was trained.
    """

    stages = (0, 1)

    def __init__(
        self,
        config: CrosscoderConfig,
        decoder_norm: float = 1.0,
        generator: torch.Generator | None = None,
        directions: Directions = "alike",
    ):
        super().__init__(config, decoder_norm, generator, directions)
        self.b_enc_before = torch.nn.Parameter(torch.zeros_like(self.b_enc))
        """The first one's b_enc."""

    @property
    def encoder_bias(self) -> torch.nn.Parameter:
        return self.b_enc_before if self.stage == 0 else self.b_enc

    @torch.no_grad()
    def enter_stage(self, stage: int | None) -> None:
        self.stage = stage
        if stage == 1:
            self.W_enc[1], self.W_dec[:, 1], self.b_dec[1] = self.W_enc[0], self.W_dec[:, 0], self.b_dec[0]
            self.b_enc.copy_(self.b_enc_before)

    def scale(self, raw: Tensor) -> Tensor:
        """In training [..., 1, d_model]: the model of the stage."""
        scaled = super().scale(raw)
        return scaled if self.stage is None else scaled[..., self.stage : self.stage + 1, :]

    def activations(self, x: Tensor) -> Tensor:
        product = x[:, -1] @ self.W_enc[1 if self.stage is None else self.stage]
        return torch.relu(product.to(self.b_enc.dtype) + self.encoder_bias)

    def selection_norms(self) -> Tensor:
        """1, as the decoder has unit norm."""
        return torch.ones_like(self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        decoded = self.decode_without_bias(f)
        return decoded + (self.b_dec if self.stage is None else self.b_dec[self.stage])

    def decode_without_bias(self, f: Tensor) -> Tensor:
        if self.stage is None:
            return super().decode_without_bias(f)
        return (f @ self.W_dec[:, self.stage]).to(self.b_dec.dtype)[:, None]

    def encode_before(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] -> [batch, latent]: values of the instruct model's autoencoder, by its threshold."""
        if not self.further_thresholds:
            raise UserError("this crosscoder has no thresholds yet: they are set at the end of training")
        values = torch.relu(x[:, 0] @ self.W_enc[0] + self.b_enc_before)
        return values * (values > self.further_thresholds[0])

    def reconstruct(self, x: Tensor, f: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.encode(x) if f is None else f
        decoded = [sparse_product(of, self.W_dec[:, m]) for m, of in enumerate((self.encode_before(x), f))]
        return f, torch.stack(decoded, dim=1) + self.b_dec

    def parts(self, x: Tensor, f: Tensor) -> Tensor:
        return torch.stack([f, self.encode_before(x)], dim=1)

    @torch.no_grad()
    def difference_parts(self) -> Tensor:
        before, after = self.raw_decoder().unbind(dim=1)
        return torch.stack([after, -before])

    def set_thresholds(self, thresholds: list[float]) -> None:
        """Set the threshold of the stage that training is in."""
        if self.stage == 0:
            self.further_thresholds = (thresholds[0],)
        else:
            self.threshold = thresholds[0]

    @torch.no_grad()
    def change(self) -> Tensor:
        """[latent], on the CPU: how far a latent turned in the second stage, from 0 (not at all) to 2 (about face): 1
        less the mean of two cosines, of its encoder and of its decoder vector before and after."""
        of = [(self.W_enc[0].T, self.W_enc[1].T), tuple(self.W_dec.unbind(dim=1))]
        cosines = [torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1) for before, after in of]
        return (1 - (cosines[0] + cosines[1]) / 2).cpu()


CLASSES: dict[str, type[BatchTopKCrosscoder]] = {
    "batchtopk": BatchTopKCrosscoder,
    "l1": L1Crosscoder,
    "partition": PartitionCrosscoder,
    "dedicated": DedicatedCrosscoder,
    "difference-sae": DifferenceSAE,
    "stagewise-sae": StagewiseSAE,
}


def new_dictionary(
    config: CrosscoderConfig,
    decoder_norm: float = 1.0,
    generator: torch.Generator | None = None,
    directions: Directions = "alike",
) -> BatchTopKCrosscoder:
    """An untrained dictionary of the configuration's method; arguments as of BatchTopKCrosscoder."""
    return CLASSES[config.method](config, decoder_norm, generator, directions)
