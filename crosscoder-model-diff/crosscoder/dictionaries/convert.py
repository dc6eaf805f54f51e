"""Turn a published crosscoder, model.pt + cfg.json, into a checkpoint of this project.

    python -m crosscoder.dictionaries.convert SOURCE TARGET --scales 27.49 27.13

SOURCE is a folder with `model.pt` and `cfg.json` (or `config.json`), or the .pt file itself. Two layouts are known,
told apart by their names, and checked by their shapes:

    W_enc [2, d, F]  b_enc [F]  W_dec [F, 2, d]  b_dec [2, d]                  the older crosscoder code
    encoder.weight [2, d, F]  encoder.bias [F]  decoder.weight [2, F, d]  decoder.bias [2, d]   dictionary_learning

with `k` and `threshold` beside them where training kept them. TARGET gets model.safetensors and config.json.

A .pt file is a pickle, which can run code when it is opened: it is read by torch.load(weights_only=True), which takes
tensors and plain containers and refuses all else. Activation scales are in no published file; give those that the
crosscoder was trained with, instruct model first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from crosscoder.dictionaries.checkpoint import save_dictionary
from crosscoder.dictionaries.config import N_MODELS, CrosscoderConfig, ScoreNorm
from finqa.runtime.errors import UserError, report_errors

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.dictionaries.model import BatchTopKCrosscoder

OWN_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
LIBRARY_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
K_NAMES = ("k", "top_k", "batch_topk", "batch_topk_init")
"""What cfg.json may call k."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--scales", type=float, nargs=2, default=(1.0, 1.0), metavar=("INSTRUCT", "FINE_TUNED"))
    parser.add_argument("--k", type=int, help="where neither file says it")
    parser.add_argument("--threshold", type=float, help="where the file has none")
    parser.add_argument("--score-norm", choices=get_args(ScoreNorm), default="sum", help="(default: sum)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = convert(args.source, tuple(args.scales), args.k, args.threshold, args.score_norm)
    save_dictionary(model, args.target, converted_from=args.source.name)
    config = model.config
    print(
        f"{config.n_latents:,} latents, k {config.k}, 2 x {config.d_model}, threshold {model.threshold}: {args.target}"
    )
    if model.threshold is None:
        print(
            "the file has no threshold: give --threshold, or calibrate it (crosscoder.dictionaries.threshold.calibrate)"
        )


def convert(
    source: Path,
    scales: tuple[float, ...] = (1.0, 1.0),
    k: int | None = None,
    threshold: float | None = None,
    score_norm: ScoreNorm = "sum",
) -> BatchTopKCrosscoder:
    """The crosscoder in a published file. What is given stands before what the files say. UserError for a file that
    holds more than tensors, or tensors that are not those of a crosscoder of two models."""
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

    weights = source if source.is_file() else source / "model.pt"
    tensors, settings = read_tensors(weights), _read_settings(weights.parent)
    parameters = parameters_of(tensors, str(weights))
    n_latents, _, d_model = parameters["W_dec"].shape
    said = k or _number(tensors, "k") or next((settings[name] for name in K_NAMES if settings.get(name)), None)
    if said is None:
        raise UserError(f"neither {weights} nor its cfg.json says k; give --k")
    model = BatchTopKCrosscoder(CrosscoderConfig(d_model, n_latents, int(said), score_norm))
    model.load_state_dict(parameters)
    model.activation_scales = scales
    kept = _number(tensors, "threshold")
    # Reference code keeps a negative number until training has set the threshold.
    model.threshold = threshold if threshold is not None else (kept if kept is not None and kept >= 0 else None)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, by name; nothing in it is run."""
    import pickle

    import torch

    if not path.exists():
        raise UserError(f"{path} is missing; SOURCE is a folder with model.pt and cfg.json, or a .pt file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} holds more than tensors, or is damaged, and is not opened: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not tensors by name")
    inner = state.get("state_dict", state)
    return {str(name): value for name, value in inner.items() if isinstance(value, torch.Tensor)}


def parameters_of(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """W_enc [2, d, F], b_enc [F], W_dec [F, 2, d], b_dec [2, d] in fp32, from either layout."""
    if set(OWN_NAMES) <= set(tensors):
        encoder, b_enc, decoder, b_dec = (tensors[name].float() for name in OWN_NAMES)
    elif set(LIBRARY_NAMES) <= set(tensors):
        encoder, b_enc, decoder, b_dec = (tensors[name].float() for name in LIBRARY_NAMES)
        if decoder.ndim == 3:
            decoder = decoder.permute(1, 0, 2)
    else:
        raise UserError(
            f"{source} has {', '.join(sorted(tensors)) or 'no tensors'}, which are not those of a crosscoder"
        )
    shapes = {"b_enc": tuple(b_enc.shape), "b_dec": tuple(b_dec.shape)}
    if b_enc.ndim != 1 or b_dec.ndim != 2 or len(b_dec) != N_MODELS:
        raise UserError(f"{source} has biases of shapes {shapes}; a crosscoder of two models has [F] and [2, d]")
    n_latents, d_model = len(b_enc), b_dec.shape[1]
    wanted = {"W_enc": (N_MODELS, d_model, n_latents), "W_dec": (n_latents, N_MODELS, d_model)}
    for (name, shape), found in zip(wanted.items(), (encoder, decoder), strict=True):
        if tuple(found.shape) != shape:
            raise UserError(f"{source} has {name} of shape {tuple(found.shape)}; its biases ask for {shape}")
    parts = {"W_enc": encoder, "b_enc": b_enc, "W_dec": decoder, "b_dec": b_dec}
    return {name: tensor.contiguous() for name, tensor in parts.items()}


def _number(tensors: dict[str, Tensor], name: str) -> float | None:
    """A single number that training kept beside the parameters."""
    value = tensors.get(name)
    return value.item() if value is not None and value.numel() == 1 else None


def _read_settings(folder: Path) -> dict[str, Any]:
    for name in ("cfg.json", "config.json"):
        path = folder / name
        if path.exists():
            try:
                values = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not JSON ({error})") from None
            return values if isinstance(values, dict) else {}
    return {}


if __name__ == "__main__":
    sys.exit(report_errors(main))
