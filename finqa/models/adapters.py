"""Which adapters are handled exactly: plain LoRA on linear layers, known from adapter_config.json alone.

Exactly means: with the adapter switched off the model is its base, and the merged weights are base + scale * B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finqa.runtime.errors import UserError

CONFIG = "adapter_config.json"
ANY_VALUE = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
})  # fmt: skip
"""Settings that may have any value in a plain adapter. Those of a start count by `init_lora_weights` alone."""
PLAIN = {"bias": "none"}
"""Values that further settings have in a plain adapter; every setting not named here must be null, false or empty."""
STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations (`init_lora_weights`) that leave the base weights unchanged, beside true and false."""
SHARED = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "word_embeddings")
"""Names of embeddings and heads, which are one matrix in a model with tied weights."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / CONFIG).exists()


def adapter_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the adapter in `folder`; None where there is none. Raises UserError where they are damaged."""
    path = folder / CONFIG
    if not is_adapter(folder):
        return None
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict) or not isinstance(settings.get("r", 1), int):
            raise ValueError
    except ValueError:
        raise UserError(f"{path} is damaged; fetch the adapter again, or train it again") from None
    return settings


def check_adapter(folder: Path, base: Path | str) -> None:
    """Raises UserError, before anything is loaded, where the adapter in `folder` is not handled exactly.

    Args:
        folder: An adapter or a whole model; the latter is always fine.
        base: Folder of the base model.
    """
    check_plain(folder)
    check_tied((adapter_settings(folder) or {}).get("target_modules") or [], base)


def check_plain(folder: Path) -> None:
    """Raises UserError where `folder` holds an adapter of another kind than plain LoRA, whatever its base."""
    settings = adapter_settings(folder)
    if settings is None:
        return
    if problem := _not_plain(settings):
        raise UserError(
            f"the adapter in {folder} is not plain LoRA ({problem}); only plain LoRA on linear layers is recorded, "
            "served and merged exactly: train it again so, or merge it by the library that made it"
        )


def check_tied(modules: str | Iterable[str], base: Path | str) -> None:
    """Raises UserError where an adapter is on a head or embedding that are one matrix in the base in folder `base`.

    `modules`: names, or an expression over whole names, as peft takes them.
    """
    from transformers import AutoConfig

    named = sorted(name for name in SHARED if _takes(modules, name))
    if named and AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings:
        raise UserError(
            f"{base} has one matrix as embedding and head, so an adapter on {', '.join(named)} alone cannot be merged; "
            f"leave {'it' if len(named) == 1 else 'them'} out of --lora-modules"
        )


def check_layers(pair: Any, folder: Path) -> None:
    """Raises UserError where the loaded adapter of `folder` is on bare parameters, as peft puts it on experts."""
    from peft.tuners.lora.layer import ParamWrapper

    found = sorted(
        {name.rpartition(".")[2] for name, module in pair.named_modules() if isinstance(module, ParamWrapper)}
    )
    if found:
        raise UserError(
            f"the adapter in {folder} is not plain LoRA (it is on parameters of {', '.join(found)}, not on linear "
            "layers); train it again on the attention's layers"
        )


def _takes(modules: str | Iterable[str], name: str) -> bool:
    if isinstance(modules, str):
        return any(re.fullmatch(modules, prefix + name) for prefix in ("", "model.", "transformer.", "gpt_neox."))
    return name in {module.rpartition(".")[2] for module in modules}


def _not_plain(settings: dict[str, Any]) -> str | None:
    """What makes the adapter another than plain LoRA; None where nothing does."""
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        return f"peft_type is {kind}"
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS:
        return f"init_lora_weights is {start}, which changes the base weights"
    # Settings of later releases are refused as well: what they do is not known here.
    for name in sorted(settings.keys() - ANY_VALUE):
        value = settings[name]
        if value and value != PLAIN.get(name):
            return f"{name} is {json.dumps(value)[:60]}"
    return None


def write_canonical(folder: Path) -> None:
    """Sort the names in the adapter's settings, so that equal runs write equal files: peft keeps them as sets."""
    settings = adapter_settings(folder)
    if settings is not None:
        plain = {name: sorted(value) if _are_names(value) else value for name, value in settings.items()}
        (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
