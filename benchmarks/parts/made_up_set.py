"""An activation set of made-up numbers in a real set's shapes, written like one that was collected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.store import ActivationStore

DIRECTIONS, ACTIVE = 8_000, 32
"""Of the made-up activations: how many there are, and how many a token has."""
DOCUMENT_TOKENS, SHARD_TOKENS = 256, 32_768


def made_up_store(folder: Path, n_tokens: int, d_model: int, device: str) -> ActivationStore:
    """A set of `n_tokens` tokens in documents of DOCUMENT_TOKENS, made on `device`, left on disk."""
    import torch

    from crosscoder.activations.store import ActivationStore, StoredDocument
    from crosscoder.activations.writer import SetWriter

    writer = SetWriter(folder, d_model, {})
    writer.prepare()
    # Not the seed of the dictionaries that are made beside it: their first latents would be these very directions.
    generator = torch.Generator(device).manual_seed(1)
    directions = torch.randn(DIRECTIONS, d_model, device=device, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    n_documents = n_tokens // DOCUMENT_TOKENS
    total = n_documents * DOCUMENT_TOKENS
    sizes = [min(SHARD_TOKENS, total - start) for start in range(0, total, SHARD_TOKENS)]
    for number, size in enumerate(sizes):
        shard = writer.shard(number, size)
        for start in range(0, size, 4096):
            x = made_up_activations(min(4096, size - start), directions, generator)
            shard.add(x.cpu(), x.double().norm(dim=-1).cpu())
        shard.close()
    position = torch.arange(1, DOCUMENT_TOKENS + 1).repeat(n_documents)
    document = torch.arange(n_documents).repeat_interleave(DOCUMENT_TOKENS)
    documents = [StoredDocument(f"row-{i}", DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS // 2) for i in range(n_documents)]
    table = {"document": document, "position": position, "token_id": position}
    writer.finish(table, documents, {"fingerprint": "made up"}, sizes)
    return ActivationStore(folder, place="disk")


def made_up_activations(n_tokens: int, directions: Tensor, generator: Any) -> Tensor:
    """[tokens, 2, d_model] bf16: the same sum of directions for both models, and noise for each."""
    import torch

    n, d_model = directions.shape
    on_device = {"device": directions.device, "generator": generator}
    # Some directions are common and most are rare, as features are.
    which = (n * torch.rand(n_tokens, ACTIVE, **on_device) ** 2).long()
    strength = torch.rand(n_tokens, ACTIVE, **on_device)
    x = torch.zeros(n_tokens, d_model, device=directions.device)
    for i in range(ACTIVE):
        x += directions[which[:, i]] * strength[:, i, None]
    pair = torch.stack([x, x], 1) + 0.01 * torch.randn(n_tokens, 2, d_model, **on_device)
    return pair.bfloat16()
