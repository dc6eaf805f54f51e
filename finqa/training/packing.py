"""Training rows end to end in one sequence, for a GPU: no padding, and no row sees another.

A batch of rows is one row of tokens, each with positions of its own from 0; attention is told where each begins. An
update still sees exactly the rows that a padded batch would have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finqa.training.rows import NO_LOSS, Example

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "packed"
LENGTH_STEP = 128
"""Batches of up to 4,096 tokens are padded up to a multiple of this many: a matrix product's tile on a GPU, so it costs
nothing, and there are few different lengths. Longer ones are padded up to a multiple of twice as many: of 400 batches
of four FinQA rows, 81% then find their shape recorded, and 2.3% of the tokens are padding."""
TARGETS_STEP = 256
"""The positions that carry loss are padded up to a multiple of this many, for the same reason."""
LONGEST_STEP = 1024
"""Attention is told the longest row up to a multiple of this many tokens: it bounds the blocks that are launched."""
LONGEST_GRAPH = 4096
"""Tokens of a batch up to which its step is recorded as a CUDA graph (captured_steps.py), at the width of a 7B model:
a longer one keeps the GPU busy without a graph, which would only hold memory. See `longest_graph`."""

FAMILIES = frozenset({"mistral", "llama", "phi3", "qwen2", "qwen3"})
"""Model types of transformers whose attention passes on where rows begin and does nothing else of its own."""


def longest_graph(hidden: int, intermediate: int) -> int:
    """Tokens of a batch up to which its step is recorded, for layers of this width and this width of their MLP.

    To launch a layer's kernels takes as long whatever their width, and to compute them as long as their products are
    large: a narrower layer needs more tokens to keep a GPU busy. Qwen2.5-Coder-1.5B with four rows of FinQA an update
    (3,820 tokens on average, 6,144 at most) took 71 ms an update on an H200 where batches above 4,096 tokens were not
    recorded, and 58 where all were; its kernels take 53.
    """
    return max(LONGEST_GRAPH, 8192 * (1536 * 8960) // (hidden * intermediate))


def packed_shape(n_rows: int, n_tokens: int, n_targets: int, longest: int) -> tuple[int, int, int, int]:
    """What the shapes of a packed batch follow from: rows, T, N and max_length as `packed_collator` makes them."""
    length = n_tokens + -n_tokens % (LENGTH_STEP if n_tokens <= LONGEST_GRAPH else 2 * LENGTH_STEP)
    return (
        n_rows,
        length,
        1 + n_targets + -(n_targets + 1) % TARGETS_STEP,
        min(length, longest + -longest % LONGEST_STEP),
    )


def packed_collator(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """Puts examples into one sequence.

    The batch has, for T tokens of all rows together and N positions that carry loss, both rounded up (`packed_shape`):

    - input_ids, position_ids [1, T] int64;
    - cu_seq_lens_q, cu_seq_lens_k [rows + 2] int32: where each row begins, the padding at the end being a row too;
    - max_length_q, max_length_k: an int not below the longest row;
    - predicting [N] int64: the positions whose next token carries loss; labels [N]: those tokens. What fills up
      stands in front, NO_LOSS, at least one: the Trainer counts labels from the second on, as if they were shifted;
    - n_tokens: tokens that are no padding.
    """

    def collate(examples: Sequence[Example]) -> dict[str, Any]:
        import torch

        input_ids, position_ids, predicting, labels, starts = [], [], [], [], [0]
        for example in examples:
            begin, length, n_prompt = starts[-1], example["n_tokens"], example["n_prompt"]
            input_ids += example["ids"]
            position_ids += range(length)
            predicting += range(begin + n_prompt - 1, begin + length - 1)
            labels += example["ids"][n_prompt:]
            starts.append(begin + length)
        n_tokens = starts[-1]
        longest = max(example["n_tokens"] for example in examples)
        _, length, n_targets, max_length = packed_shape(len(examples), n_tokens, len(labels), longest)
        padding, fill = length - n_tokens, n_targets - len(labels)
        cu_seq_lens = torch.tensor([*starts, length], dtype=torch.int32)
        return {
            "input_ids": torch.tensor([input_ids + [pad_id] * padding]),
            "position_ids": torch.tensor([[*position_ids, *range(padding)]]),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_length,
            "max_length_k": max_length,
            "predicting": torch.tensor([0] * fill + predicting),
            "labels": torch.tensor([NO_LOSS] * fill + labels),
            "n_tokens": n_tokens,
        }

    return collate


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed batch, in the form that transformers calls.

    query [1, H, T, d], key and value [1, H_kv, T, d]; returns [1, T, H, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    if attention_mask is not None or cu_seq_lens_q is None:
        raise ValueError(f"{NAME} is for packed training rows alone")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch before 2.12
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, **grouped
    )
    return out[None], None


def use_packed(model: nn.Module) -> bool:
    """Switch a model on a GPU to packed attention where it computes the same; False leaves it as it was."""
    from transformers.modeling_utils import AttentionInterface

    config: Any = model.config
    on_gpu = next(model.parameters()).device.type == "cuda"
    if config.model_type not in FAMILIES or getattr(config, "attention_dropout", 0) or not on_gpu:
        return False
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    return True
