"""Activation sets of made-up numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from crosscoder.activations.store import StoredDocument
from crosscoder.activations.writer import SetWriter
from crosscoder.training.trainer import Trainer

N_DOCUMENTS, DOCUMENT_TOKENS, D_MODEL = 40, 50, 12


def write_store(
    folder: Path,
    activations: torch.Tensor,
    document_tokens: int = DOCUMENT_TOKENS,
    shard_tokens: int = 65_536,
    drop_outliers: bool = False,
) -> None:
    """A set of [tokens, 2, d_model] activations cut into documents of one length, half prompt, BOS left out."""
    n_documents = len(activations) // document_tokens
    activations = activations[: n_documents * document_tokens].bfloat16()
    writer = SetWriter(folder, activations.shape[-1], {"made up": str(folder)}, drop_outliers)
    writer.prepare()
    shards = activations.split(shard_tokens)
    for number, shard in enumerate(shards):
        file = writer.shard(number, len(shard))
        file.add(shard, shard.double().norm(dim=-1))
        file.close()
    document = torch.arange(n_documents).repeat_interleave(document_tokens)
    position = torch.arange(1, document_tokens + 1).repeat(n_documents)
    table = {"document": document, "position": position, "token_id": position + 100 * document}
    documents = [StoredDocument(f"row-{i}", document_tokens + 1, 1 + document_tokens // 2) for i in range(n_documents)]
    recorded = {"fingerprint": "made up", "layer": 3}
    writer.finish(table, documents, recorded, [len(shard) for shard in shards])


def planted_activations(n_tokens: int, d_model: int, n_features: int, seed: int = 0) -> torch.Tensor:
    """[tokens, 2, d_model]: sparse sums of directions that both models share, apart from a few that one has alone."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, 2, d_model, generator=generator)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions[:, 1] = directions[:, 0]
    directions[0, 0] = directions[1, 1] = 0
    active = torch.rand(n_tokens, n_features, generator=generator) < 3 / n_features
    sizes = active * (1 + torch.rand(n_tokens, n_features, generator=generator))
    noise = 0.02 * torch.randn(n_tokens, 2, d_model, generator=generator)
    return torch.einsum("tf,fmd->tmd", sizes, directions) + noise + 0.3


def take_steps(run: Trainer, count: int) -> None:
    """The next steps of a trainer that has begun."""
    with run.batches() as batches:
        for _, (_, raw) in zip(range(count), batches, strict=False):
            run.step(raw)
