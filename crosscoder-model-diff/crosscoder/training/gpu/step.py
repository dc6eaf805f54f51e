"""A training step of the BatchTopK crosscoder on a GPU, its gradients written by hand.

The same step as training/step.py takes through autograd. What makes it fast: one dense product (the encoder; four more
of the dead latents alone), all else on the active pairs of token and latent; weights as fp32 masters with bf16 copies
for the products, both written by one pass of Adam; what is waited for is done by then, so that the GPU always has work.

The encoder is held transposed, [latent, 2 * d_model], like the decoder: the model's W_enc becomes a view of that.

Several processes have equal shares of the latents, whose weights each alone keeps up to date, and see all tokens. Each
sends its own rows of the batch to the others, selects among the latents of all, and decodes its own; the sum of that,
less x, is the error, from which the gradients of its latents follow. So what is sent is of the size of the batch,
not of the dictionary, and the most of it is on its way while something is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
from torch import Tensor

from crosscoder.dictionaries.config import N_MODELS, TrainingConfig
from crosscoder.dictionaries.losses import Weights, auxiliary_latents
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE, Ranks
from crosscoder.training.gpu import exchange, kernels
from crosscoder.training.gpu.pairs import Pairs, latents_first, starts_of, sum_of_squares
from crosscoder.training.gpu.selection import TILE, OnCpu, Selection, Selector
from crosscoder.training.step import Step

PIECES = 2
"""Pieces of the batch that several processes decode, and add up, one after the other."""
SMALLEST_SQUARE = 1e-30
"""Smallest square of an error's length, which is divided by."""
ALIGNED = 64
"""Rows that dead latents are filled up to: products of odd sizes take four times as long."""
ROUNDING = 1e-5
"""Rounding of a difference of sums in fp32, relative to them."""
CLIP_EPSILON = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


class Gradients(NamedTuple):
    """Gradients and sums of a batch; the weights' gradients are in GpuStep.decoder_gradient and encoder_gradient."""

    error: Tensor
    """[batch, width]: the reconstruction less x, rounded."""
    square: Tensor
    """[]: sum of its squares."""
    losses: Tensor
    """[batch]: each token's, before the mean."""
    decoder_bias: Tensor
    """[width], b_dec's gradient."""
    bias: Tensor
    """[latent], b_enc's gradient; of this process's latents, as all that follows."""
    squares: Tensor
    """[latent, parts]: sums of the squares of the weights' gradients."""
    selected: Tensor
    """[latent] int32: pairs that were kept."""


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
        self.width = N_MODELS * model.config.d_model
        device = model.b_dec.device
        encoder = latents_first(model.W_enc.data).contiguous()
        model.W_enc.data = encoder.t().view(model.W_enc.shape)
        self.whole = {
            "decoder": (model.W_dec.data.view(-1, self.width), *self._moments(model.W_dec, transposed=False)),
            "encoder": (encoder, *self._moments(model.W_enc, transposed=True)),
        }
        self.own = {name: tuple(map(ranks.rows, tensors)) for name, tensors in self.whole.items()}
        self.decoder, self.encoder = self.own["decoder"][0], self.own["encoder"][0]
        self.n_latents = len(self.decoder)
        self.bias = ranks.rows(model.b_enc.data)
        self.decoder_copy, self.encoder_copy = self.decoder.to(product_dtype), self.encoder.to(product_dtype)
        self.decoder_gradient = torch.empty_like(self.decoder_copy)
        self.encoder_gradient = torch.empty_like(self.encoder_copy)
        self.norms = torch.empty((self.n_latents, N_MODELS), device=device)
        self.unused_norms = torch.empty_like(self.norms)
        self.selector = Selector(self.bias, ranks)
        self.counts = [optimizer.state[parameter]["step"] for parameter in (model.W_dec, model.W_enc)]
        self.steps = int(self.counts[0])
        self.refresh()

    def gather(self) -> None:
        """Bring the others' weights and moments into the model and the optimiser's state. All processes call it. Not
        counted as sent, which is of steps."""
        for name, tensors in self.whole.items() if self.ranks.world > 1 else ():
            for own, tensor in zip(self.own[name], tensors, strict=True):
                self.ranks.begin_gather(own.clone(), tensor, counted=False).wait()

    def refresh(self) -> None:
        """Take over weights that were changed from outside: fresh latents, a resumed run."""
        self.decoder_copy.copy_(self.decoder)
        self.encoder_copy.copy_(self.encoder)
        self.norms.copy_(self.decoder.view(self.n_latents, N_MODELS, -1).norm(dim=-1))
        self.selector.forget()

    @torch.no_grad()
    def __call__(self, raw: Tensor, learning_rate: float, weights: Weights, dead: Tensor) -> Step:
        """Take one step; arguments as of AutogradStep."""
        # Asked for before the rest, so that it is there while the GPU still has work when it is waited for. NumPy
        # counts it: torch takes all cores for more than 32,768 values, and waking them lasts longer than the step.
        dead_on_cpu = OnCpu(dead if self.config.aux_weight else dead[:0])
        own_rows = self.model.scale(raw).flatten(1).to(self.decoder_copy.dtype)
        x, product = exchange.rows_and_product(own_rows, self.encoder_copy, self.ranks)
        batch = len(x)
        score_norms = self._score_norms()
        selection = self.selector.select(product, score_norms, weights.k)
        gradients = self._gradients(x, selection)
        if not selection.is_whole():  # Its count was on its way while the gradients were computed.
            selection = self.selector.search(product, score_norms, weights.k)
            gradients = self._gradients(x, selection)
        self.selector.move_bound(selection)
        reconstruction = gradients.losses.sum() / (batch if self.config.reconstruction == "mse" else N_MODELS * batch)
        zero = auxiliary = torch.zeros((), device=x.device)
        if n_dead := int(np.count_nonzero(dead_on_cpu.wait().numpy())):
            own_dead = torch.from_numpy(np.flatnonzero(self.ranks.rows(dead_on_cpu.wait()).numpy()))
            own_dead = (own_dead.pin_memory() if x.is_cuda else own_dead).to(x.device, non_blocking=True)
            auxiliary = self._auxiliary(x, product, score_norms, gradients, own_dead, n_dead)
        counted = torch.stack((gradients.squares.sum(), (selection.values > 0).sum()))
        own = torch.cat((gradients.bias, selection.positive, gradients.selected, counted))
        everyone = self.ranks.gather(own)
        bias_gradient, positive, selected = (part.flatten() for part in everyone[:, :-2].split(self.n_latents, dim=1))
        square, n_active = everyone[:, -2:].sum(0)
        norm = (square + bias_gradient.square().sum() + gradients.decoder_bias.square().sum()).sqrt()
        clip = (self.config.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        self._adam(learning_rate, clip, bias_gradient, gradients.decoder_bias)

        loss = reconstruction + self.config.aux_weight * auxiliary
        return Step(
            parts=torch.stack([loss, reconstruction, zero, zero, auxiliary]),
            gradient_norm=norm,
            smallest_score=selection.smallest,
            positive=positive > 0,
            selected=selected > 0,
            n_active=n_active.long(),
            x=self.ranks.rows(x.view(batch, N_MODELS, -1)),
            error=self.ranks.rows(gradients.error.view(batch, N_MODELS, -1)),
        )

    def _score_norms(self) -> Tensor:
        """[latent] fp32; see BatchTopKCrosscoder.selection_norms."""
        if self.model.config.score_norm == "none":
            return torch.ones_like(self.bias)
        return self.norms.norm(dim=-1) if self.model.config.score_norm == "l2" else self.norms.sum(dim=-1)

    def _gradients(self, x: Tensor, selection: Selection) -> Gradients:
        batch, index, values = len(x), selection.index, selection.values
        by_token = Pairs(starts_of(index, self.n_latents, batch), (index % self.n_latents).int(), values)
        error, gradient, value_gradients, square, losses = self._decode(x, by_token, index)
        index, order = torch.sort((index % self.n_latents) * batch + index // self.n_latents)
        by_latent = Pairs(starts_of(index, batch, self.n_latents), (index % batch).int(), values[order])
        bias, squares = self._weight_gradients(x, gradient, by_latent, value_gradients[order])
        mse = self.config.reconstruction == "mse"  # whose gradient is the error times a number, and rounded once more
        of_decoder_bias = (error if mse else gradient).sum(0, dtype=torch.float32) * (2 / batch if mse else 1)
        return Gradients(error, square, losses, of_decoder_bias, bias, squares, by_latent.starts.diff())

    def _decode(self, x: Tensor, pairs: Pairs, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Error, the loss's gradient at the reconstruction (both [batch, width]) and at the values, the sum of the
        error's squares, losses [batch]. `index` as of Selection; what fills it up has no gradients."""
        batch, d_model = len(x), self.width // N_MODELS
        block = min(kernels.DECODER_COLUMNS, triton.next_power_of_2(d_model))
        parts_of_model = triton.cdiv(d_model, block)
        parts = N_MODELS * parts_of_model
        squares = torch.empty((parts, batch), device=x.device)
        products = torch.empty((parts, len(pairs.values)), device=x.device)
        counts, bias = pairs.starts.diff(), self.model.b_dec.flatten()

        def run(error: Tensor, rows: slice, decode: bool, differentiate: bool) -> Tensor:
            # a token of many pairs is not to be the last one
            order = counts[rows].argsort(descending=True) + (rows.start or 0)
            kernel: Any = kernels.decode_and_differentiate
            kernel[(len(order), parts)](
                pairs.starts, order, pairs.other, pairs.values, self.decoder_copy, bias, x, error, squares, products,
                batch, len(pairs.values), d_model, parts_of_model, decode, differentiate, kernels.DECODER_ROWS, block,
                num_warps=1,
            )  # fmt: skip
            return error[rows]

        if self.ranks.world == 1:
            error = run(torch.empty_like(x), slice(None), True, True)
        else:
            own = torch.empty_like(x, dtype=torch.float32)
            size = -(-batch // (PIECES * self.ranks.world)) * self.ranks.world
            pieces = (slice(at, min(at + size, batch)) for at in range(0, batch, size))
            decoded = (run(own, rows, True, False) for rows in pieces)
            error = exchange.whole_sum(decoded, lambda rows: bias - x[rows], x, self.ranks)
            run(error, slice(None), False, True)
        if self.config.reconstruction == "mse":
            scale = 2 / batch
            losses, gradient, value_gradients = squares.sum(0), error * scale, products.sum(0) * scale
        else:  # l2: the gradient of |e_m| is e_m / |e_m|
            norms = squares.view(N_MODELS, parts_of_model, batch).sum(1).clamp(min=SMALLEST_SQUARE).sqrt()
            losses, scales = norms.sum(0), 1 / (N_MODELS * batch * norms)
            gradient = (error.view(batch, N_MODELS, -1) * scales.t().unsqueeze(-1)).to(error.dtype).view_as(error)
            of_pair = scales[:, (index // self.n_latents).clamp(max=batch - 1)]
            value_gradients = (products.view(N_MODELS, parts_of_model, -1).sum(1) * of_pair).sum(0)
        return error, gradient, value_gradients * (pairs.values > 0), squares.sum(), losses

    def _weight_gradients(
        self, x: Tensor, gradient: Tensor, pairs: Pairs, value_gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fills the gradients of encoder and decoder; returns b_enc's, and the sums of the squares of the others,
        [latent, parts]."""
        # There is room for those of all processes, of which a share are this one's.
        many = len(pairs.values) // self.ranks.world >= kernels.MANY_PAIRS * self.n_latents
        columns, rows = kernels.GRADIENT_BLOCK if many else kernels.SPARSE_BLOCK
        block = min(columns, triton.next_power_of_2(self.width))
        parts = triton.cdiv(self.width, block)
        bias_gradient = torch.empty(self.n_latents, device=x.device)
        squares = torch.empty((self.n_latents, parts), device=x.device)
        kernel: Any = kernels.weight_gradients
        kernel[(self.n_latents, parts)](
            pairs.starts, pairs.other, pairs.values, value_gradients, gradient, x, self.decoder_gradient,
            self.encoder_gradient, bias_gradient, squares, self.width, rows, block, num_warps=1,
        )  # fmt: skip
        return bias_gradient, squares

    def _auxiliary(
        self, x: Tensor, product: Tensor, norms: Tensor, gradients: Gradients, dead: Tensor, n_dead: int
    ) -> Tensor:
        """The auxiliary loss (losses.auxiliary_loss) of `n_dead` latents, of which `dead` [n] are this process's; adds
        its gradients, times its weight, to the others, and replaces the sums of squares of these latents."""
        error, square, aux_k = gradients.error, gradients.square, auxiliary_latents(self.config, self.width // N_MODELS)
        values = self._dead_values(product, norms, dead, aux_k if aux_k < n_dead else None)
        decoder = self.decoder_copy[torch.nn.functional.pad(dead, (0, values.shape[1] - len(dead)))]
        # what the dead latents leave of the residual, which is -error
        if self.ranks.world == 1:
            left = torch.addmm(error, values, decoder)
        else:
            left = exchange.whole_sum(iter([(values @ decoder).float()]), lambda rows: error[rows], error, self.ranks)
        mse = self.config.reconstruction == "mse"
        of_mean = len(x) * sum_of_squares(gradients.decoder_bias / 2 if mse else error.mean(0, dtype=torch.float32))
        # Where all rows are alike the variance is 0, and the difference of the two sums a rounding of them.
        scale = torch.where(square - of_mean > ROUNDING * square, 1 / (square - of_mean), 0.0)
        factor = 2 * self.config.aux_weight * scale
        slope = torch.ops.aten.threshold_backward(left @ decoder.t(), values, 0)
        kernel: Any = kernels.add_to_rows
        if n := len(dead):
            parts = gradients.squares.shape[1]
            kernel[(n,)](
                dead, factor, values.t() @ left, slope.t() @ x, self.decoder_gradient, self.encoder_gradient,
                gradients.squares, self.width, parts, *map(triton.next_power_of_2, (self.width, parts)), num_warps=8,
            )  # fmt: skip
        gradients.bias.index_add_(0, dead, factor * slope[:, :n].sum(0, dtype=torch.float32))
        return sum_of_squares(left) * scale

    def _dead_values(self, product: Tensor, norms: Tensor, dead: Tensor, n_keep: int | None) -> Tensor:
        """[batch, n], rounded: values of the latents `dead`, 0 in the columns that they are filled up with; of each
        token's latents the `n_keep` of the largest scores, over all processes."""
        n_columns = -(-len(dead) // ALIGNED) * ALIGNED
        values = product.new_empty(len(product), n_columns)
        scores = values if n_keep is None else torch.empty_like(values, dtype=torch.float32)
        kernel: Any = kernels.dead_values
        if n_columns:
            grid = tuple(map(triton.cdiv, values.shape, TILE))
            sizes = (*product.shape, len(dead), n_columns)
            kernel[grid](product, self.bias, norms, dead, values, scores, *sizes, n_keep is not None, *TILE)
        if n_keep is not None:
            values.masked_fill_(scores < exchange.smallest_kept(scores, n_keep, self.ranks), 0.0)
        return values

    def _adam(self, learning_rate: float, clip: Tensor, bias_gradient: Tensor, decoder_bias_gradient: Tensor) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate
        beta_1, beta_2 = group["betas"]
        kernel: Any = kernels.adam_rows
        self.steps += 1
        for count in self.counts:
            count += 1
        for name, gradient, copy, norms in (
            ("decoder", self.decoder_gradient, self.decoder_copy, self.norms),
            ("encoder", self.encoder_gradient, self.encoder_copy, self.unused_norms),
        ):
            weight, first, second = self.own[name]
            kernel[(self.n_latents,)](
                weight, gradient, first, second, copy, norms, clip, learning_rate, beta_1, beta_2,
                1 - beta_1**self.steps, 1 - beta_2**self.steps, self.width, self.width // N_MODELS,
                triton.next_power_of_2(self.width), num_warps=4,
            )  # fmt: skip
        self.model.W_enc.grad = self.model.W_dec.grad = None  # so that the optimiser leaves them alone
        self.model.b_enc.grad = bias_gradient * clip
        self.model.b_dec.grad = (decoder_bias_gradient * clip).view_as(self.model.b_dec)
        self.optimizer.step()

    def _moments(self, parameter: torch.nn.Parameter, transposed: bool) -> tuple[Tensor, Tensor]:
        """Adam's moments of a parameter as [latent, width], made where it has none."""
        state: dict[str, Any] = self.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.zeros_like(parameter.data)
            state[name] = moment if state.get(name) is None else moment.copy_(state[name])  # laid out as the parameter
        state.setdefault("step", torch.zeros((), device=parameter.device))
        first, second = (
            latents_first(state[name]) if transposed else state[name].view(-1, self.width)
            for name in ("exp_avg", "exp_avg_sq")
        )
        return first, second
