"""What is read of a token to say something about its question: a dictionary's latents, or a simple baseline.

A readout gives each token a number for every item, never negative, 0 where the item is silent; so every item, a latent
or not, is scored alike. A principal component counts twice, once in each direction, as a latent has one sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

BATCH_TOKENS = 4096

Readout = Callable[[Tensor], Tensor]
"""Raw activations [n, 2, d_model] on the subject's device -> [n, items], not negative, without gradient."""


@dataclass(frozen=True)
class Subject:
    """What is asked whether it finds what fine-tuning added."""

    name: str
    read: Readout
    directions: Tensor | None
    """[items, d_model], in the models' own units: what one unit of an item adds to the fine-tuned model's activation,
    or to the difference where the item reads that alone. None for an item without a direction."""
    model: BatchTopKCrosscoder | None = None
    """The dictionary; None for a baseline."""
    device: torch.device | str = "cpu"
    """Where `read` takes its activations."""
    decode: Readout | None = None
    """Raw activations -> [n, d_model]: all that the subject says of x[1] - x[0], in the models' own units. None where
    it says nothing of it."""

    @property
    def compares(self) -> bool:
        """Whether an item has a decoder vector for each model, so that Delta and latent scaling are defined."""
        return self.model is not None and self.model.config.compares_models


def dictionary_subject(model: BatchTopKCrosscoder, name: str | None = None) -> Subject:
    """The latents of a dictionary of any method, at the inference threshold, on the model's device."""

    @torch.no_grad()
    def read(raw: Tensor) -> Tensor:
        return model.encode(model.scale(raw))

    @torch.no_grad()
    def decode(raw: Tensor) -> Tensor:
        return model.difference(model.unscale(model(model.scale(raw))))

    decoder = model.raw_decoder()
    return Subject(name or model.config.method, read, decoder[:, -1], model, model.b_dec.device, decode)


def norm_subject(device: torch.device | str = "cpu") -> Subject:
    """One item: the length of x[1] - x[0], in the models' own units."""
    return Subject("norm of the difference", lambda raw: difference(raw).norm(dim=-1, keepdim=True), None, None, device)


def pca_subject(
    store: ActivationStore, indices: Tensor, n_components: int = 32, device: torch.device | str = "cpu"
) -> Subject:
    """2 * n_components items: the first principal components of x[1] - x[0] over the tokens `indices`, the mean taken
    off, each in its own direction (even items) and against it (odd ones)."""
    mean, components = principal_components(store, indices, n_components, device)
    directions = torch.stack([components, -components], dim=1).flatten(0, 1)

    def read(raw: Tensor) -> Tensor:
        return torch.relu((difference(raw) - mean) @ directions.T)

    name = "PCA of the difference"
    return Subject(name, read, directions, None, device, lambda raw: read(raw) @ directions + mean)


def random_subject(store: ActivationStore, indices: Tensor, n_items: int, seed: int = 0) -> Subject:
    """Random directions, drawn uniformly, on which x[1] - x[0] less its mean over `indices` is projected: dense items
    that nothing was learnt for, as many as a dictionary has latents."""
    mean, _ = principal_components(store, indices, 0)
    drawn = torch.randn(n_items, len(mean), generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(drawn, dim=-1)
    return Subject("random directions", lambda raw: torch.relu((difference(raw) - mean) @ directions.T), directions)


def mean_difference_subject(store: ActivationStore, indices: Tensor, device: torch.device | str = "cpu") -> Subject:
    """One item: how far x[1] - x[0] goes along its mean over the tokens `indices`."""
    mean, _ = principal_components(store, indices, 0, device)
    direction = torch.nn.functional.normalize(mean, dim=0)[None]
    return Subject("mean difference", lambda raw: torch.relu(difference(raw) @ direction.T), direction, None, device)


def principal_components(
    store: ActivationStore, indices: Tensor, n: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Mean [d_model] and principal components [n, d_model] of x[1] - x[0], fp32, the largest first, in one pass.

    UserError where there are fewer dimensions than components.
    """
    d_model = store.config.d_model
    if n > d_model:
        raise UserError(f"{n} principal components were asked for, and activations have {d_model} dimensions")
    sums = torch.zeros(d_model, dtype=torch.float64, device=device)
    products = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
    for _, raw in store.batches(indices, BATCH_TOKENS):
        differences = difference(raw.to(device))
        sums += differences.sum(dim=0, dtype=torch.float64)
        products += (differences.T @ differences).double()
    mean = sums / len(indices)
    covariance = products / len(indices) - torch.outer(mean, mean)
    _, vectors = torch.linalg.eigh(covariance)  # eigenvalues rise
    return mean.float(), vectors.T.flip(0)[:n].float()


def difference(raw: Tensor) -> Tensor:
    """[n, 2, d_model] -> [n, d_model] fp32: fine-tuned less instruct, subtracted in fp32 and not as stored."""
    return raw[:, 1].float() - raw[:, 0].float()
