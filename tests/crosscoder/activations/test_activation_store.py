"""Activation sets: what is written is read back, shuffled by seed, divided by document."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path

import pytest
import torch
from made_up_activations import D_MODEL, DOCUMENT_TOKENS, N_DOCUMENTS, planted_activations, write_store
from safetensors.torch import load_file

from crosscoder.activations.feed import ShuffledOrder, feed
from crosscoder.activations.recorded_inputs import is_collected
from crosscoder.activations.store import ActivationStore, Place
from crosscoder.activations.writer import SetWriter
from finqa.runtime.errors import UserError


def test_tokens_come_back_as_they_were_written_in_bf16(store):
    written = planted_activations(N_DOCUMENTS * DOCUMENT_TOKENS, D_MODEL, 16).bfloat16()
    assert torch.equal(store.read(torch.arange(len(store))), written)
    assert len(store.config.shard_tokens) == 3
    assert store.document.tolist() == [i for i in range(N_DOCUMENTS) for _ in range(DOCUMENT_TOKENS)]
    assert store.position[:DOCUMENT_TOKENS].tolist() == list(range(1, DOCUMENT_TOKENS + 1))
    assert store.token_id[DOCUMENT_TOKENS].item() == 101


def test_memory_mapped_shards_read_the_same_as_memory(store):
    mapped = ActivationStore(store.folder, place="disk")
    indices = torch.randint(len(store), (700,), generator=torch.Generator().manual_seed(3))
    assert (store.place, mapped.place) == ("memory", "disk")
    assert torch.equal(mapped.read(indices), store.read(indices))
    assert torch.equal(mapped.read(indices[:1]), store.read(indices[:1]))
    assert mapped.read(indices[:0]).shape == (0, 2, D_MODEL)
    with torch.inference_mode():  # which the threads that read it are not in
        mapped.move("memory")
    assert torch.equal(mapped.read(indices), store.read(indices))


def test_a_set_is_held_where_it_takes_at_most_half_of_what_is_free_and_else_left_on_disk(store, monkeypatch):
    size = 2 * 2 * D_MODEL * len(store)
    monkeypatch.setattr("crosscoder.activations.store.free_memory", lambda device: 2 * size)
    assert ActivationStore(store.folder).place == "memory"
    monkeypatch.setattr("crosscoder.activations.store.free_memory", lambda device: 2 * size - 1)
    assert ActivationStore(store.folder).place == "disk"
    held = ActivationStore(store.folder, place="memory")
    assert held.place == "memory"
    before = held.read(torch.arange(900))
    held.move("disk")
    assert held.place == "disk"
    assert torch.equal(held.read(torch.arange(900)), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(store):
    with pytest.raises(UserError, match="cannot be held on a GPU: none is in use here; choose memory or disk"):
        ActivationStore(store.folder, place="gpu", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_the_same(store):
    order = ShuffledOrder(torch.arange(len(store)), 64, seed=1)
    held = ActivationStore(store.folder, device="cuda")
    assert held.place == "gpu"
    for on_gpu in (held, store):
        with feed(on_gpu.read, map(order.batch, range(40)), "cuda") as batches:
            for indices, activations in batches:
                assert activations.is_cuda
                assert torch.equal(activations.cpu(), store.read(indices))


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
    medians = loud.bfloat16().double().norm(dim=-1).median(dim=0).values
    assert store.config.largest_norms == pytest.approx((10 * medians).tolist())
    write_store(tmp_path / "all", loud, document_tokens=50)
    assert ActivationStore(tmp_path / "all").config.largest_norms == ()


@pytest.mark.parametrize("model", [0, 1], ids=["instruct", "fine-tuned"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.index_fill_(0, torch.tensor([7]), torch.nan), "is not a number on 1 of 200 tokens, first at "
         "position 8 of document row-0; check that model's weights"),
        (lambda one: one.index_fill_(0, torch.tensor([60, 61]), -torch.inf), "is infinite on 2 of 200 tokens, first at "
         "position 11 of document row-1"),
        (lambda one: one.zero_(), "is 0 on at least half of the 200 tokens; choose another --layer or --site"),
        (lambda one: one.copy_(one[0].clone().expand_as(one)), "is the same for every token"),
    ],
    ids=["NaN", "infinite", "zero", "constant"],
)  # fmt: skip
def test_activations_that_no_dictionary_can_explain_are_one_line_that_says_which(tmp_path: Path, model, change, said):
    activations = planted_activations(200, D_MODEL, 16)
    change(activations[:, model])
    name = ["instruct", "fine-tuned"][model]
    with pytest.raises(UserError, match=re.escape(f"set: the {name} model's activation {said}")):
        write_store(tmp_path / "set", activations, document_tokens=50, drop_outliers=True)


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_scales": [-1.0, -1.0]}, "activation_scales"),
        ({"activation_scales": [1.0]}, "activation_scales"),
        ({"d_model": 10**18}, "not bf16"),
        ({"d_model": 12.0}, "d_model"),
        ({"n_tokens": 10**18}, "n_tokens"),
        ({"n_dropped": True}, "n_dropped"),
        ({"n_dropped": 1}, "do not fit each other"),
        ({"version": 99}, "version"),
        ({"recorded": {"fingerprint": "x", "layer": 10**18}}, "recorded"),
        ({"recorded": {"fingerprint": "x", "site": "nowhere"}}, "recorded"),
        ({"recorded": []}, "recorded"),
    ],
    ids=str,
)
def test_a_set_whose_configuration_was_changed_is_refused_in_one_line(tmp_path: Path, changes, said):
    write_store(tmp_path / "set", planted_activations(200, D_MODEL, 16), document_tokens=50)
    change_config(tmp_path / "set", **changes)
    with pytest.raises(UserError, match=said):
        ActivationStore(tmp_path / "set")


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("change", ["a line twice", "a line less", "a table's bit"])
def test_a_set_whose_documents_or_tokens_were_changed_is_refused(tmp_path: Path, change, checksums):
    folder = tmp_path / "set"
    write_store(folder, planted_activations(200, D_MODEL, 16), document_tokens=50)
    if not checksums:
        change_config(folder, files={})
    lines = (folder / "documents.jsonl").read_text().splitlines(keepends=True)
    if change == "a table's bit":
        data = bytearray((folder / "tokens.safetensors").read_bytes())
        data[-1] ^= 1  # the last token's `kept`, or the highest byte of an index
        (folder / "tokens.safetensors").write_bytes(data)
    else:
        (folder / "documents.jsonl").write_text("".join([*lines, lines[-1]] if "twice" in change else lines[:-1]))
    with pytest.raises(UserError, match="is not the file that was written" if checksums else "do not fit each other"):
        ActivationStore(folder)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("at", [-1, -3000, 600], ids=["last activation", "an activation", "a norm"])
def test_a_flipped_bit_in_a_shard_is_seen_when_the_shard_is_first_read(tmp_path: Path, place: Place, at: int):
    folder = tmp_path / "set"
    write_store(folder, planted_activations(200, D_MODEL, 16), document_tokens=50, shard_tokens=100)
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=f"^{path} is not the file that was written; collect the activations again with --o"
    ):
        ActivationStore(folder, place).read(torch.tensor([150]))
    assert [is_collected(folder, "made up", overwrite) for overwrite in (False, True)] == [True, False]
    first = torch.arange(100)
    assert ActivationStore(folder, "disk").read(first).isfinite().all()  # the other shard is whole
    change_config(folder, d_model="12")
    with pytest.raises(UserError, match="d_model"):
        is_collected(folder, "made up", overwrite=False)
    assert not is_collected(folder, "made up", overwrite=True)
    change_config(folder, d_model=12, shard_hashes=[])  # as in a set of an earlier version, where it is not seen
    assert len(ActivationStore(folder, place).read(torch.tensor([150]))) == 1


def test_a_shard_in_the_place_of_another_is_seen(tmp_path: Path):
    folder = tmp_path / "set"
    write_store(folder, planted_activations(200, D_MODEL, 16), document_tokens=50, shard_tokens=100)
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is not the file that was written"):
        ActivationStore(folder, "memory")


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


def test_a_pass_shuffles_across_the_whole_store_not_within_windows():
    order = ShuffledOrder(torch.arange(10_000), batch_size=1000, seed=3)
    for step in range(10):
        tenths = torch.bincount(order.batch(step) // 1000, minlength=10)
        assert tenths.min() > 50  # 100 expected from each tenth of the store; below 50 in less than 1 of 10^8


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_reading_ahead_gives_the_batches_of_the_order_from_any_step_on(store, place):
    order = ShuffledOrder(store.split(0.2, 0).train, batch_size=96, seed=5)
    here = ActivationStore(store.folder, place=place)
    for first in (0, 7, 30):
        with feed(here.read, map(order.batch, range(first, 40))) as batches:
            fed = list(batches)
        assert len(fed) == 40 - first
        for step, (indices, activations) in enumerate(fed, first):
            assert torch.equal(indices, ShuffledOrder(order.indices, 96, seed=5).batch(step))
            assert torch.equal(activations, store.read(indices))


def feeding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("activation feed")]


def test_no_thread_is_left_when_reading_ends_early_or_late(store):
    order = ShuffledOrder(torch.arange(len(store)), 50, seed=1)
    with feed(store.read, map(order.batch, range(100))) as batches:
        next(batches)
        assert len(feeding_threads()) == 1
    assert not feeding_threads()
    assert next(batches, None) is None
    with feed(store.read, map(order.batch, range(3))) as batches:
        assert len(list(batches)) == 3
    with pytest.raises(KeyError), feed(store.read, map(order.batch, range(100))) as batches:
        raise KeyError
    assert not feeding_threads()


def test_only_so_many_batches_are_read_ahead(store):
    read: list[int] = []
    asked = threading.Event()

    def batches():
        for step in range(20):
            read.append(step)
            if step == 4:
                asked.set()
            yield torch.arange(step, step + 2)

    with feed(store.read, batches()) as ahead:
        for _ in range(3):
            next(ahead)
        assert asked.wait(10)
        assert len(read) == 5


def test_what_goes_wrong_while_reading_ahead_is_raised_where_the_batch_is_asked_for(store):
    with feed(store.read, iter([torch.tensor([3]), torch.tensor([len(store)]), torch.tensor([4])])) as ahead:
        assert next(ahead)[0].item() == 3
        with pytest.raises(IndexError):
            next(ahead)
        assert next(ahead, None) is None


def test_completion_tokens_are_those_after_the_prompt(store):
    one = store.is_completion()[:DOCUMENT_TOKENS]
    assert one.tolist() == [position >= 26 for position in range(1, DOCUMENT_TOKENS + 1)]


def test_an_unfinished_set_is_no_set(tmp_path: Path):
    writer = SetWriter(tmp_path / "half", D_MODEL, {})
    writer.prepare()
    file = writer.shard(0, 3)
    file.add(torch.ones(3, 2, D_MODEL, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.float64))
    file.close()
    with pytest.raises(UserError, match=r"holds no activation set; make it with collect_activations\.py"):
        ActivationStore(tmp_path / "half")


def test_a_shard_of_another_length_than_planned_gets_no_name(tmp_path: Path):
    writer = SetWriter(tmp_path / "half", D_MODEL, {})
    writer.prepare()
    file = writer.shard(0, 4)
    file.add(torch.ones(3, 2, D_MODEL, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 3 tokens, planned were 4"):
        file.close()
    assert not writer.has(0)


def test_a_long_pass_says_how_far_it_is(store: ActivationStore, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("finqa.runtime.progress.PLAIN_EVERY_S", 0.0)
    list(store.batches(torch.arange(6), 4))
    assert capsys.readouterr().err == ""
    list(store.batches(torch.arange(6), 4, "examples, tokens"))
    first, second = capsys.readouterr().err.splitlines()
    assert "examples, tokens: 4 of 6," in first and "examples, tokens: 6 of 6," in second
