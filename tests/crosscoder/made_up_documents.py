"""Activation sets of real documents, by real writers, with any activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from crosscoder.activations.collection import Document, planned_shards, stored_documents, token_table
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.writer import SetWriter


def write_documents(
    folder: Path,
    documents: Sequence[Document],
    skip_id: int | None,
    activations: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    drop_outliers: bool = False,
) -> ActivationStore:
    """A set of these documents. `activations` gives [tokens, 2, d_model] for a table of `document`, `position`,
    `token_id` [tokens]."""
    shards = planned_shards(documents, skip_id, shard_tokens=10**9, batch_tokens=10**9)
    table = token_table(documents, shards, skip_id)
    recorded = activations(table).bfloat16()
    writer = SetWriter(folder, recorded.shape[-1], {"made up": str(folder)}, drop_outliers)
    writer.prepare()
    file = writer.shard(0, len(recorded))
    file.add(recorded, recorded.double().norm(dim=-1))
    file.close()
    about = {"fingerprint": "made up", "layer": 2, "site": "mlp"}
    writer.finish(table, stored_documents(documents), about, [len(recorded)])
    return ActivationStore(folder)
