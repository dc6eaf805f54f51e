"""Packed rows learn what padded rows learn; the GPU's own parts are held against float64 where a GPU is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from finqa.models.students import load_base
from finqa.training.packing import (
    LENGTH_STEP,
    LONGEST_GRAPH,
    TARGETS_STEP,
    longest_graph,
    packed_collator,
    packed_shape,
)
from finqa.training.rows import NO_LOSS, collator, example
from finqa.training.trainable import loss_on_completion

ROWS = [
    example("a", tuple(range(5, 60)), 40),
    example("b", tuple(range(9, 150)), 139),
    example("c", (7, 8, 9, 2), 1),
]


def attention_by_row(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch's varlen_attn computes, written out: each row by itself, causal."""
    import torch

    assert window_size == (-1, 0)
    out = torch.empty_like(query)
    starts = cu_seq_q.tolist()
    assert max(b - a for a, b in pairwise(starts)) <= max_q == max_k
    for begin, end in pairwise(starts):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        out[begin:end] = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(0, 1)
    return out


def test_a_packed_batch_holds_each_row_and_where_it_begins():
    batch = packed_collator(0)(ROWS)
    n = sum(row["n_tokens"] for row in ROWS)
    assert batch["n_tokens"] == n
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, -(-n // LENGTH_STEP) * LENGTH_STEP)
    starts = batch["cu_seq_lens_q"].tolist()
    assert starts == [0, 55, 196, n, batch["input_ids"].shape[1]]
    for row, begin, end in zip(ROWS, starts, starts[1:], strict=False):
        assert tuple(batch["input_ids"][0, begin:end].tolist()) == row["ids"]
        assert batch["position_ids"][0, begin:end].tolist() == list(range(row["n_tokens"]))
    real = batch["labels"] != NO_LOSS
    assert len(batch["labels"]) == len(batch["predicting"]) == TARGETS_STEP
    assert real[1:].sum() == real.sum(), "the Trainer leaves the first out of its count"
    learnt = batch["input_ids"][0, batch["predicting"][real] + 1]
    assert learnt.tolist() == batch["labels"][real].tolist() == [i for r in ROWS for i in r["ids"][r["n_prompt"] :]]


def test_the_narrower_a_layer_the_longer_the_batches_that_are_recorded():
    assert longest_graph(4096, 14336) == LONGEST_GRAPH, "Mistral-7B"
    assert longest_graph(1536, 8960) == 2 * LONGEST_GRAPH, "Qwen2.5-Coder-1.5B"
    assert longest_graph(896, 4864) > 3 * LONGEST_GRAPH, "Qwen2.5-Coder-0.5B"


def test_batches_of_several_rows_have_few_shapes_and_attention_looks_as_far_as_the_longest_row():
    assert packed_shape(1, 700, 60, 700) == packed_shape(1, 641, 10, 641) == (1, 768, 256, 768)
    assert packed_shape(4, 3000, 300, 900) == packed_shape(4, 2950, 300, 1020) == (4, 3072, 512, 1024)
    assert packed_shape(4, 4100, 300, 1030) == packed_shape(4, 4350, 300, 2000) == (4, 4352, 512, 2048)


def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(tiny_student: Path, monkeypatch):
    import torch
    from torch.nn.attention import varlen
    from transformers.modeling_utils import AttentionInterface

    from finqa.training import packing

    monkeypatch.setattr(varlen, "varlen_attn", attention_by_row)
    padded = load_base(str(tiny_student), dtype=torch.float32)
    packed = load_base(str(tiny_student), dtype=torch.float32)
    AttentionInterface.register(packing.NAME, packing.packed_attention)
    packed.set_attn_implementation(packing.NAME)
    losses = []
    for model, collate in ((padded, collator(0)), (packed, packed_collator(0))):
        loss_on_completion(model)
        batch: dict[str, Any] = collate(ROWS)
        batch.pop("n_tokens")
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, a), b in zip(packed.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")
