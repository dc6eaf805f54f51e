"""A folder with a model: whether it is one, and the hash of its weights, so that no model is taken for another."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from finqa.models.adapters import is_adapter
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash

SAFETENSORS = "give a folder with config.json and safetensors weights, as transformers saves one, or a name on the Hub"


def weights_hash(folder: Path | str, consolidated: bool = False) -> str:
    """sha256 over the safetensors files of a folder: the same for a plain copy and for the Hub's cache.

    `consolidated`: with a second copy of the weights that some makers put beside their own, which is never read.
    """
    digest = hashlib.sha256()
    files = sorted(
        path for path in Path(folder).glob("*.safetensors") if consolidated or not path.name.startswith("consolidated")
    )
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    for file in files:
        # The Hub's cache names a large file by the sha256 of its content, which saves reading it.
        blob = file.resolve().name
        content = blob if re.fullmatch("[0-9a-f]{64}", blob) else file_hash(file)
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def check_base(student: Path, base: Path | str) -> None:
    """UserError where `student` was trained on other base weights than those in folder `base`."""
    manifest = student / "run.json"
    recorded = json.loads(manifest.read_text()).get("base_hash") if manifest.exists() else None
    # Earlier runs counted the second copy, too.
    if recorded is not None and recorded not in (weights_hash(base), weights_hash(base, consolidated=True)):
        raise UserError(
            f"{student} was trained on other base weights than those at hand (the hashes differ); "
            "give the base model that it was trained on, or train again under another --run-name"
        )


def check_model_folder(folder: Path) -> None:
    """UserError where a folder holds no causal language model in the form of transformers."""
    path = folder / "config.json"
    if not path.exists():
        if is_adapter(folder):
            raise UserError(f"{folder} holds an adapter (config.json is missing); give the base model it belongs to")
        raise UserError(f"{folder} holds no model (config.json is missing); {SAFETENSORS}")
    try:
        config = json.loads(path.read_text())
        parts = sorted(name for name in ("vision_config", "audio_config") if config.get(name))
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; fetch the model again") from None
    if parts:
        kinds = " and ".join(name.removesuffix("_config") for name in parts)
        raise UserError(f"{folder} reads {kinds} beside text; give a model of text alone")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{folder} holds no causal language model that transformers knows (model_type {kind!r})")
