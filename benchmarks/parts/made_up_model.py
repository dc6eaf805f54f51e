"""Folders that pass for a model or an adapter, so that speed can be measured without a network.

A weightless one is a configuration and a tokenizer that is made on the spot: vLLM makes up its weights, and no 14 GB
are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from finqa.runtime.paths import SHIPPED_DATA

POCKET = SHIPPED_DATA / "models" / "pocket-mistral"
SPECIAL = ("<unk>", "<s>", "</s>")


def write_weightless_mistral(folder: Path, shapes: Mapping[str, Any]) -> Path:
    """Write config.json and a tokenizer of as many tokens as `shapes` has. Returns the folder.

    Neither has an end token: every reply goes on to the limit, so that all that is compared writes as many tokens.
    """
    from transformers import MistralConfig, PreTrainedTokenizerFast

    config = MistralConfig(**{**shapes, "eos_token_id": None})
    config.architectures = ["MistralForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(shapes["vocab_size"]), unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_model(model: Any, folder: Path) -> Path:
    """Write a model whose weights are there, as one that main.py takes: with chat template and end token.

    Returns the folder.
    """
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(model.config.vocab_size), bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", chat_template=(POCKET / "chat_template.jinja").read_text(),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def byte_level_tokenizer(size: int) -> Any:
    """A byte-level BPE tokenizer of exactly `size` tokens: bytes, then pairs of letters, then longer words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {
        token: number for number, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    if size < len(vocabulary):
        raise ValueError(f"a byte-level tokenizer has at least {len(vocabulary)} tokens, not {size}")
    merges: list[tuple[str, str]] = []
    words = list(ascii_lowercase)
    while len(vocabulary) < size:
        longer = []
        for word, letter in product(words, ascii_lowercase):
            if len(vocabulary) < size:
                vocabulary[word + letter] = len(vocabulary)
                merges.append((word, letter))
                longer.append(word + letter)
        words = longer
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def write_random_adapter(folder: Path, shapes: Mapping[str, Any], r: int, alpha: int) -> Path:
    """Write a LoRA adapter of rank r on q, k, v and o of every layer, bf16, seeded random. Returns the folder."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    d, width = shapes["hidden_size"], shapes["head_dim"]
    heads, shared = shapes["num_attention_heads"] * width, shapes["num_key_value_heads"] * width
    sizes = {"q_proj": (d, heads), "k_proj": (d, shared), "v_proj": (d, shared), "o_proj": (heads, d)}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer, (name, (d_in, d_out)) in product(range(shapes["num_hidden_layers"]), sizes.items()):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        for part, shape in (("lora_A", (r, d_in)), ("lora_B", (d_out, r))):
            weights[f"{prefix}.{part}.weight"] = 0.01 * torch.randn(*shape, generator=generator).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=r, lora_alpha=alpha, target_modules=list(sizes), task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
