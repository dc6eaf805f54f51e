"""A frozen base in 8-bit floats (e4m3): products at twice the rate of bf16 on a GPU that has them.

Every row of an input, and every output channel of a weight, has a scale of its own: its largest magnitude over the
largest e4m3 number. The backward pass multiplies by a second copy of the weight, scaled by input channel, because
the hardware wants both operands with the summed dimension innermost. Two copies take the memory that bf16 took.
torchao's float8 training, which casts the weights anew in each pass, was slower and further from bf16's gradients
(benchmarks/results/lora_libraries_*.md).

Importing this module needs Triton, which comes with PyTorch for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor, library, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 1e-12


@triton.jit
def _quantise_row(x, values, scales, width, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    numbers = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), 0) / largest, smallest)
    tl.store(values + row * width + columns, (numbers / scale).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [n, m] in e4m3 and their scales [n, 1] fp32, so that x is about values * scales."""
    x = x.contiguous()
    n, m = x.shape
    values = torch.empty_like(x, dtype=E4M3)
    scales = torch.empty((n, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(m)
    _quantise_row[(n,)](x, values, scales, m, LARGEST, SMALLEST_SCALE, block, num_warps=8 if block > 4096 else 4)  # pyright: ignore[reportIndexIssue]
    return values, scales


@library.custom_op("finqa::fp8_product", mutates_args=())
def fp8_product(x: Tensor, weight: Tensor, scale: Tensor, weight_t: Tensor, scale_t: Tensor) -> Tensor:
    """x [n, m] bf16 times the transpose of a quantised weight [p, m]; bf16 [n, p]. Only x has a gradient."""
    values, row_scale = quantised(x)
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(values, weight.t(), row_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


@fp8_product.register_fake
def _shape_of_product(x: Tensor, weight: Tensor, scale: Tensor, weight_t: Tensor, scale_t: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


def _keep_weights(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, weight_t, scale_t = ctx.saved_tensors
    return fp8_product(grad, weight_t, scale_t, weight, scale), None, None, None, None


fp8_product.register_autograd(_gradient, setup_context=_keep_weights)


class Fp8Linear(nn.Module):
    """A frozen linear layer without bias, its weight in e4m3; bf16 in and out."""

    weight_values: Tensor
    weight_scale: Tensor
    transposed_values: Tensor
    transposed_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        for name, matrix in (("weight", weight), ("transposed", weight.t())):
            values, scale = quantised(matrix)
            self.register_buffer(f"{name}_values", values, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out = fp8_product(flat, self.weight_values, self.weight_scale, self.transposed_values, self.transposed_scale)
        return out.view(*x.shape[:-1], self.out_features)


def to_fp8(layers: nn.Module) -> int:
    """Replace every frozen linear layer without bias below `layers`, adapters left alone; returns how many."""
    found = [
        (parent, name, child)
        for parent in layers.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.bias is None and not child.weight.requires_grad
    ]
    for parent, name, child in found:
        setattr(parent, name, Fp8Linear(child))
    return len(found)
