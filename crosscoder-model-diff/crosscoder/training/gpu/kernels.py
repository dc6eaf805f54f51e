"""Triton kernels of a crosscoder's training step that touch only the active and the dead latents.

Of a batch of B tokens k*B pairs (token, latent) are active, k of every F: a product over all of them is mostly zeros.
Pairs are held sorted by token and, a second time, by latent. Rows of weights are `width` = 2 * d_model numbers, both
models one vector. Sums are fp32. Importing this module needs Triton, which comes with PyTorch for a GPU.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
import triton.language as tl  # pyright: ignore[reportMissingImports]

DECODER_COLUMNS, DECODER_ROWS = 128, 32
"""What a program of one warp decodes: columns, so few that those of all rows lie in the cache, and rows that it has on
their way at the same time."""
GRADIENT_BLOCK = 128, 8
SPARSE_BLOCK = 256, 2
"""Columns and rows of a program that sums gradients, and of one where a latent has fewer pairs than MANY_PAIRS."""
MANY_PAIRS = 16


@triton.jit
def candidates(
    product, bias, norms, bound, counter, scores, values, indices, positive,
    n_tokens, n_latents, capacity, tokens: tl.constexpr, latents: tl.constexpr,
):  # fmt: skip
    """Find the candidates of a tile [tokens, latents]: value = ReLU(product + bias), score = value * norm; those with a
    score above `bound` are appended, in any order, to scores, values and indices (token * n_latents + latent).
    `counter` counts them, also what is over `capacity`. Sets `positive` of each latent that has a positive value."""
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    latent = tl.program_id(1) * latents + tl.arange(0, latents)
    inside = (token < n_tokens)[:, None] & (latent < n_latents)[None, :]
    index = token[:, None].to(tl.int64) * n_latents + latent[None, :]
    value = tl.load(product + index, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + latent, mask=latent < n_latents, other=0.0)[None, :]
    value = tl.where(inside & (value > 0), value, 0.0)
    any_positive = tl.max(value, 0) > 0
    tl.store(positive + latent, 1, mask=any_positive & (latent < n_latents))
    score = value * tl.load(norms + latent, mask=latent < n_latents, other=0.0)[None, :]
    chosen = inside & (score > tl.load(bound))
    flags = tl.reshape(chosen.to(tl.int32), [tokens * latents])
    count = tl.sum(flags, 0)
    if count > 0:
        place = tl.atomic_add(counter, count) + tl.cumsum(flags, 0) - 1
        write = (flags > 0) & (place < capacity)
        tl.store(scores + place, tl.reshape(score, [tokens * latents]), mask=write)
        tl.store(values + place, tl.reshape(value, [tokens * latents]), mask=write)
        tl.store(indices + place, tl.reshape(index, [tokens * latents]), mask=write)


@triton.jit
def decode_and_differentiate(
    starts, order, latents, values, decoder, bias, x, error, squares, products, n_tokens, n_pairs, d_model,
    parts_of_model, decode: tl.constexpr, differentiate: tl.constexpr, at_once: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Decode `block` columns of one model for one token: error of the reconstruction, the sum of its squares, and its
    product with the decoder row of each active latent.

    With `decode` alone `error` takes the sum of the latents' vectors, without bias and x; with `differentiate` alone
    the error is there, and the rest is computed.

    `latents` and `values` are the pairs in order of tokens, those of token t from starts[t] to starts[t + 1]. Part p
    of the columns belongs to model p // parts_of_model; `squares` is [parts, tokens], `products` [parts, pairs].
    Programs that run at the same time read the same columns, so the rows come out of the cache, and the second time
    out of the one that is nearest.
    """
    token, part = tl.load(order + tl.program_id(0)), tl.program_id(1)
    of_model = (part % parts_of_model) * block + tl.arange(0, block)
    inside = of_model < d_model
    column = part // parts_of_model * d_model + of_model
    width = tl.num_programs(1) // parts_of_model * d_model
    row = token.to(tl.int64) * width + column
    e = tl.zeros([block], tl.float32)
    if decode and differentiate:
        e += tl.load(bias + column, mask=inside, other=0.0) - tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    first, last = tl.load(starts + token), tl.load(starts + token + 1)
    if decode:
        for pair in range(first, last, at_once):
            which = pair + tl.arange(0, at_once)
            there = which < last
            weight = decoder + tl.load(latents + which, mask=there, other=0).to(tl.int64)[:, None] * width
            weights = tl.load(weight + column[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            e += tl.sum(tl.load(values + which, mask=there, other=0.0)[:, None] * weights, 0)
        rounded = tl.where(inside, e, 0.0).to(error.dtype.element_ty)
        tl.store(error + row, rounded, mask=inside)
    else:
        rounded = tl.load(error + row, mask=inside, other=0.0)
    if differentiate:
        e = rounded.to(tl.float32)
        tl.store(squares + part * n_tokens + token, tl.sum(e * e, 0))
        for pair in range(first, last, at_once):
            which = pair + tl.arange(0, at_once)
            there = which < last
            weight = decoder + tl.load(latents + which, mask=there, other=0).to(tl.int64)[:, None] * width
            weights = tl.load(weight + column[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            tl.store(products + part.to(tl.int64) * n_pairs + which, tl.sum(weights * e[None, :], 1), mask=there)


@triton.jit
def weight_gradients(
    starts, tokens, values, value_gradients, gradient, x, decoder_gradient, encoder_gradient, bias_gradient, squares,
    width, at_once: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum `block` columns of one latent's decoder gradient and of its encoder gradient.

    The pairs are in order of latents, those of latent j from starts[j] to starts[j + 1]. `squares` [latents, parts]
    takes the sum of the squares of what was written.
    """
    latent, part = tl.program_id(0), tl.program_id(1)
    column = part * block + tl.arange(0, block)
    inside = column < width
    decoder = tl.zeros([block], tl.float32)
    encoder = tl.zeros([block], tl.float32)
    bias = tl.zeros([at_once], tl.float32)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    for pair in range(first, last, at_once):
        which = pair + tl.arange(0, at_once)
        there = which < last
        row = tl.load(tokens + which, mask=there, other=0).to(tl.int64)[:, None] * width + column[None, :]
        mask = there[:, None] & inside[None, :]
        slope = tl.load(value_gradients + which, mask=there, other=0.0)
        value = tl.load(values + which, mask=there, other=0.0)
        decoder += tl.sum(value[:, None] * tl.load(gradient + row, mask=mask, other=0.0).to(tl.float32), 0)
        encoder += tl.sum(slope[:, None] * tl.load(x + row, mask=mask, other=0.0).to(tl.float32), 0)
        bias += slope
    row = latent.to(tl.int64) * width + column
    tl.store(decoder_gradient + row, decoder.to(decoder_gradient.dtype.element_ty), mask=inside)
    tl.store(encoder_gradient + row, encoder.to(encoder_gradient.dtype.element_ty), mask=inside)
    square = tl.sum(decoder * decoder, 0) + tl.sum(encoder * encoder, 0)
    tl.store(squares + latent.to(tl.int64) * tl.num_programs(1) + part, square)
    if part == 0:
        tl.store(bias_gradient + latent, tl.sum(bias, 0))


@triton.jit
def dead_values(
    product, bias, norms, dead, values, scores, n_tokens, n_latents, n_dead, n_columns, ranked: tl.constexpr,
    tokens: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A tile of `values` [tokens, columns] = ReLU(product + bias) of the latents `dead` [n_dead], 0 in the columns
    after them; where they are `ranked` also of `scores` = value * norm, fp32."""
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    latent = tl.load(dead + column, mask=column < n_dead, other=0)
    inside = (token < n_tokens)[:, None] & (column < n_dead)[None, :]
    value = tl.load(product + token[:, None].to(tl.int64) * n_latents + latent[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32) + tl.load(bias + latent, mask=column < n_dead, other=0.0)[None, :]
    value = tl.where(inside & (value > 0), value, 0.0)
    place = token[:, None].to(tl.int64) * n_columns + column[None, :]
    written = (token < n_tokens)[:, None] & (column < n_columns)[None, :]
    tl.store(values + place, value.to(values.dtype.element_ty), mask=written)
    if ranked:
        score = value * tl.load(norms + latent, mask=column < n_dead, other=0.0)[None, :]
        tl.store(scores + place, score, mask=written)


@triton.jit
def add_to_rows(
    rows, factor, decoder_added, encoder_added, decoder_gradient, encoder_gradient, squares, width, parts,
    block: tl.constexpr, most_parts: tl.constexpr,
):  # fmt: skip
    """Add `factor` times row i of `decoder_added` and `encoder_added` to row rows[i] of the two gradients. That row of
    `squares` [latent, parts] takes the sum of the squares of both new rows in its first part, and 0 in the others."""
    row, scale = tl.load(rows + tl.program_id(0)), tl.load(factor)
    column = tl.arange(0, block)
    inside = column < width
    place, added = row * width + column, tl.program_id(0).to(tl.int64) * width + column
    decoder = tl.load(decoder_gradient + place, mask=inside, other=0.0).to(tl.float32)
    decoder += scale * tl.load(decoder_added + added, mask=inside, other=0.0).to(tl.float32)
    tl.store(decoder_gradient + place, decoder.to(decoder_gradient.dtype.element_ty), mask=inside)
    encoder = tl.load(encoder_gradient + place, mask=inside, other=0.0).to(tl.float32)
    encoder += scale * tl.load(encoder_added + added, mask=inside, other=0.0).to(tl.float32)
    tl.store(encoder_gradient + place, encoder.to(encoder_gradient.dtype.element_ty), mask=inside)
    square = tl.sum(decoder * decoder + encoder * encoder, 0)
    part = tl.arange(0, most_parts)
    tl.store(squares + row * parts + part, tl.where(part == 0, square, 0.0), mask=part < parts)


@triton.jit
def adam_rows(
    weight, gradient, first_moment, second_moment, copy, norms, clip,
    learning_rate, beta_1, beta_2, correction_1, correction_2, width, d_model, block: tl.constexpr,
):  # fmt: skip
    """Adam on one row of fp32 weights from its gradient times `clip`; writes the bf16 copy in the same pass, and the
    norms [2] of the new row's two halves. Kingma and Ba 2015; epsilon 1e-8; correction_i is 1 - beta_i ** step."""
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < width
    place = row.to(tl.int64) * width + column
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(clip)
    m = beta_1 * tl.load(first_moment + place, mask=inside, other=0.0) + (1 - beta_1) * g
    v = beta_2 * tl.load(second_moment + place, mask=inside, other=0.0) + (1 - beta_2) * g * g
    step = learning_rate * (m / correction_1) / (tl.sqrt(v / correction_2) + 1e-8)
    w = tl.load(weight + place, mask=inside, other=0.0) - step
    tl.store(first_moment + place, m, mask=inside)
    tl.store(second_moment + place, v, mask=inside)
    tl.store(weight + place, w, mask=inside)
    tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
    square = tl.where(inside, w * w, 0.0)
    tl.store(norms + 2 * row, tl.sqrt(tl.sum(tl.where(column < d_model, square, 0.0), 0)))
    tl.store(norms + 2 * row + 1, tl.sqrt(tl.sum(tl.where(column >= d_model, square, 0.0), 0)))
