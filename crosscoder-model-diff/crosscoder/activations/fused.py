"""What a Llama-like model computes between its products, in one pass over memory each, where nothing is trained.

Between the products a forward pass of 7B moves activations through memory a dozen times a layer, which takes a fifth
of its time on a GPU. Norms, the gate of the MLP and the rotation of queries and keys are replaced where the
replacement gives what the model's own code gives, to a rounding; else the model is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

ROUNDINGS = 2
"""That may lie between a replacement and the model's own code, relative to the largest number."""
BLOCK = 1024
"""Numbers of the gate in one program."""
ROTATE = "apply_rotary_pos_emb"
"""The function of a model's module in transformers that rotates its queries and keys."""


def fuse(model: PreTrainedModel) -> dict[str, int]:
    """Fuse what can be fused of a model on a GPU; returns how many of each kind.

    The rotation is a function of the model's module in transformers: it is replaced for all models of that kind in
    this process, and does what it did where gradients are recorded.
    """
    return {"norms": fuse_norms(model), "gates": fuse_gates(model), "rotations": fuse_rotation(model)}


def fuse_norms(model: PreTrainedModel) -> int:
    """Give RMS norms torch's own kernel, one pass over memory instead of six; returns how many.

    A norm is changed only where the kernel gives what it gives: Gemma's, say, is another function under that name.
    """
    fused = 0
    for norm in model.modules():
        epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
        if epsilon is not None and type(norm).__name__.endswith("RMSNorm") and isinstance(weight, Tensor):
            fused += _replaced(norm, _fused_norm(weight, epsilon), weight)
    return fused


def _fused_norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, (len(weight),), weight, epsilon)

    return forward


def _replaced(module: nn.Module, forward: Callable[..., Tensor], weight: Tensor) -> bool:
    """Give a module another forward pass, where that gives for random inputs what its own gives; whether it did.

    Inputs are as wide as the last dimension of `weight`, and of its dtype and device.
    """
    sample = torch.randn(4, weight.shape[-1], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        agree = _agree(forward(sample), module(sample))
    if agree:
        module.forward = forward
    return agree


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they differ by no more than a rounding or two."""
    tolerance = ROUNDINGS * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    return torch.allclose(ours, theirs, rtol=0.0, atol=tolerance)


def _is_linear(module: object) -> bool:
    """Whether it is a linear layer of plain weights."""
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()


def fuse_gates(model: PreTrainedModel) -> int:
    """Compute SiLU(gate) * up of an MLP in one pass, over the gate's memory; returns how many."""
    fused = 0
    for mlp in model.modules():
        parts: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(map(_is_linear, parts)):
            fused += _replaced(mlp, _fused_gate(mlp, mlp.forward), parts[0].weight)
    return fused


def _fused_gate(mlp: Any, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU

    from crosscoder.activations import gpu_kernels

    kernel: Any = gpu_kernels.silu_times

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return own(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, gate.numel(), BLOCK)
        return mlp.down_proj(gate)

    return forward


def fuse_adapter(model: PeftModel) -> int:
    """Add a LoRA adapter's part within its second product, where one adapter is active; returns to how many layers.

    The layers must be in their dtype for good (readers.in_the_models_dtype).
    """
    fused = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_linear(layer.base_layer):
            base: Any = layer.base_layer
            fused += _replaced(layer, _fused_adapter(layer, layer.forward), base.weight)
    return fused


def _fused_adapter(layer: Any, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        other = layer.disable_adapters or layer.merged or layer.lora_variant or any(layer.lora_bias.values())
        if len(names) != 1 or other or args or kwargs or layer.training or torch.is_grad_enabled():
            return own(x, *args, **kwargs)
        first, second = layer.lora_A[names[0]], layer.lora_B[names[0]]
        whole = layer.base_layer(x)
        added = first(x).flatten(0, -2)
        whole.view(-1, whole.shape[-1]).addmm_(added, second.weight.t(), alpha=layer.scaling[names[0]])
        return whole

    return forward


def fuse_rotation(model: PreTrainedModel) -> int:
    """Rotate queries and keys where they lie, in one pass; returns whether (1) or not (0)."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, ROTATE, None)
    if own is None or hasattr(own, "own"):
        return int(own is not None)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width & (width - 1):
        return 0
    weight = next(model.parameters())
    heads = [torch.randn(2, 5, n * width, device=weight.device, dtype=weight.dtype) for n in (3, 2)]
    queries, keys = (each.unflatten(-1, (-1, width)).transpose(1, 2) for each in heads)
    cos, sin = torch.randn(2, 1, 5, width, device=weight.device, dtype=weight.dtype)
    rotate = _fused_rotation(own)
    with torch.no_grad():
        try:
            expected = own(queries, keys, cos, sin)
        except (RuntimeError, TypeError):  # a function of another kind under that name
            return 0
        if not all(map(_agree, rotate(queries, keys, cos, sin), expected)):
            return 0
    setattr(module, ROTATE, rotate)
    return 1


def _fused_rotation(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    import triton  # pyright: ignore[reportMissingImports]  not installed without a GPU

    from crosscoder.activations import gpu_kernels

    kernel: Any = gpu_kernels.rotate

    def fits(x: Tensor, angles: Tensor) -> bool:
        _, time, width = angles.shape
        return x.shape[-1] == width and x.stride(-1) == 1 and angles.stride()[1:] == (width, 1) and x.shape[2] == time

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain = not args and not kwargs and cos.stride() == sin.stride() and fits(q, cos) and fits(k, cos)
        if torch.is_grad_enabled() or not plain:
            return own(q, k, cos, sin, *args, **kwargs)
        batch, _, time, width = q.shape
        for x in (q, k):
            n_heads = x.shape[1]
            kernel[(batch * time,)](
                x, cos, sin, time, n_heads, *x.stride()[:3], cos.stride(0) if len(cos) > 1 else 0,
                width // 2, triton.next_power_of_2(n_heads),
            )  # fmt: skip
        return q, k

    rotate.own = own
    return rotate
