"""A difference SAE as SAELens' JumpReLU SAE (sae_weights.safetensors and cfg.json), both ways.

SAELens (6.54) has no crosscoder: of the methods here only the difference SAE, which has one input, is of a form that it
has. Its BatchTopK SAEs are kept as JumpReLU SAEs, too. Scales and means are folded into the weights, so that the SAE
reads the raw difference of the two models' activations and gives it back; the values of latents stay as they are.

Read is a JumpReLU SAE with one threshold for all latents, on values or on values times the length of the decoder
vector: that is what batch top-k leaves. Thresholds that were trained latent by latent do not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.convert.files import ABOVE_ROUNDING, read_settings, read_tensors
from crosscoder.dictionaries.checkpoint import save_tensors
from crosscoder.dictionaries.config import CrosscoderConfig, ScoreNorm
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.dictionaries.model import BatchTopKCrosscoder

WEIGHTS, SETTINGS = "sae_weights.safetensors", "cfg.json"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
NORMALISED_OUTSIDE = ("none", "expected_average_only_in")
"""What may be done to activations before they enter; of the second kind only the factor is unknown here (--scales)."""
SAME = 1e-5
"""Relative difference up to which thresholds are one."""
READS = "fine-tuned less instruct activations"


def write_sae(model: BatchTopKCrosscoder, folder: Path, activations: dict[str, Any]) -> None:
    """Write the folder that SAE.load_from_disk opens. `activations`: what the dictionary was trained on.

    Raises UserError for another method, or a dictionary without a threshold.
    """
    import torch

    config = model.config
    if config.method != "difference-sae":
        raise UserError(
            f"SAELens has no crosscoder, and cannot hold {config.method}: it takes difference-sae alone; --to "
            "dictionary-learning takes batchtopk and l1"
        )
    threshold = torch.as_tensor(model.latent_thresholds(), dtype=torch.float64) * ABOVE_ROUNDING
    scale = model.activation_scales[0]
    W_enc, W_dec = model.W_enc[0].detach().double() * scale, model.W_dec[:, 0].detach().double() / scale
    b_enc, b_dec = model.b_enc.detach().double(), model.b_dec[0].detach().double() / scale
    if model.activation_means is not None:
        means = model.activation_means[0].double()
        b_enc, b_dec = b_enc - means @ W_enc, b_dec + means
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    tensors["threshold"] = threshold / model.selection_norms().detach().double()
    save_tensors(folder / WEIGHTS, {name: tensor.float().cpu() for name, tensor in tensors.items()})
    said = {name: activations[name] for name in ("model", "layer", "site", "dataset") if name in activations}
    # Without a version SAELens takes the file for one of an early form.
    metadata = {"sae_lens_version": "6.0.0", "reads": READS, "k": config.k, "activation_scale": scale, **said}
    settings = {
        "architecture": "jumprelu",
        "d_in": config.d_model,
        "d_sae": config.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    write_json(folder / SETTINGS, settings)


def read_sae(
    folder: Path, scales: tuple[float, ...] | None = None, k: int | None = None, threshold: float | None = None
) -> BatchTopKCrosscoder:
    """The difference SAE in a folder that SAELens, or `write_sae`, wrote. What is given stands before what it says.

    Raises UserError for another architecture, or thresholds that no dictionary here can have.
    """
    from crosscoder.dictionaries.methods import new_dictionary

    settings, weights = read_settings(folder), folder / WEIGHTS
    architecture, normalised = settings.get("architecture"), settings.get("normalize_activations", "none")
    if architecture != "jumprelu" or normalised not in NORMALISED_OUTSIDE:
        raise UserError(
            f"{folder / SETTINGS} is of a {architecture} SAE with activations normalised by {normalised}; only a "
            f"jumprelu one with {' or '.join(NORMALISED_OUTSIDE)} can be converted (save_inference_model makes one of "
            "a BatchTopK SAE)"
        )
    tensors = {name: tensor.double() for name, tensor in read_tensors(weights).items()}
    if missing := [name for name in NAMES if name not in tensors]:
        raise UserError(f"{weights} has no {', '.join(missing)}: it is no JumpReLU SAE")
    W_enc, b_enc, W_dec, b_dec, thresholds = (tensors[name] for name in NAMES)
    n_latents, d_model = W_dec.shape if W_dec.ndim == 2 else (0, 0)
    wanted = ((d_model, n_latents), (n_latents,), (n_latents, d_model), (d_model,), (n_latents,))
    for name, shape in zip(NAMES, wanted, strict=True):
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{weights} has {name} of shape {tuple(tensors[name].shape)}; W_dec asks for {shape}")
    if settings.get("apply_b_dec_to_input"):
        b_enc = b_enc - b_dec @ W_enc
    metadata = settings.get("metadata") or {}
    scale = metadata.get("activation_scale", 1.0)  # of a file that was written here: the decoder has unit norm again
    W_enc, W_dec, b_dec = W_enc / scale, W_dec * scale, b_dec * scale
    k = k or metadata.get("k") or (metadata.get("training_architecture_details") or {}).get("k")
    if k is None:
        raise UserError(f"{folder / SETTINGS} does not say k, the mean number of active latents a token; give --k")
    norm, one = _one_threshold(thresholds, W_dec.norm(dim=-1), str(weights))
    model = new_dictionary(CrosscoderConfig(d_model, n_latents, round(k), norm, method="difference-sae"))
    parameters = {"W_enc": W_enc[None], "b_enc": b_enc, "W_dec": W_dec[:, None], "b_dec": b_dec[None]}
    model.load_state_dict({name: tensor.float() for name, tensor in parameters.items()})
    model.threshold = one if threshold is None else threshold
    model.activation_scales = scales or (scale,)
    return model


def _one_threshold(thresholds: Tensor, norms: Tensor, source: str) -> tuple[ScoreNorm, float]:
    """What [latent] thresholds on values are a single threshold of: scores by decoder norms, or values."""
    choices: tuple[tuple[ScoreNorm, Tensor], ...] = (("sum", thresholds * norms), ("none", thresholds))
    for norm, scores in choices:
        if bool((scores.max() - scores.min()) <= SAME * scores.abs().max()):
            return norm, float(scores.mean())
    raise UserError(
        f"{source} has a threshold of its own for every latent, from {float(thresholds.min()):.4g} to "
        f"{float(thresholds.max()):.4g}, and a dictionary here has one; an SAE that was trained by batch top-k can be "
        "converted"
    )
