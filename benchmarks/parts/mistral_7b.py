"""Mistral-7B in its real shapes with random weights: speed and memory can be measured on it, and nothing else."""

from __future__ import annotations

from random import Random
from typing import Any

from finqa.training.rows import Example, example

SHAPES = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Mistral-7B-Instruct-v0.3's, from its public configuration."""

TRAIN_ROWS = 5_929
TRAIN_TOKENS = 6_800_000
"""Rows and tokens of one published epoch; a benchmark over fewer rows is scaled to these."""

LENGTHS = ((0.0, 0.19), (0.05, 0.39), (0.1, 0.51), (0.2, 0.71), (0.3, 0.87), (0.4, 0.93), (0.5, 1.0), (0.6, 1.09),
           (0.7, 1.18), (0.8, 1.27), (0.9, 1.43), (0.95, 1.54), (1.0, 2.02))  # fmt: skip
"""Quantiles of the lengths of 300 FinQA pages over their mean, in characters."""


def random_mistral_7b(layers: int = 32, device: str = "cuda", **others: Any) -> Any:
    """MistralForCausalLM with `layers` decoder layers, bf16, seeded random weights, made on the device; `others` are
    shapes in place of SHAPES."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shapes = {
        **SHAPES,
        **others,
        "num_hidden_layers": layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MistralForCausalLM(MistralConfig(**shapes)).eval()  # pyright: ignore[reportArgumentType]
    finally:
        torch.set_default_dtype(before)


def finqa_like_lengths(count: int, mean: float, seed: int = 0) -> list[int]:
    """Lengths in tokens, distributed like FinQA's pages around `mean`."""
    rng = Random(seed)
    lengths = []
    for _ in range(count):
        u = rng.random()
        upper = next(i for i, (quantile, _) in enumerate(LENGTHS) if quantile >= u)
        (q0, v0), (q1, v1) = LENGTHS[max(upper - 1, 0)], LENGTHS[upper]
        lengths.append(round(mean * (v0 + (v1 - v0) * (u - q0) / max(q1 - q0, 1e-9))))
    return lengths


def random_rows(count: int, seed: int = 0) -> list[Example]:
    """Training rows of random tokens, as long as FinQA's: 1,147 tokens on average, 40 to 160 of them completion."""
    rng = Random(seed)
    rows = []
    for number, length in enumerate(finqa_like_lengths(count, TRAIN_TOKENS / TRAIN_ROWS, seed)):
        ids = (1, *(rng.randrange(3, SHAPES["vocab_size"]) for _ in range(length - 2)), 2)
        rows.append(example(f"row-{number}", ids, length - rng.randrange(40, 160)))
    return rows
