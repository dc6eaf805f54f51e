"""What recording takes, against what there is, before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from crosscoder.config import N_MODELS
from finqa.errors import UserError

BYTES_PER_GB = 1e9


class ModelShape(NamedTuple):
    """What a model's configuration says."""

    d_model: int
    n_layers: int

    def check_layers(self, layers: Iterable[int]) -> None:
        """UserError at a layer that the model does not have."""
        for layer in layers:
            if layer > self.n_layers:
                raise UserError(f"--layer {layer}: the model has layers 1 to {self.n_layers}")


def model_shape(model: str) -> ModelShape:
    """Shape of the model in a folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return ModelShape(config.hidden_size, config.num_hidden_layers)


def print_plan(n_documents: int, n_tokens: int, shape: ModelShape, partial_folders: Sequence[Path]) -> None:
    """Say what the sets take on disk; UserError where they do not fit beside what an earlier run has left of them."""
    needed = len(partial_folders) * n_tokens * N_MODELS * shape.d_model * 2
    there = sum(file.stat().st_size for folder in partial_folders for file in folder.glob("shard-*"))
    existing = next(parent for parent in partial_folders[0].absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    sets = f", {len(partial_folders)} sets" if len(partial_folders) > 1 else ""
    print(f"{n_documents} documents, {n_tokens:,} tokens{sets}: {needed / BYTES_PER_GB:.2f} GB on disk", flush=True)
    if needed - there > 0.95 * free:
        raise UserError(
            f"the activations need {(needed - there) / BYTES_PER_GB:.1f} GB and {existing} has "
            f"{free / BYTES_PER_GB:.1f} GB free; take fewer documents (--num-samples) or another --data-dir"
        )
