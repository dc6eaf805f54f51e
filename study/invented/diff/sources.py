"""What gives items, and how much each injects: dictionaries, directions of the stream, figures of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from crosscoder.interventions.sets import Addition, Components, Latents, Reading, bias_of, dictionary_digest
from finqa.runtime.paths import renamed_to

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.model import BatchTopKCrosscoder

READ_AT_ONCE = 4096
"""Tokens."""


class Source(Protocol):
    """A method's items at a site."""

    signed: bool
    """Whether an item's sign means nothing: the one that tells more is then chosen with the item."""

    def values(self, reading: Reading) -> Tensor:
        """[tokens, items]."""
        ...

    def products(self, reading: Reading) -> Tensor:
        """[..., items] fp64: products of an item's values, summed over the tokens."""
        ...

    def squares(self, products: Tensor) -> Tensor:
        """[items] fp64: squared length of what each item adds, from its `products`."""
        ...

    def addition(self, items: Sequence[int]) -> Addition:
        """What these items put into the base."""
        ...


class OfDictionary:
    """The latents of a dictionary, by the threshold of inference."""

    signed = False

    def __init__(self, model: BatchTopKCrosscoder):
        self.model = model

    def values(self, reading: Reading) -> Tensor:
        return reading.values(self.model)

    def products(self, reading: Reading) -> Tensor:
        from crosscoder.dictionaries.model import products_of

        return products_of(reading.parts(self.model))

    def squares(self, products: Tensor) -> Tensor:
        return self.model.written_squares(products)

    def addition(self, items: Sequence[int]) -> Addition:
        return Latents(self.model.only(items), range(len(items)))

    @property
    def n(self) -> int:
        return self.model.config.n_latents


class Decoded:
    """All latents of a dictionary, with its bias or without: with it, its reconstruction of the difference.

    Their values take much memory, so few tokens are read at one time.
    """

    reads = True

    def __init__(self, model: BatchTopKCrosscoder, with_bias: bool):
        self._latents = Latents(model, range(model.config.n_latents))
        self._bias = bias_of(model) if with_bias else None
        self.label = self._latents.label | {"kind": "latents and bias" if with_bias else "latents"}

    def __call__(self, reading: Reading) -> Tensor:
        added = torch.cat([self._latents(Reading(part)) for part in reading.pairs.split(READ_AT_ONCE)])
        return added if self._bias is None else added + self._bias(reading)


class Directions:
    """The parts of the difference along unit vectors `basis` [items, d_model], which need not be orthogonal: several
    add the difference's part in the space that they span."""

    signed = True

    def __init__(self, basis: Tensor):
        self.basis = basis.float()

    def values(self, reading: Reading) -> Tensor:
        return reading.difference @ self.basis.to(reading.difference).T

    def products(self, reading: Reading) -> Tensor:
        return self.values(reading).double().square().sum(dim=0)

    def squares(self, products: Tensor) -> Tensor:
        return products

    def addition(self, items: Sequence[int]) -> Addition:
        return Components(orthonormal(self.basis[list(items)]))


@dataclass(frozen=True)
class Ranked:
    """What a dictionary's latents are ranked by; on the CPU."""

    energies: Tensor
    """[latent] fp64."""
    exclusive: Tensor | None
    """[latent] 1 - nu; None for a dictionary that latent scaling does not read."""


def ranked(folder: Path, model: BatchTopKCrosscoder, store: ActivationStore, device: Any) -> Ranked:
    """Of the dictionary that `folder` holds: kept beside it, since each takes a pass over all activations."""
    path, digest = folder / "ranked.pt", dictionary_digest(model)
    kept = torch.load(path, weights_only=True) if path.exists() else {}
    if kept.get("digest") != digest:
        exclusive = exclusivity(model, store, store.split(0.1, 0).held_out)
        kept = {"digest": digest, "energies": energies(OfDictionary(model), store, device),
                "exclusive": None if exclusive is None else exclusive.cpu()}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with renamed_to(path) as temporary:
            torch.save(kept, temporary)
    return Ranked(kept["energies"], kept["exclusive"])


@torch.no_grad()
def energies(source: Source, store: ActivationStore, device: Any) -> Tensor:
    """[items] fp64, on the CPU: mean square of what each item adds, over all tokens of the documents."""
    total: Any = 0.0
    for _, raw in store.batches(torch.arange(len(store))):
        total = total + source.products(Reading(raw.to(device)))
    return source.squares(total).cpu() / len(store)


def top(scores: Tensor, n: int) -> list[int]:
    """The items of the largest scores above 0 that are numbers, the lower number first among equals."""
    values = scores.tolist()
    known = [item for item, value in enumerate(values) if value > 0]
    return sorted(known, key=lambda item: (-values[item], item))[:n]


@torch.no_grad()
def difference_moments(store: ActivationStore, device: Any) -> Tensor:
    """[d_model, d_model] fp64, on the CPU: mean outer product of fine-tuned less base over all tokens, uncentred."""
    width = store.config.d_model
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    for _, raw in store.batches(torch.arange(len(store))):
        difference = Reading(raw.to(device)).difference.double()
        total += difference.T @ difference
    return total.cpu() / len(store)


def principal(moments: Tensor, n: int) -> Tensor:
    """[n, d_model] fp32: the directions of the largest eigenvalues, largest first."""
    return torch.linalg.eigh(moments).eigenvectors.flip(-1)[:, :n].T.float().contiguous()


@torch.no_grad()
def exclusivity(model: BatchTopKCrosscoder, store: ActivationStore, held_out: Tensor) -> Tensor | None:
    """[latent]: 1 - nu of latent scaling on held-out documents, not a number where it cannot be trusted.

    None for a dictionary that latent scaling does not read.
    """
    from crosscoder.analysis.latent_scaling import latent_scaling

    if not model.config.compares_models:
        return None
    scaling = latent_scaling(model, (raw for _, raw in store.batches(held_out)))
    return torch.where(scaling.trusted, 1 - scaling.nu_err[:, 1], torch.nan)


def orthonormal(vectors: Tensor) -> Tensor:
    """[n, d_model] -> [rank, d_model] fp32: an orthonormal basis of what they span; the first k of independent ones are
    a basis of the first k. A vector that those before it span adds none."""
    basis: list[Tensor] = []
    for vector in torch.nn.functional.normalize(vectors.double(), dim=-1):
        left = vector
        for _ in range(2):  # once more takes out what rounding has left
            for direction in basis:
                left = left - (left @ direction) * direction
        if left.norm() > 1e-6:
            basis.append(left / left.norm())
    return torch.stack(basis).float() if basis else vectors.new_zeros(0, vectors.shape[-1]).float()
