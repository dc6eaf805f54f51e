"""Causal attention for training on a CPU: queries in blocks, each block against the keys it may see.

torch's fused CPU attention is slow backwards, in bf16 most of all. On rows of a few hundred tokens plain batched
products over blocks of queries are three times as fast: what is above the diagonal is mostly never computed, and the
probabilities, small at these lengths, are kept for the backward pass.

Rows must be padded on the right and no mask is read: a real token never sees the padding behind it, and what a
padding token computes carries no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Queries per block: smaller skips more above the diagonal, larger makes fewer and larger products."""
NAME = "block_causal"


class BlockCausalAttention(torch.autograd.Function):
    """softmax(scale * Q K^T, causal) V with grouped keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, H, L, d], key and value [B, H_kv, L, d]; returns [B, H, L, d] in the query's dtype."""
        batch, heads, length, width = query.shape
        groups, shared = batch * key.shape[1], heads // key.shape[1]
        # The query heads that share a key head stand in one matrix: [B * H_kv, H / H_kv, L, d].
        q = (query * scale).reshape(groups, shared, length, width)
        k, v = key.reshape(groups, length, width), value.reshape(groups, length, width)
        above = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
        out = torch.empty_like(q)
        kept = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            size = end - start
            block = q[:, :, start:end].reshape(groups, shared * size, width)
            scores = torch.bmm(block, k[:, :end].transpose(1, 2)).view(groups, shared, size, end)
            scores[..., start:].masked_fill_(above[:size, :size], float("-inf"))
            weights = torch.softmax(scores, -1).view(groups, shared * size, end)
            out[:, :, start:end] = torch.bmm(weights, v[:, :end]).view(groups, shared, size, width)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out.view(batch, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        groups, shared, length, width = q.shape
        batch, heads = grads[0].shape[:2]
        grad = grads[0].reshape(groups, shared, length, width)
        grad_q = torch.empty_like(q)
        # A key gets a share from every later block: summed in fp32.
        grad_k = torch.zeros(groups, length, width, dtype=torch.float32)
        grad_v = torch.zeros_like(grad_k)
        for start, weights in zip(range(0, length, BLOCK), kept, strict=True):
            end = min(start + BLOCK, length)
            size = end - start
            block = grad[:, :, start:end].reshape(groups, shared * size, width)
            grad_v[:, :end] += torch.bmm(weights.transpose(1, 2), block)
            to_weights = torch.bmm(block, v[:, :end].transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            grad_q[:, :, start:end] = torch.bmm(to_scores, k[:, :end]).view(groups, shared, size, width)
            q_block = q[:, :, start:end].reshape(groups, shared * size, width)
            grad_k[:, :end] += torch.bmm(to_scores.transpose(1, 2), q_block)
        key_shape = (batch, groups // batch, length, width)
        return (
            (grad_q * ctx.scale).view(batch, heads, length, width),
            grad_k.to(k.dtype).view(key_shape),
            grad_v.to(v.dtype).view(key_shape),
            None,
        )


def block_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in the form that transformers calls; returns [B, L, H, d]."""
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(f"{NAME} is for training rows alone: no mask, no cache")
    # With fp32 weights under autocast, values come in bf16 and what rotary positions went into in fp32.
    out: Any = BlockCausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scaling)
    return out.transpose(1, 2).contiguous(), None


def use_block_causal(model: nn.Module) -> bool:
    """Switch a model on the CPU to this attention where it computes the same; False leaves it as it was."""
    from transformers.modeling_utils import AttentionInterface

    config: Any = model.config
    plain = config.model_type in {"mistral", "llama"} and getattr(config, "sliding_window", None) is None
    if not plain or config.attention_dropout or next(model.parameters()).device.type != "cpu":
        return False
    AttentionInterface.register(NAME, block_causal_attention)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    return True
