"""One model out of base and adapter, for engines that serve an adapter badly and for the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finqa.students import load_adapter, load_base, load_tokenizer, resolve_model


@contextmanager
def merged(model: str, student: Path, revision: str | None = None) -> Iterator[Path]:
    """A temporary folder with base model, adapter and tokenizer as one model."""
    with tempfile.TemporaryDirectory(prefix="merged-") as folder:
        merge(model, student, Path(folder), revision)
        yield Path(folder)


def merge(model: str, student: Path, folder: Path, revision: str | None = None, max_shard_size: str = "5GB") -> None:
    """Write base + adapter as one model, in files of at most `max_shard_size`, tokenizer included.

    The sum is taken in fp32 and rounded once, to the dtype of the base (bf16 for every student here), so a
    merged weight is the bf16 number nearest to base + scale * B A. It still is a rounded one: logits differ
    a little from those of the unmerged pair.
    """
    import torch
    from transformers import AutoConfig

    path = resolve_model(model, revision)
    stored = AutoConfig.from_pretrained(path).dtype or torch.bfloat16
    base = load_base(model, dtype=torch.float32, device="cpu", revision=revision)
    whole = load_adapter(base, student).merge_and_unload().to(stored)
    whole.save_pretrained(folder, max_shard_size=max_shard_size)
    load_tokenizer(model, revision).save_pretrained(folder)
