"""What recording needs and what there is, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from crosscoder.activations.writer import BATCHES_BEHIND
from crosscoder.dictionaries.config import N_MODELS
from finqa.runtime.errors import UserError
from finqa.runtime.memory.needs import NF4, Need, Sizes
from finqa.runtime.memory.plan import check_disk


class ModelShape(NamedTuple):
    """What a model's configuration says."""

    d_model: int
    n_layers: int

    def check_layers(self, layers: Iterable[int]) -> None:
        """UserError at a layer that the model does not have."""
        for layer in layers:
            if layer > self.n_layers:
                raise UserError(f"--layer {layer}: the model has layers 1 to {self.n_layers}")

    def check_same(self, other: ModelShape, of: Path) -> None:
        """UserError where another model, in the folder `of`, has not as many layers of this width."""
        if other != self:
            raise UserError(
                f"{of} has {other.n_layers} layers of width {other.d_model}, and its base {self.n_layers} of width "
                f"{self.d_model}; give two models of one shape, so that a layer of one is that of the other"
            )


def model_shape(model: str) -> ModelShape:
    """Shape of the model in a folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return ModelShape(config.hidden_size, config.num_hidden_layers)


def recording_need(
    model: Sizes, extra_bytes: float, in_4bit: bool, value_bytes: int, batch_tokens: int, n_sets: int
) -> Need:
    """Memory that recording takes.

    Args:
        extra_bytes: Of the adapter, or of the second model.
        value_bytes: Of a number of the models: 2 or 4.
        batch_tokens: Tokens of a batch, padded.
        n_sets: Sets made at once.
    """
    weights = float(model.parameters * value_bytes)
    if in_4bit:
        weights = (model.parameters - model.in_layers) * value_bytes + model.in_layers * NF4
    at_work = batch_tokens * (3 * model.intermediate + 10 * model.hidden) * value_bytes
    under_way = (BATCHES_BEHIND + 1) * n_sets * batch_tokens * N_MODELS * model.hidden * 2
    return Need(
        (
            ("base model", weights, f"{model.parameters:,} parameters"),
            ("fine-tuned model", extra_bytes, "its adapter, or with --merged all of it"),
            ("one layer at work", at_work, f"{batch_tokens:,} tokens a batch"),
            ("read, not yet written", under_way, f"{BATCHES_BEHIND + 1} batches of {n_sets} sets"),
        )
    )


def print_plan(n_documents: int, n_tokens: int, shape: ModelShape, partial_folders: Sequence[Path]) -> None:
    """Print what the sets take on disk, less what an earlier run left of them; UserError where that does not fit."""
    needed = len(partial_folders) * n_tokens * N_MODELS * shape.d_model * 2
    there = sum(file.stat().st_size for folder in partial_folders for file in folder.glob("shard-*"))
    sets = f", {len(partial_folders)} sets" if len(partial_folders) > 1 else ""
    print(f"{n_documents} documents, {n_tokens:,} tokens{sets}", flush=True)
    remedy = "take fewer documents (--num-samples) or another --data-dir"
    check_disk(partial_folders[0].parent, max(0, needed - there), "activations", remedy)
