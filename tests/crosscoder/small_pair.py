"""Two small models that differ in one layer."""

from __future__ import annotations

import copy
from typing import Any


def small_pair(width: int = 32) -> tuple[Any, Any]:
    """A random three-layer model, and it again with another second layer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40, hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    instruct = MistralForCausalLM(config).eval()
    fine_tuned = copy.deepcopy(instruct)
    with torch.no_grad():
        for parameter in fine_tuned.model.layers[1].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return instruct, fine_tuned
