"""Triton kernels for fused.py, each in place; intermediate results are rounded as the model's own code rounds them.

Importing this module needs Triton, which comes with PyTorch for a GPU.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def silu_times(gate, up, count, block: tl.constexpr):
    """gate = SiLU(gate) * up, over `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    product = silu * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate + place, product.to(gate.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x, cos, sin, n_time, n_heads, x_batch, x_head, x_time, angle_batch, half: tl.constexpr, heads: tl.constexpr
):  # fmt: skip
    """One token of queries or keys [batch, head, time, 2 * half]: (a, b) = (a cos - b sin, b cos + a sin), its halves
    a and b with the halves of cos and sin [batch or 1, time, 2 * half]. Strides of `x` and of the angles are given."""
    kind = x.dtype.element_ty
    batch, time = tl.program_id(0) // n_time, tl.program_id(0) % n_time
    head, column = tl.arange(0, heads)[:, None], tl.arange(0, half)[None, :]
    inside = (head < n_heads) & (column < half)
    place = x + batch.to(tl.int64) * x_batch + time.to(tl.int64) * x_time + head * x_head + column
    angle = batch.to(tl.int64) * angle_batch + time * 2 * half + column
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    cos_a, cos_b = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + half).to(tl.float32)
    sin_a, sin_b = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + half).to(tl.float32)
    new_a = (a * cos_a).to(kind).to(tl.float32) + (-b * sin_a).to(kind).to(tl.float32)
    new_b = (b * cos_b).to(kind).to(tl.float32) + (a * sin_b).to(kind).to(tl.float32)
    tl.store(place, new_a.to(kind), mask=inside)
    tl.store(place + half, new_b.to(kind), mask=inside)
