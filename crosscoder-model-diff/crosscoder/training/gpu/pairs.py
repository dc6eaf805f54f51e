"""The active pairs of token and latent of a batch, as the step by hand holds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The active pairs in order of their rows: tokens, or latents."""

    starts: Tensor
    """[rows + 1] int32: where each row's pairs begin."""
    other: Tensor
    """[pairs] int32: the latent of each pair in order of tokens, or the token in order of latents."""
    values: Tensor
    """[pairs] fp32."""


def starts_of(index: Tensor, columns: int, rows: int) -> Tensor:
    """[rows + 1] int32: where each row begins among sorted indices row * columns + column."""
    bounds = torch.arange(rows + 1, device=index.device, dtype=torch.int64) * columns
    return torch.searchsorted(index.long(), bounds, out_int32=True)


def latents_first(encoder: Tensor) -> Tensor:
    """[2, d_model, latent] -> [latent, 2 * d_model], a view."""
    return encoder.reshape(-1, encoder.shape[-1]).t()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """[]: the sum of its squares, fp32."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) ** 2
