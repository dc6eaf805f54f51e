"""Crosscoders on disk.

A checkpoint folder holds `model.safetensors` (W_enc, b_enc, W_dec, b_dec in fp32, b_enc_before of a stagewise SAE,
activation_means where the data were centred) and `config.json` (shape, activation scales, thresholds, and what it was
trained with and on). While a run is under way it also holds `training_state.safetensors`, from which the run goes on as
if it had never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosscoder.dictionaries.config import N_MODELS, CrosscoderConfig, TrainingConfig, check_types, from_dict
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import file_hash
from finqa.runtime.paths import json_text, renamed_to, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.dictionaries.model import BatchTopKCrosscoder

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
STATE_FILE = "training_state.safetensors"
MEANS = "activation_means"


class CheckpointConfig(NamedTuple):
    """What config.json of a checkpoint says."""

    crosscoder: CrosscoderConfig
    activation_scales: tuple[float, ...]
    threshold: float | None
    delta_threshold: float | None
    training: TrainingConfig | None
    """None where the checkpoint does not say, as in one converted from another format."""
    activations: dict[str, Any]
    """config.json of the activation set it was trained on; empty where the checkpoint does not say."""
    files: dict[str, str]
    """SHA-256 of the files beside it; empty in a checkpoint of an earlier version."""
    further_thresholds: tuple[float, ...]
    largest_norms: tuple[float, ...]


def save_dictionary(model: BatchTopKCrosscoder, folder: Path | str, **about: object) -> Path:
    """Write model.safetensors and config.json (shape, scales, threshold; `about` holds further JSON sections)."""
    from dataclasses import asdict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float() for name, p in model.named_parameters()}
    if model.activation_means is not None:
        tensors[MEANS] = model.activation_means.float()
    save_tensors(folder / MODEL_FILE, tensors)
    config = {
        "files": {MODEL_FILE: file_hash(folder / MODEL_FILE)},
        "crosscoder": asdict(model.config),
        "activation_scales": list(model.activation_scales),
        "threshold": model.threshold,
        "delta_threshold": model.delta_threshold,
        "further_thresholds": list(model.further_thresholds),
        "largest_norms": list(model.largest_norms),
        **about,
    }
    write_atomically(folder / CONFIG_FILE, json_text(config, indent=2) + "\n")
    return folder


def load_dictionary(name: Path | str) -> BatchTopKCrosscoder:
    """Load from a local folder, or from the Hub where no such folder is. On the CPU, in fp32, of its method's class."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from crosscoder.dictionaries.methods import new_dictionary

    folder = find_checkpoint(name)
    config = read_config(folder)
    check_files(folder, config.files, "train the crosscoder again with --overwrite")
    model = new_dictionary(config.crosscoder)
    try:
        tensors = load_file(folder / MODEL_FILE)
        bad = [name for name, each in tensors.items() if each.dtype != torch.float32 or not each.isfinite().all()]
        if bad:
            raise UserError(
                f"{folder / MODEL_FILE}: {bad[0]} is not fp32 and finite; train the crosscoder again with --overwrite"
            )
        model.activation_means = tensors.pop(MEANS, None)
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / MODEL_FILE} does not hold the crosscoder of its {CONFIG_FILE}: {reason}") from None
    model.activation_scales = config.activation_scales
    model.threshold, model.delta_threshold = config.threshold, config.delta_threshold
    model.further_thresholds, model.largest_norms = config.further_thresholds, config.largest_norms
    return model


def find_checkpoint(name: Path | str) -> Path:
    """A folder with a checkpoint: `name` itself, else its copy from the Hub; UserError where neither has one."""
    if (Path(name) / CONFIG_FILE).exists():
        return Path(name)
    folder = None
    if not Path(name).is_absolute():
        from finqa.models.hub import fetch_folder

        folder = fetch_folder(str(name))
    if folder is None or not (folder / CONFIG_FILE).exists():
        raise UserError(f"no crosscoder at {name}, neither a local folder nor a Hub repository; make it with train.py")
    return folder


def read_config(folder: Path) -> CheckpointConfig:
    """Read config.json of a checkpoint folder."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
        scales = tuple(float(scale) for scale in values["activation_scales"])
        crosscoder = from_dict(CrosscoderConfig, values["crosscoder"], str(path))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a crosscoder's configuration ({error!r}); train it again") from None
    if len(scales) != crosscoder.n_inputs:
        raise UserError(f"{path} has {len(scales)} activation scales; there is one for each of {crosscoder.n_inputs}")
    training = from_dict(TrainingConfig, values["training"], str(path)) if values.get("training") else None
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UserError(f"{path} has the activation scales {list(scales)}; they are above 0")
    about = {name: values.get(name) for name in ("threshold", "delta_threshold")}
    about |= {name: values.get(name, {}) for name in ("activations", "files")}
    for name in ("further_thresholds", "largest_norms"):  # dictionaries of earlier versions have none
        found = values.get(name, [])
        about[name] = tuple(found) if isinstance(found, list) else found
    check_types(CheckpointConfig, about, str(path))
    if len(about["largest_norms"]) not in (0, N_MODELS):
        raise UserError(f"{path} has {len(about['largest_norms'])} largest norms; there is one for each model, or none")
    return CheckpointConfig(crosscoder, scales, training=training, **about)


def check_files(folder: Path, files: dict[str, str], remedy: str) -> None:
    """UserError where a file is not as it was written, by its SHA-256."""
    for name, digest in files.items():
        if not (folder / name).exists() or file_hash(folder / name) != digest:
            raise UserError(f"{folder / name} is not the file that was written; {remedy}")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name and rename it, so that a killed run leaves no half file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_to(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in its order; not a copy where it is contiguous."""
    import torch

    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def tensors_hash(tensors: Iterable[Tensor], text: str = "") -> str:
    """XXH3 (64 bits, hexadecimal) of `text` and of the bytes of all tensors in their order.

    It sees damage, not intent, and takes 0.15 s a GB on one core, less than reading them from a disk.
    """
    from xxhash import xxh3_64

    digest = xxh3_64(text.encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def save_training_state(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write what a run goes on from; `progress` is small and JSON, and lies in the same file as the tensors."""
    text = json.dumps(progress)
    save_tensors(folder / STATE_FILE, tensors, {"progress": text, "xxh3": _state_hash(tensors, text)})


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The inverse of `save_training_state`; None where no run is under way in `folder`.

    Raises UserError where it is not as it was written.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STATE_FILE
    if not path.exists():
        return None
    damaged = UserError(f"{path} is not the file that was written; train from the start with --overwrite")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
    except SafetensorError:
        raise damaged from None
    # A state of an earlier version has no checksum.
    if "xxh3" in about and about["xxh3"] != _state_hash(tensors, about.get("progress", "")):
        raise damaged
    return tensors, json.loads(about["progress"])


def _state_hash(tensors: dict[str, Tensor], progress: str) -> str:
    names = sorted(tensors)
    return tensors_hash((tensors[name] for name in names), json.dumps([names, progress]))
