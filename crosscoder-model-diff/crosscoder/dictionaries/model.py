"""The crosscoder: one dictionary of latents that reads and writes the activations of two models.

Lindsey et al. 2024 (crosscoders), Bussmann et al. 2024, arXiv 2412.06410 (BatchTopK), Minder et al. 2025,
arXiv 2504.02922 (the two together, for two models). With input x[m] of model m (0 instruct, 1 fine-tuned):

    f       = ReLU( sum_m x[m] W_enc[m] + b_enc )
    xhat[m] = (f where selected) W_dec[:, m] + b_dec[m]
    score   = f * (norm of W_dec[:, 0] + norm of W_dec[:, 1])

In training the k*B largest scores of a batch of B tokens are selected; at inference the scores above a fixed
threshold, so that samples do not influence each other. crosscoder/dictionaries/methods.py has the other methods.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from crosscoder.dictionaries.config import CrosscoderConfig, Directions
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.dictionaries.selection import Selection, batch_topk
from finqa.runtime.errors import UserError

warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)")
LARGEST_SPARSE_SHARE = 1 / 16
"""Share of values that are not 0 up to which their vectors are added up one by one. A dense product takes as long
whatever the share is: about as long at this one, ten times as long at a tenth of it on an H200, five on two cores."""


class BatchTopKCrosscoder(nn.Module):
    """A crosscoder of two models. `encode`, `decode` and `forward` work on *scaled* activations (see `scale`).

    Parameters: W_enc [2, d_model, latent], b_enc [latent], W_dec [latent, 2, d_model], b_dec [2, d_model]. Wherever a
    shape says 2, it is 1 for a difference SAE, whose one input is the difference of the models.
    """

    stages: tuple[int | None, ...] = (None,)
    """What training goes through in turn, for as many steps each; None is all of the dictionary at once."""

    def __init__(
        self,
        config: CrosscoderConfig,
        decoder_norm: float = 1.0,
        generator: torch.Generator | None = None,
        directions: Directions = "alike",
    ):
        """Random directions of length `decoder_norm`, the same for both models or apart; the encoder is their
        transpose."""
        super().__init__()
        self.config = config
        self.threshold: float | None = None
        """Score above which a latent is active at inference; a Python number, so no cast of the module rounds it.
        None until training has set it."""
        self.delta_threshold: float | None = None
        """Threshold of the delta latents of a partition; None for other methods."""
        self.further_thresholds: tuple[float, ...] = ()
        """Thresholds of a dedicated feature crosscoder's latents of the instruct and of the fine-tuned model; of a
        stagewise SAE's first stage; empty for other methods."""
        self.stage: int | None = None
        """The one of `stages` that training is in; None when it is not."""
        self.activation_scales: tuple[float, ...] = (1.0,) * config.n_inputs
        """c_m: what raw activations of model m are multiplied by before they enter."""
        self.activation_means: Tensor | None = None
        """[2, d_model], raw: taken off before scaling; None where the data are not centred."""
        self.largest_norms: tuple[float, ...] = ()
        """Norms of raw activations above which it was trained on none (SetConfig.largest_norms)."""
        everything = torch.arange(config.n_latents)
        self.W_dec = nn.Parameter(self.fresh_decoder(everything, decoder_norm, generator, directions))
        self.W_enc = nn.Parameter(self.fresh_encoder(everything, self.W_dec.detach()).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(config.n_inputs, config.d_model))

    # What goes in

    def inputs(self, raw: Tensor) -> Tensor:
        """[..., 2, d_model] raw activations -> [..., 2, d_model]: the vectors that enter, in the models' own units."""
        return raw.to(self.b_dec.dtype)

    def scale(self, raw: Tensor) -> Tensor:
        """Raw activations [..., 2, d_model] as the dictionary reads them: model m times c_m, centred where asked."""
        inputs = self.inputs(raw)
        if self.activation_means is not None:
            inputs = inputs - self.activation_means.to(inputs)
        return inputs * self._scales(inputs)

    def unscale(self, scaled: Tensor) -> Tensor:
        """What `scale` read, from its result: `inputs` again."""
        raw = scaled / self._scales(scaled)
        return raw if self.activation_means is None else raw + self.activation_means.to(raw)

    def difference(self, vectors: Tensor) -> Tensor:
        """[..., 2, d_model] in the models' own units -> [..., d_model]: fine-tuned less instruct."""
        return vectors[..., 1, :] - vectors[..., 0, :]

    # The dictionary

    def activations(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] -> [batch, latent]: every latent's value after ReLU, before any selection."""
        joint = x.reshape(-1, self.b_dec.numel())
        product = joint @ self.W_enc.reshape(self.b_dec.numel(), -1)
        return torch.relu(product.to(self.b_enc.dtype) + self.b_enc)

    def selection_norms(self) -> Tensor:
        """[latent]: what a value is multiplied by to give its score (config.score_norm)."""
        if self.config.score_norm == "none":
            return torch.ones_like(self.b_enc)
        if self.config.score_norm == "l2":
            return self.W_dec.flatten(1).norm(dim=-1)
        return self.W_dec.norm(dim=-1).sum(dim=-1)

    def select_batch_topk(self, values: Tensor, k: int | None = None, ranks: Ranks = ALONE) -> Selection:
        """Training's selection: the k * batch largest scores of [batch, latent] `values`; `k` of the configuration
        where none is given. With several processes, of the rows of all."""
        scores = values.detach() * self.selection_norms().detach()
        return batch_topk(values, scores, (k or self.config.k) * len(values) * ranks.world, ranks)

    def latent_thresholds(self) -> Tensor | float:
        """Score above which each latent is active: one for all, or [latent]."""
        if self.threshold is None:
            raise UserError("this crosscoder has no threshold yet: it is set at the end of training")
        return self.threshold

    def select_by_threshold(self, values: Tensor) -> Tensor:
        """Inference's selection: [batch, latent] `values` where the score is above the threshold, else 0."""
        return values * (values * self.selection_norms() > self.latent_thresholds())

    def encode(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] scaled activations -> [batch, latent] values of the active latents, 0 elsewhere."""
        return self.select_by_threshold(self.activations(x))

    def decode(self, f: Tensor) -> Tensor:
        """[batch, latent] -> [batch, 2, d_model], scaled."""
        return self.decode_without_bias(f) + self.b_dec

    def decode_without_bias(self, f: Tensor) -> Tensor:
        """`decode` less b_dec: what the latents alone add."""
        product = sparse_product(f, self.W_dec.reshape(self.config.n_latents, -1))
        return product.to(self.b_dec.dtype).view(-1, *self.b_dec.shape)

    def reconstruct(self, x: Tensor, f: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, 2, d_model] scaled activations -> values [batch, latent] by the threshold (`f`, where `encode` has
        given them already), and the reconstruction of `x`."""
        f = self.encode(x) if f is None else f
        return f, self.decode(f)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2, d_model] scaled activations -> their reconstruction, of the same shape, by the threshold."""
        return self.reconstruct(x)[1]

    @torch.no_grad()
    def raw_decoder(self) -> Tensor:
        """[latent, 2, d_model]: decoder vectors in the models' own units, W_dec[j, m] / c_m."""
        return self.W_dec / self._scales(self.W_dec)

    @torch.no_grad()
    def difference_decoder(self) -> Tensor:
        """[latent, d_model]: what one unit of a latent adds to fine-tuned less instruct, in the models' own units."""
        return self.difference(self.raw_decoder())

    # What each latent adds to fine-tuned less instruct: the sum over its parts of value times vector

    def parts(self, x: Tensor, f: Tensor) -> Tensor:
        """Scaled activations and their values `encode(x)` -> [batch, part, latent]: the value of each part."""
        return f[:, None]

    @torch.no_grad()
    def difference_parts(self) -> Tensor:
        """[part, latent, d_model]: the vectors that `parts` are the values of, in the models' own units."""
        return self.difference_decoder()[None]

    @torch.no_grad()
    def written_squares(self, products: Tensor) -> Tensor:
        """[latent] fp64: squared length of what each latent adds, from sums or means [part, part, latent] of the
        products of its parts' values (`products_of`)."""
        vectors = self.difference_parts().double()
        gram = torch.einsum("pjd,qjd->pqj", vectors, vectors)
        return (products.to(gram) * gram).sum(dim=(0, 1)).clamp_min(0)

    @torch.no_grad()
    def only(self, latents: Sequence[int]) -> BatchTopKCrosscoder:
        """These latents alone, to be read at inference: there each is selected by itself, so `encode` and `parts` give
        what they give of the whole dictionary, for less. It cannot be trained, saved or asked for its groups."""
        at = torch.tensor(latents, dtype=torch.int64, device=self.b_dec.device)
        norms, thresholds = self.selection_norms()[at], self.latent_thresholds()
        chosen = thresholds[at] if isinstance(thresholds, Tensor) else thresholds
        made = copy.copy(self)
        made._parameters = {
            name: p if name == "b_dec" else nn.Parameter(p[..., at] if name != "W_dec" else p[at], False)
            for name, p in self._parameters.items()
            if p is not None
        }
        setattr(made, "selection_norms", lambda: norms)  # noqa: B010
        setattr(made, "latent_thresholds", lambda: chosen)  # noqa: B010
        return made

    # What training asks of a method

    @property
    def encoder_bias(self) -> nn.Parameter:
        """[latent]: the encoder's bias that is being trained."""
        return self.b_enc

    @torch.no_grad()
    def enter_stage(self, stage: int | None) -> None:
        """Begin one of `stages`, with what those before it have left."""
        self.stage = stage

    def groups(self, k: int | None = None) -> list[tuple[slice, float]]:
        """The latents that are selected among themselves, and the mean number of active ones a token; with `k` in
        place of the configuration's."""
        return [(slice(None), k or self.config.k)]

    def set_thresholds(self, thresholds: list[float]) -> None:
        """One for each of `groups`."""
        self.threshold = thresholds[0]

    def fresh_decoder(
        self, latents: Tensor, norm: float, generator: torch.Generator | None, directions: Directions = "alike"
    ) -> Tensor:
        """[n, 2, d_model], on the CPU: random decoder vectors of length `norm` for the latents of these numbers."""
        n, d_model = len(latents), self.config.d_model
        if directions == "apart":
            drawn = random_directions(n * self.config.n_inputs, d_model, norm, generator)
            return drawn.view(n, self.config.n_inputs, d_model)
        drawn = random_directions(n, d_model, norm, generator)
        return drawn[:, None, :].repeat(1, self.config.n_inputs, 1)

    def fresh_encoder(self, latents: Tensor, decoder: Tensor) -> Tensor:
        """[2, d_model, n]: the encoder vectors that latents of these numbers start with beside such a decoder."""
        return decoder.permute(1, 2, 0)

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """Called between the backward pass and clipping."""

    @torch.no_grad()
    def constrain(self) -> None:
        """Called after each step of the optimiser."""

    def _scales(self, like: Tensor) -> Tensor:
        return _column(self.activation_scales, self.b_dec.dtype, like.device)


@lru_cache(maxsize=16)
def _column(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(scales), 1]; kept, since making it is a copy to the GPU, for which every step would wait."""
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype, device=device).unsqueeze(-1)


def sparse_product(f: Tensor, vectors: Tensor) -> Tensor:
    """[n, m] `f` @ [m, width] `vectors`. Where no gradient is kept and few values of `f` are not 0, the vectors of
    these alone are added up, which waits for the device (not on a Mac's GPU, which may lack what it takes)."""
    if torch.is_grad_enabled() or f.is_mps or f.count_nonzero() > LARGEST_SPARSE_SHARE * f.numel():
        return f @ vectors
    rows, columns = places = f.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(f) + 1, device=f.device))
    if f.is_cuda:  # where it takes a quarter of the time; on a CPU twice as long
        return torch.sparse_csr_tensor(starts, columns, f[places], f.shape, check_invariants=False) @ vectors
    return embedding_bag(columns, vectors, starts, mode="sum", per_sample_weights=f[places], include_last_offset=True)


def products_of(parts: Tensor) -> Tensor:
    """[batch, part, latent] -> [part, part, latent] fp64: products of the parts' values, summed over the batch."""
    rows = [torch.stack([(a * b).sum(dim=0, dtype=torch.float64) for b in parts.unbind(1)]) for a in parts.unbind(1)]
    return torch.stack(rows)


def random_directions(n: int, d_model: int, norm: float, generator: torch.Generator | None) -> Tensor:
    """[n, d_model]: directions drawn uniformly, of length `norm`."""
    directions = torch.randn(n, d_model, generator=generator)
    return norm * directions / directions.norm(dim=-1, keepdim=True)
