"""Activation sets: what is written is read back, shuffled by seed, divided by document."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from made_up_activations import D_MODEL, DOCUMENT_TOKENS, N_DOCUMENTS, planted_activations, write_store
from safetensors.torch import load_file

from crosscoder.activation_store import ActivationStore, ActivationWriter, ShuffledOrder
from finqa.errors import UserError


def test_tokens_come_back_as_they_were_written_in_bf16(store):
    written = planted_activations(N_DOCUMENTS * DOCUMENT_TOKENS, D_MODEL, 16).bfloat16()
    assert torch.equal(store.read(torch.arange(len(store))), written)
    assert len(store.config.shard_tokens) == 3
    assert store.document.tolist() == [i for i in range(N_DOCUMENTS) for _ in range(DOCUMENT_TOKENS)]
    assert store.position[:DOCUMENT_TOKENS].tolist() == list(range(1, DOCUMENT_TOKENS + 1))
    assert store.token_id[DOCUMENT_TOKENS].item() == 101


def test_memory_mapped_shards_read_the_same_as_memory(store):
    mapped = ActivationStore(store.folder, memory_limit_bytes=0)
    indices = torch.randperm(len(store), generator=torch.Generator().manual_seed(3))[:500]
    assert store.in_memory
    assert not mapped.in_memory
    assert torch.equal(mapped.read(indices), store.read(indices))


def test_scales_bring_each_models_mean_norm_to_the_root_of_its_width(store):
    x = store.read(torch.arange(len(store))).double()
    for m in range(2):
        scale = store.config.activation_scales[m]
        assert math.isclose((scale * x[:, m]).norm(dim=-1).mean().item(), math.sqrt(D_MODEL), rel_tol=1e-12)


def test_documents_on_disk_are_shards_of_two_models_and_a_table(store):
    shard = load_file(store.folder / "shard-00000.safetensors")["activations"]
    assert (shard.dtype, shard.shape[1:]) == (torch.bfloat16, (2, D_MODEL))
    table = load_file(store.folder / "tokens.safetensors")
    assert {name: column.dtype for name, column in table.items()} == {
        "document": torch.int32,
        "position": torch.int32,
        "token_id": torch.int32,
        "kept": torch.bool,
    }
    assert json.loads((store.folder / "documents.jsonl").read_text().splitlines()[1])["id"] == "row-1"


def test_outliers_are_dropped_and_counted_and_leave_the_scales_alone(tmp_path: Path):
    activations = planted_activations(200, D_MODEL, 16)
    write_store(tmp_path / "plain", activations[4:], document_tokens=49, drop_outliers=True)
    loud = activations.clone()
    loud[:4, 1] *= 1000
    write_store(tmp_path / "loud", loud, document_tokens=50, drop_outliers=True)
    plain, store = ActivationStore(tmp_path / "plain"), ActivationStore(tmp_path / "loud")
    assert (plain.config.n_dropped, store.config.n_dropped, store.config.n_tokens) == (0, 4, 200)
    assert torch.equal(store.read(torch.arange(len(store))), activations[4:].bfloat16())
    assert store.position[0].item() == 5
    assert store.config.activation_scales == pytest.approx(plain.config.activation_scales)


def test_held_out_documents_share_no_token_with_training(store):
    split = store.split(0.1, seed=0)
    assert set(store.document[split.train].tolist()).isdisjoint(store.document[split.held_out].tolist())
    assert len(split.train) + len(split.held_out) == len(store)
    assert len(set(store.document[split.held_out].tolist())) == N_DOCUMENTS // 10


def test_the_split_follows_its_seed_alone(store):
    assert torch.equal(store.split(0.1, 4).held_out, store.split(0.1, 4).held_out)
    assert not torch.equal(store.split(0.1, 4).held_out, store.split(0.1, 5).held_out)


def test_one_document_cannot_be_divided(tmp_path: Path):
    write_store(tmp_path / "one", planted_activations(50, D_MODEL, 16))
    with pytest.raises(UserError, match="holding one out needs at least 2"):
        ActivationStore(tmp_path / "one").split(0.1, 0)


def test_every_pass_reads_every_token_once_in_another_order():
    order = ShuffledOrder(torch.arange(100, 130), batch_size=10, seed=1)
    passes = [torch.cat([order.batch(3 * number + i) for i in range(3)]).tolist() for number in range(2)]
    assert [sorted(tokens) for tokens in passes] == [list(range(100, 130))] * 2
    assert passes[0] != passes[1] != list(range(100, 130))


def test_a_batch_may_span_passes_and_is_always_full():
    order = ShuffledOrder(torch.arange(7), batch_size=5, seed=1)
    stream = torch.cat([order.batch(i) for i in range(7)]).tolist()
    assert [sorted(stream[start : start + 7]) for start in range(0, 35, 7)] == [list(range(7))] * 5


def test_a_batch_follows_from_its_step_alone():
    forwards = [ShuffledOrder(torch.arange(40), 8, seed=2).batch(step).tolist() for step in range(12)]
    order = ShuffledOrder(torch.arange(40), 8, seed=2)
    assert [order.batch(step).tolist() for step in reversed(range(12))][::-1] == forwards


def test_completion_tokens_are_those_after_the_prompt(store):
    one = store.is_completion()[:DOCUMENT_TOKENS]
    assert one.tolist() == [position >= 26 for position in range(1, DOCUMENT_TOKENS + 1)]


def test_an_unfinished_set_is_no_set(tmp_path: Path):
    writer = ActivationWriter(tmp_path / "half", D_MODEL)
    writer.add(torch.ones(3, 2, D_MODEL), *(torch.zeros(3) for _ in range(3)))
    with pytest.raises(UserError, match=r"holds no activation set; make it with collect_activations\.py"):
        ActivationStore(tmp_path / "half")
