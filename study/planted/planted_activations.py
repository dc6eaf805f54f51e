"""Activations made from known directions, to see what a dictionary finds of what is there.

A token's activation in a model is the sum of the features that are active on it, times their strength in that model,
plus noise and a constant. A feature's strength is 1 in both models (shared), 0 in one of them (exclusive to the other),
or less than 1 in the instruct model (`weak`: a latent may wrongly look exclusive for it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore, StoredDocument
from crosscoder.activations.writer import SetWriter

SEED_OFFSET = 7_654_321


@dataclass(frozen=True)
class Kind:
    """Features that are alike but for their direction."""

    name: str
    n: int
    strength: tuple[float, float]
    """In the instruct and the fine-tuned model."""
    frequency: float
    """Share of tokens on which one of them is active, independently of all others."""
    magnitude: float = 1.0
    """Where active it is this, times a factor drawn from 0.75 to 1.25."""


@dataclass(frozen=True)
class Planted:
    """Made activations and what they were made from."""

    activations: Tensor
    """[tokens, 2, d_model]."""
    directions: Tensor
    """[feature, d_model], of length 1, drawn uniformly."""
    strength: Tensor
    """[feature, 2]."""
    kinds: list[str]
    """Name of each feature's kind."""
    values: Tensor
    """[tokens, feature]: magnitude where active, else 0."""

    def of(self, kind: str) -> Tensor:
        """Numbers of the features of a kind."""
        return torch.tensor([j for j, name in enumerate(self.kinds) if name == kind])


def plant(kinds: list[Kind], n_tokens: int, d_model: int, seed: int, noise: float = 0.02) -> Planted:
    """`noise` is the standard deviation of what is added to every number of every activation."""
    # Not the stream of a dictionary of the same seed, whose first directions would be the planted ones.
    generator = torch.Generator().manual_seed(SEED_OFFSET + seed)
    n_features = sum(kind.n for kind in kinds)
    directions = torch.randn(n_features, d_model, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    each = [kind for kind in kinds for _ in range(kind.n)]
    frequency = torch.tensor([kind.frequency for kind in each])
    magnitude = torch.tensor([kind.magnitude for kind in each])
    strength = torch.tensor([kind.strength for kind in each])
    active = torch.rand(n_tokens, n_features, generator=generator) < frequency
    values = active * magnitude * (0.75 + 0.5 * torch.rand(n_tokens, n_features, generator=generator))
    constant = torch.randn(2, d_model, generator=generator) * 0.1 / d_model**0.5
    parts = [(values * strength[:, m]) @ directions + constant[m] for m in range(2)]
    activations = torch.stack(parts, dim=1)
    activations += noise * torch.randn(activations.shape, generator=generator)
    return Planted(activations, directions, strength, [kind.name for kind in each], values)


def planted_store(planted: Planted, folder: Path, document_tokens: int = 200) -> ActivationStore:
    """Write the activations as a set of documents of one length, and open it. A rest of the tokens is left out."""
    n_documents = len(planted.activations) // document_tokens
    activations = planted.activations[: n_documents * document_tokens].bfloat16()
    writer = SetWriter(folder, activations.shape[-1], {"planted": str(folder)})
    writer.prepare()
    shard = writer.shard(0, len(activations))
    shard.add(activations, activations.double().norm(dim=-1))
    shard.close()
    position = torch.arange(1, document_tokens + 1).repeat(n_documents)
    document = torch.arange(n_documents).repeat_interleave(document_tokens)
    documents = [StoredDocument(f"planted-{i}", document_tokens + 1, 1) for i in range(n_documents)]
    table = {"document": document, "position": position, "token_id": position}
    writer.finish(table, documents, {"fingerprint": "planted"}, [len(activations)])
    return ActivationStore(folder)


def best_matches(directions: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """[feature, d_model] and [latent, d_model] -> [feature] twice: the largest cosine, and whose it is."""
    cosines = torch.nn.functional.normalize(directions, dim=-1) @ torch.nn.functional.normalize(vectors, dim=-1).T
    best = cosines.max(dim=1)
    return best.values, best.indices
