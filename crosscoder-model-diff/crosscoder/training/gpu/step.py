"""A training step of the BatchTopK crosscoder on a GPU, its gradients written by hand.

The same step as training/step.py takes through autograd. What makes it fast: one dense product (the encoder), all
else on the active pairs of token and latent; weights as fp32 masters with bf16 copies for the products, both written
by one pass of Adam; what is waited for is done by then, so that the GPU always has work.

The encoder is held transposed, [latent, 2 * d_model], like the decoder: the model's W_enc becomes a view of that.

Several processes have equal shares of the rows and hold all parameters. They select among the rows of all, and take the
step of the whole batch, each the same one. Sums over them are asked for without waiting, and those of the gradients, in
the dtype of the products, are on their way while the next ones are computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
from torch import Tensor

from crosscoder.dictionaries.config import N_MODELS, TrainingConfig
from crosscoder.dictionaries.losses import Weights, auxiliary_latents
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.training.gpu import kernels
from crosscoder.training.gpu.pairs import Pairs, latents_first, starts_of, sum_of_squares
from crosscoder.training.gpu.selection import Selection, Selector
from crosscoder.training.step import Step, of_whole_batch

RANGES = 4
"""Ranges of latents whose gradients are summed over several processes one after the other."""
SMALLEST_SQUARE = 1e-30
"""Smallest square of an error's length, which is divided by."""
ALIGNED = 64
"""Rows that dead latents are filled up to: products of odd sizes take four times as long."""
ROUNDING = 1e-5
"""Rounding of a difference of sums in fp32, relative to them."""
CLIP_EPSILON = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


class GpuStep:
    """Steps of one model and one optimiser.

    Args:
        model: On the GPU, fp32.
        optimizer: torch Adam over the model's parameters. Moments live in its state, where checkpoints find them;
            the biases are updated by it.
        config: Of it the reconstruction loss, the auxiliary loss and clipping are read.
        product_dtype: Of the copies that the products read, and of the gradients of the weights.
        ranks: The processes that train the model together; all take every step.
    """

    def __init__(
        self,
        model: BatchTopKCrosscoder,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        product_dtype: torch.dtype = torch.bfloat16,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.optimizer, self.config, self.ranks = model, optimizer, config, ranks
        self.n_latents = model.config.n_latents
        self.width = N_MODELS * model.config.d_model
        device = model.b_dec.device
        self.decoder = model.W_dec.data.view(self.n_latents, self.width)
        self.encoder = latents_first(model.W_enc.data).contiguous()
        model.W_enc.data = self.encoder.t().view(model.W_enc.shape)
        self.moments = {
            "encoder": self._moments(model.W_enc, transposed=True),
            "decoder": self._moments(model.W_dec, transposed=False),
        }
        self.decoder_copy, self.encoder_copy = self.decoder.to(product_dtype), self.encoder.to(product_dtype)
        self.decoder_gradient = torch.empty_like(self.decoder_copy)
        self.encoder_gradient = torch.empty_like(self.encoder_copy)
        self.norms = torch.empty((self.n_latents, N_MODELS), device=device)
        self.unused_norms = torch.empty_like(self.norms)
        self.selector = Selector(model.b_enc, ranks)
        n_rows = -(-self.n_latents // (RANGES if ranks.world > 1 else 1))
        self.ranges = [(at, min(at + n_rows, self.n_latents)) for at in range(0, self.n_latents, n_rows)]
        self._sent: list[Any] = []
        self.steps = int(self.moments["decoder"][2])
        self.refresh()

    def refresh(self) -> None:
        """Take over weights that were changed from outside: fresh latents, a resumed run."""
        self.decoder_copy.copy_(self.decoder)
        self.encoder_copy.copy_(self.encoder)
        self.norms.copy_(self.decoder.view(self.n_latents, N_MODELS, -1).norm(dim=-1))
        self.selector.forget()

    @torch.no_grad()
    def __call__(self, raw: Tensor, learning_rate: float, weights: Weights, dead: Tensor) -> Step:
        """Take one step; arguments as of AutogradStep."""
        batch = len(raw)
        # Waited for before anything of this step is asked of the GPU: the product behind it is long enough to catch up.
        candidates = dead.nonzero().squeeze(-1) if self.config.aux_weight else dead[:0]
        x = self.model.scale(raw).flatten(1).to(self.decoder_copy.dtype)
        product = x @ self.encoder_copy.t()
        score_norms = self._score_norms()
        selection = self.selector.select(product, score_norms, weights.k)
        gradients = self._gradients(x, selection)
        if not selection.is_whole():  # Its count was on its way while the gradients were computed.
            self._receive()  # What is under way must not be written over.
            selection = self.selector.search(product, score_norms, weights.k)
            gradients = self._gradients(x, selection)
        self.selector.move_bound(selection)
        error, gradient, bias_gradient, squares, losses = gradients
        reconstruction = losses.sum() / (batch if self.config.reconstruction == "mse" else N_MODELS * batch)
        zero = auxiliary = torch.zeros((), device=x.device)
        if len(candidates):
            auxiliary, changed = self._auxiliary(x, product, score_norms, error, candidates, bias_gradient)
            squares[candidates] = 0.0
            squares[candidates, 0] = changed
        decoder_bias_gradient = gradient.sum(0, dtype=torch.float32)
        if self.ranks.world > 1:
            biases = self.ranks.sum(torch.cat((bias_gradient, decoder_bias_gradient)))
            bias_gradient, decoder_bias_gradient = biases.split((self.n_latents, self.width))
            self._receive()
            squares = sum_of_squares(self.decoder_gradient) + sum_of_squares(self.encoder_gradient)
        norm = (squares.sum() + bias_gradient.square().sum() + decoder_bias_gradient.square().sum()).sqrt()
        clip = (self.config.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        self._adam(learning_rate, clip, bias_gradient, decoder_bias_gradient)

        loss = reconstruction + self.config.aux_weight * auxiliary
        latents = selection.index % self.n_latents
        selected = torch.zeros(self.n_latents, device=x.device).index_add_(0, latents, selection.values) > 0
        step = Step(
            parts=torch.stack([loss, reconstruction, zero, zero, auxiliary]),
            gradient_norm=norm,
            smallest_score=selection.smallest,
            positive=selection.positive.bool(),
            selected=selected,
            n_active=(selection.values > 0).sum(),
            x=x.view(batch, N_MODELS, -1),
            error=error.view(batch, N_MODELS, -1),
        )
        return of_whole_batch(step, self.ranks)

    def _score_norms(self) -> Tensor:
        """[latent] fp32; see BatchTopKCrosscoder.selection_norms."""
        if self.model.config.score_norm == "none":
            return torch.ones_like(self.model.b_enc)
        return self.norms.norm(dim=-1) if self.model.config.score_norm == "l2" else self.norms.sum(dim=-1)

    def _gradients(self, x: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Error and the loss's gradient at the reconstruction (both [batch, width]); b_enc's gradient [latent]; sums of
        squares of the weights' gradients, which are filled and on their way to the others; losses [batch].

        All of this process's rows; the gradients of a loss that is the mean over the rows of all processes.
        """
        batch, index, values = len(x), selection.index, selection.values
        by_token = Pairs(starts_of(index, self.n_latents, batch), (index % self.n_latents).int(), values)
        error, gradient, value_gradients, losses = self._decode(x, by_token, index)
        index, order = torch.sort((index % self.n_latents) * batch + index // self.n_latents)
        by_latent = Pairs(starts_of(index, batch, self.n_latents), (index % batch).int(), values[order])
        bias_gradient, squares = self._weight_gradients(x, gradient, by_latent, value_gradients[order])
        return error, gradient, bias_gradient, squares, losses

    def _decode(self, x: Tensor, pairs: Pairs, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Error, the loss's gradient at the reconstruction (both [batch, width]) and at the values, losses [batch].
        `index` as of Selection; what fills it up has no gradients."""
        batch, d_model = len(x), self.width // N_MODELS
        tokens = batch * self.ranks.world
        block = min(kernels.DECODER_COLUMNS, triton.next_power_of_2(d_model))
        parts_of_model = triton.cdiv(d_model, block)
        parts = N_MODELS * parts_of_model
        order = pairs.starts.diff().argsort(descending=True)  # a token of many pairs is not to be the last one
        error = torch.empty_like(x)
        squares = torch.empty((parts, batch), device=x.device)
        products = torch.empty((parts, len(pairs.values)), device=x.device)
        kernel: Any = kernels.decode_and_differentiate
        kernel[(batch, parts)](
            pairs.starts, order, pairs.other, pairs.values, self.decoder_copy, self.model.b_dec, x, error,
            squares, products, len(pairs.values), d_model, parts_of_model, kernels.DECODER_ROWS, block, num_warps=1,
        )  # fmt: skip
        if self.config.reconstruction == "mse":
            scale = 2 / tokens
            losses, gradient, value_gradients = squares.sum(0), error * scale, products.sum(0) * scale
        else:  # l2: the gradient of |e_m| is e_m / |e_m|
            norms = squares.view(N_MODELS, parts_of_model, batch).sum(1).clamp(min=SMALLEST_SQUARE).sqrt()
            losses, scales = norms.sum(0), 1 / (N_MODELS * tokens * norms)
            gradient = (error.view(batch, N_MODELS, -1) * scales.t().unsqueeze(-1)).to(error.dtype).view_as(error)
            of_pair = scales[:, (index // self.n_latents).clamp(max=batch - 1)]
            value_gradients = (products.view(N_MODELS, parts_of_model, -1).sum(1) * of_pair).sum(0)
        return error, gradient, value_gradients * (pairs.values > 0), losses

    def _weight_gradients(
        self, x: Tensor, gradient: Tensor, pairs: Pairs, value_gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fills the gradients of encoder and decoder and sends them; returns b_enc's, and the sums of the squares of
        the others, [latent, parts]: both of this process."""
        # There is room for those of all processes, of which a share are this one's.
        many = len(pairs.values) // self.ranks.world >= kernels.MANY_PAIRS * self.n_latents
        columns, rows = kernels.GRADIENT_BLOCK if many else kernels.SPARSE_BLOCK
        block = min(columns, triton.next_power_of_2(self.width))
        parts = triton.cdiv(self.width, block)
        bias_gradient = torch.empty(self.n_latents, device=x.device)
        squares = torch.empty((self.n_latents, parts), device=x.device)
        kernel: Any = kernels.weight_gradients
        for at, end in self.ranges:
            decoder_gradient, encoder_gradient = self.decoder_gradient[at:end], self.encoder_gradient[at:end]
            kernel[(end - at, parts)](
                pairs.starts[at:], pairs.other, pairs.values, value_gradients, gradient, x, decoder_gradient,
                encoder_gradient, bias_gradient[at:], squares[at:], self.width, rows, block, num_warps=1,
            )  # fmt: skip
            if self.ranks.world > 1:
                self._sent += [self.ranks.begin_sum(decoder_gradient), self.ranks.begin_sum(encoder_gradient)]
        return bias_gradient, squares

    def _auxiliary(
        self, x: Tensor, product: Tensor, norms: Tensor, error: Tensor, dead: Tensor, bias_gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The auxiliary loss (losses.auxiliary_loss) of the `dead` [n] latents; adds its gradients, times its weight,
        to the others. And the sums of the squares [n] of the rows that it changed, encoder's and decoder's.

        With several processes the weights' gradients are summed by now and its own are summed here; loss and biases'
        are of this process.
        """
        aux_k, weight = auxiliary_latents(self.config, self.model.config.d_model), self.config.aux_weight
        n, world = len(dead), self.ranks.world
        rows = torch.nn.functional.pad(dead, (0, -n % ALIGNED))  # what is filled up has values of 0
        values = torch.relu(product[:, rows] + self.model.b_enc[rows])
        values[:, n:] = 0.0
        if aux_k < n:
            best = torch.topk(values * norms[rows], aux_k, dim=-1, sorted=False).indices
            values = torch.zeros_like(values).scatter(1, best, values.gather(1, best))
        rounded, decoder = values.to(x.dtype), self.decoder_copy[rows]
        left = torch.addmm(error, rounded, decoder)  # what the dead latents leave of the residual, which is -error
        mean = self.ranks.mean(error.mean(0, dtype=torch.float32))
        square, of_mean = self.ranks.sum(sum_of_squares(error)), world * len(x) * sum_of_squares(mean)
        # Where all rows are alike the variance is 0, and the difference of the two sums a rounding of them.
        scale = torch.where(square - of_mean > ROUNDING * square, world / (square - of_mean), 0.0)
        factor = (2 * weight / world * scale).to(x.dtype)
        slope = (left @ decoder.t()) * (factor * (rounded > 0))
        squares = torch.zeros(n, device=x.device)
        added_to_both = (factor * rounded).t() @ left, slope.t() @ x
        self._receive()
        for gradient, added in zip((self.decoder_gradient, self.encoder_gradient), added_to_both, strict=True):
            changed = gradient[dead] + self.ranks.sum(added[:n])
            gradient.index_copy_(0, dead, changed)
            squares += torch.linalg.vector_norm(changed, dim=1, dtype=torch.float32) ** 2
        bias_gradient.index_add_(0, dead, slope[:, :n].sum(0, dtype=torch.float32))
        return sum_of_squares(left) * scale, squares

    def _receive(self) -> None:
        """Go on once the sums that are on their way are there. It is the GPU that waits."""
        for sent in self._sent:
            sent.wait()
        self._sent.clear()

    def _adam(self, learning_rate: float, clip: Tensor, bias_gradient: Tensor, decoder_bias_gradient: Tensor) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate
        beta_1, beta_2 = group["betas"]
        kernel: Any = kernels.adam_rows
        self.steps += 1
        for name, weight, gradient, copy, norms in (
            ("decoder", self.decoder, self.decoder_gradient, self.decoder_copy, self.norms),
            ("encoder", self.encoder, self.encoder_gradient, self.encoder_copy, self.unused_norms),
        ):
            first, second, step = self.moments[name]
            step += 1
            kernel[(self.n_latents,)](
                weight, gradient, first, second, copy, norms, clip, learning_rate, beta_1, beta_2,
                1 - beta_1**self.steps, 1 - beta_2**self.steps, self.width, self.width // N_MODELS,
                triton.next_power_of_2(self.width), num_warps=4,
            )  # fmt: skip
        self.model.W_enc.grad = self.model.W_dec.grad = None  # so that the optimiser leaves them alone
        self.model.b_enc.grad = bias_gradient * clip
        self.model.b_dec.grad = (decoder_bias_gradient * clip).view_as(self.model.b_dec)
        self.optimizer.step()

    def _moments(self, parameter: torch.nn.Parameter, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Adam's state of a parameter, made where it has none: moments as [latent, width], and the step count."""
        state: dict[str, Any] = self.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.zeros_like(parameter.data)
            state[name] = moment if state.get(name) is None else moment.copy_(state[name])  # laid out as the parameter
        state.setdefault("step", torch.zeros((), device=parameter.device))
        first, second = (
            latents_first(state[name]) if transposed else state[name].view(self.n_latents, self.width)
            for name in ("exp_avg", "exp_avg_sq")
        )
        return first, second, state["step"]
