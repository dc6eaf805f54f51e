"""Tensors and settings of a folder that another library wrote.

A .pt file is a pickle, which can run code when it is opened: it is read by torch.load(weights_only=True), which takes
tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ABOVE_ROUNDING = 1 + 1e-6
"""What a threshold is multiplied by when it is written. Calibration leaves a threshold that is the score of some token,
which is not active itself: a library that adds in another order would find it a rounding above."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file, by name; nothing in it is run. UserError where it is damaged, or holds
    something else."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} holds more than tensors, or is damaged, and is not opened: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not tensors by name")
    inner = state.get("state_dict", state)
    # A compiled module puts its own name before those of its parameters.
    named = {str(name).removeprefix("_orig_mod."): value for name, value in inner.items()}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def number(tensors: dict[str, Tensor], name: str) -> float | None:
    """A single number that training kept beside the parameters."""
    value = tensors.get(name)
    return value.item() if value is not None and value.numel() == 1 else None


def read_settings(folder: Path) -> dict[str, Any]:
    """cfg.json, else config.json of a folder; empty where it has neither."""
    for path in (folder / name for name in ("cfg.json", "config.json")):
        if path.exists():
            try:
                values = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not JSON ({error})") from None
            return values if isinstance(values, dict) else {}
    return {}
