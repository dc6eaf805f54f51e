"""One model out of base and adapter, for engines that serve an adapter badly and for the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finqa.models.adapters import check_adapter
from finqa.models.students import load_adapter, load_base, load_tokenizer, resolve_model
from finqa.runtime.memory.needs import MERGED_FILE_GB
from finqa.runtime.memory.plan import plan_merging
from finqa.runtime.paths import temporary_folder


@contextmanager
def merged(model: str, student: Path, revision: str | None = None) -> Iterator[Path]:
    """A temporary folder with base model, adapter and tokenizer as one model."""
    with temporary_folder(Path(tempfile.gettempdir()) / "finqa-merged") as folder:
        merge(model, student, folder, revision)
        yield folder


def merge(model: str, student: Path, folder: Path, revision: str | None = None) -> None:
    """Write base + adapter as one model, in files of at most MERGED_FILE_GB, tokenizer included.

    Each sum is taken in fp32 and rounded once, to the dtype of the base (bf16 for every student here), so a
    merged weight is the bf16 number nearest to base + scale * B A. It still is a rounded one: logits differ
    a little from those of the unmerged pair. A matrix at a time is in fp32: of the whole base that would be twice the
    memory. Prints first what it takes; UserError where that is not there.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig

    path = resolve_model(model, revision)
    check_adapter(student, path)
    plan_merging(Path(path), student, folder)
    stored: Any = AutoConfig.from_pretrained(path).dtype or torch.bfloat16
    pair: Any = load_adapter(load_base(model, dtype=stored, device="cpu", revision=revision), student)
    layers: list[Any] = [layer for layer in pair.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        weight.data = (weight.float() + layer.get_delta_weight("default").float()).to(stored)
    whole = pair.unload()
    del layers, pair
    whole.save_pretrained(folder, max_shard_size=f"{MERGED_FILE_GB}GB")
    load_tokenizer(model, revision, student=student).save_pretrained(folder)
