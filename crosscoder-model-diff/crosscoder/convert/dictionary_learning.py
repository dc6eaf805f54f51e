"""BatchTopKCrossCoder of dictionary_learning (github.com/science-of-finetuning/dictionary_learning), both ways.

Read are a .pt file with its cfg.json, and the folder that the library itself keeps on the Hub (model.safetensors,
config.json). Two sets of names are known, and checked by their shapes:

    W_enc [2, d, F]  b_enc [F]  W_dec [F, 2, d]  b_dec [2, d]                  the older crosscoder code
    encoder.weight [2, d, F]  encoder.bias [F]  decoder.weight [2, F, d]  decoder.bias [2, d]   dictionary_learning

with `k` and `threshold` beside them where training kept them, and in the library's newer files the normalisation of
activations, of which it keeps a mean and one scale for each model, as a checkpoint here does.

Written is the Hub's form, which BatchTopKCrossCoder.from_pretrained(FOLDER, from_hub=True) opens, whether FOLDER is
here or there. It has one threshold, so a partition and a dedicated crosscoder, which have several, do not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.convert.files import ABOVE_ROUNDING, number, read_settings, read_tensors
from crosscoder.dictionaries.checkpoint import save_tensors
from crosscoder.dictionaries.config import N_MODELS, CrosscoderConfig, ScoreNorm
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.dictionaries.model import BatchTopKCrosscoder

OWN_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
LIBRARY_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
K_NAMES = ("k", "top_k", "batch_topk", "batch_topk_init")
"""What cfg.json may call k."""
NORMS: dict[ScoreNorm, tuple[int, str]] = {"sum": (1, "CROSSCODER"), "l2": (2, "SAE"), "none": (4, "NONE")}
"""The library's number and name for each way of scoring; MIXED (3) and DECOUPLED (5) have no counterpart here."""


def read_crosscoder(
    weights: Path,
    scales: tuple[float, ...] | None = None,
    k: int | None = None,
    threshold: float | None = None,
    score_norm: ScoreNorm | None = None,
) -> BatchTopKCrosscoder:
    """The crosscoder in a file of weights. What is given stands before what the file says.

    Raises UserError for tensors that are not those of a crosscoder of two models, or of one that scores otherwise.
    """
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

    tensors, settings = read_tensors(weights), read_settings(weights.parent)
    parameters = parameters_of(tensors, str(weights))
    n_latents, _, d_model = parameters["W_dec"].shape
    said = k or number(tensors, "k") or next((settings[name] for name in K_NAMES if settings.get(name)), None)
    if said is None:
        raise UserError(f"neither {weights} nor its cfg.json says k; give --k")
    norm = score_norm or _score_norm(tensors, str(weights))
    model = BatchTopKCrosscoder(CrosscoderConfig(d_model, n_latents, int(said), norm))
    model.load_state_dict(parameters)
    kept = number(tensors, "threshold")
    # The library keeps a negative number until training has set the threshold.
    model.threshold = threshold if threshold is not None else (kept if kept is not None and kept >= 0 else None)
    mean, scale = tensors.get("activation_mean"), tensors.get("activation_global_scale")
    if mean is not None and scale is not None and not mean.isnan().any():
        model.activation_means = mean.float() if mean.any() else None
        model.activation_scales = tuple(scale.tolist())
    model.activation_scales = scales or model.activation_scales
    return model


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


def _score_norm(tensors: dict[str, Tensor], source: str) -> ScoreNorm:
    found = number(tensors, "code_normalization_id")
    for norm, (value, _) in NORMS.items():
        if found in (None, value):
            return norm
    raise UserError(
        f"{source} scores latents by code_normalization_id {found:g} (MIXED or DECOUPLED), which no dictionary here "
        f"does; one of {', '.join(name for _, name in NORMS.values())} can be converted"
    )


def write_crosscoder(model: BatchTopKCrosscoder, folder: Path) -> None:
    """Write model.safetensors and config.json, which read raw activations and give raw reconstructions.

    Raises UserError for a method that has no place in the library's class, or a crosscoder without a threshold.
    """
    import torch

    config = model.config
    if config.method not in ("batchtopk", "l1"):
        other = "; --to sae-lens takes it" if config.method == "difference-sae" else ""
        raise UserError(
            f"dictionary_learning's BatchTopKCrossCoder has one threshold and one value for both models, and cannot "
            f"hold {config.method}{other or '; batchtopk and l1 can be converted'}"
        )
    threshold = model.latent_thresholds() * ABOVE_ROUNDING
    value, name = NORMS[config.score_norm]
    scales = torch.tensor(model.activation_scales)
    means = model.activation_means
    tensors: dict[str, Any] = {
        "encoder.weight": model.W_enc.detach(),
        "encoder.bias": model.b_enc.detach(),
        "decoder.weight": model.W_dec.detach().permute(1, 0, 2),
        "decoder.bias": model.b_dec.detach(),
        "k": torch.tensor(config.k, dtype=torch.int),
        "threshold": torch.tensor(threshold),
        "code_normalization_id": torch.tensor(value),
        # The library takes its scale from a standard deviation for a mean length; these two give ours.
        "target_rms": torch.tensor(float(config.d_model) ** 0.5),
        "activation_std": (1 / scales)[:, None].expand(N_MODELS, config.d_model),
        "activation_mean": torch.zeros_like(model.b_dec) if means is None else means,
        "activation_global_scale": scales,
    }
    save_tensors(folder / "model.safetensors", {key: tensor.cpu() for key, tensor in tensors.items()})
    shape = {"activation_dim": config.d_model, "dict_size": config.n_latents, "num_layers": N_MODELS}
    write_json(folder / "config.json", shape | {"k": config.k, "code_normalization": name})
