"""Logit lens: the tokens that a decoder vector, added to the residual stream, would promote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finqa.models import hub
from finqa.models.students import local_model
from finqa.runtime.errors import UserError

AT_ONCE = 1024
"""Latents whose logits are held at one time."""
ONE_MORE = ("gemma", "gemma2", "gemma3_text", "nemotron")
"""Families whose final normalisation multiplies by 1 + its weight."""
WITHOUT_GAIN = ("olmo",)
CENTRED = ("cohere", "cohere2", "nemotron", "olmo", "stablelm", "starcoder2")
"""Families whose final normalisation takes the mean off first (LayerNorm)."""


class Unembedding(NamedTuple):
    """What turns the residual stream into logits; the final normalisation's division is left out."""

    norm_weight: Tensor
    """[d_model] fp32: gain of the final normalisation."""
    weight: Tensor
    """[vocabulary, d_model] fp32."""
    centred: bool = False
    """Whether the normalisation takes the mean over the width off."""


def read_unembedding(model: str, n_tokens: int, revision: str | None = None) -> Unembedding:
    """Read two tensors of a Llama-like model's safetensors, without loading the model.

    Of the vocabulary the first `n_tokens` rows: some models have more, which pad it and are no token.

    From a local folder, else from the Hub, of which only the files that hold the two are downloaded.
    """
    config = _find_file(model, revision, "config.json")
    family = json.loads(config.read_text()).get("model_type") if config else None
    has_gain = family not in WITHOUT_GAIN
    norm = _read_tensor(model, revision, ("model.norm.weight",)).float() + (family in ONE_MORE) if has_gain else None
    weight = _read_tensor(model, revision, ("lm_head.weight", "model.embed_tokens.weight"))
    norm = torch.ones(weight.shape[1]) if norm is None else norm
    return Unembedding(norm, weight[:n_tokens].float(), family in CENTRED)


def promoted_tokens(directions: Tensor, unembedding: Unembedding, n: int) -> list[tuple[int, ...]]:
    """[latent, d_model] -> for every latent the ids of the `n` tokens whose logits its direction raises most, best
    first; none where the direction has no length, as those of a partition can have."""
    best = [torch.topk(logits(some, unembedding), n, dim=-1).indices for some in directions.split(AT_ONCE)]
    lengths = directions.norm(dim=-1).tolist()
    return [tuple(ids) if length > 0 else () for ids, length in zip(torch.cat(best).tolist(), lengths, strict=True)]


def logits(directions: Tensor, unembedding: Unembedding) -> Tensor:
    """[latent, d_model] -> [latent, vocabulary]: what the directions add to the logits."""
    gain, weight = (tensor.to(directions.device) for tensor in unembedding[:2])
    directions = directions - directions.mean(dim=-1, keepdim=True) if unembedding.centred else directions
    return (directions * gain) @ weight.T


def _read_tensor(model: str, revision: str | None, names: tuple[str, ...]) -> Tensor:
    """The first of `names` that the model has; the second of two is where tied weights are stored."""
    from safetensors import safe_open

    index = _find_file(model, revision, "model.safetensors.index.json")
    where = json.loads(index.read_text())["weight_map"] if index else dict.fromkeys(names, "model.safetensors")
    for name in names:
        file = _find_file(model, revision, where[name]) if name in where else None
        if file is None:
            continue
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    raise UserError(f"{model} has no tensor {' or '.join(names)}; the logit lens needs a Llama-like model")


def _find_file(model: str, revision: str | None, name: str) -> Path | None:
    folder = local_model(model) or hub.fetch_folder(model, revision, [name])
    return folder / name if folder is not None and (folder / name).exists() else None
