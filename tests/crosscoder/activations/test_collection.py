"""Collecting activations: what is read, in which order, and that a set is the same however it was made."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscoder.activations.collection import (
    Document,
    assert_same_ids,
    batches_by_length,
    documents_from_rows,
    fingerprint,
    padded,
    planned_shards,
    record,
    stored_documents,
    token_table,
)
from crosscoder.activations.readers import Read, Target, adapter_readers
from crosscoder.activations.recording_plan import recording_need
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.writer import SetWriter
from finqa.models import students
from finqa.runtime.errors import REMEDIES, UserError
from finqa.runtime.memory.needs import read_config, sizes
from finqa.runtime.memory.plan import check_fits
from finqa.runtime.paths import Folders

MLP_2 = Target(2, "mlp")


@pytest.fixture(scope="module")
def tokenizer(tiny_student: Path):
    return students.load_tokenizer(str(tiny_student))


@pytest.fixture(scope="module")
def adapted(tiny_student: Path, data_folder: Path):
    """The tiny student with its adapter, in fp32."""
    run = students.StudentRun("FinQA-mini", str(tiny_student), students.settings_for(str(tiny_student)))
    base = students.load_base(str(tiny_student), torch.float32, "cpu")
    return students.load_adapter(base, Folders(data=data_folder).model("FinQA-mini", run.model_id)).eval()


@pytest.fixture(scope="module")
def documents(teacher_rows, tokenizer) -> list[Document]:
    return documents_from_rows(teacher_rows, tokenizer)


def make_sets(
    folders: Sequence[Path],
    readers: tuple[Read, Read],
    documents: Sequence[Document],
    targets: Sequence[Target] = (MLP_2,),
    skip_id: int | None = None,
    batch_tokens: int = 300,
    **options: Any,
) -> list[ActivationStore]:
    shards = planned_shards(documents, skip_id, 400, batch_tokens)
    writers = [SetWriter(folder, 64, {}, drop_outliers=True) for folder, t in zip(folders, targets, strict=True)]
    for writer in writers:
        writer.prepare()
    record(readers, targets, documents, shards, writers, skip_id, "cpu", **options)
    table, sizes = token_table(documents, shards, skip_id), [shard.n_tokens for shard in shards]
    for writer in writers:
        writer.finish(table, stored_documents(documents), {}, sizes)
    return [ActivationStore(folder) for folder in folders]


def test_padding_and_company_change_no_activation(adapted, documents, tmp_path: Path):
    readers = adapter_readers(adapted, [MLP_2])
    (together,) = make_sets([tmp_path / "together"], readers, documents, batch_tokens=100_000)
    (alone,) = make_sets([tmp_path / "alone"], readers, documents, batch_tokens=1)
    assert torch.equal(together.document, alone.document)
    assert torch.equal(together.position, alone.position)
    everything = torch.arange(len(alone))
    assert torch.allclose(together.read(everything).float(), alone.read(everything).float(), atol=1e-2)


def test_every_token_but_bos_is_recorded_once_with_its_place(adapted, documents, tokenizer, tmp_path: Path):
    (store,) = make_sets(
        [tmp_path / "set"], adapter_readers(adapted, [MLP_2]), documents, skip_id=tokenizer.bos_token_id
    )
    recorded = list(zip(store.document.tolist(), store.position.tolist(), store.token_id.tolist(), strict=True))
    expected = {(i, t, token) for i, d in enumerate(documents) for t, token in enumerate(d.ids) if t > 0}
    assert set(recorded) == expected
    assert len(recorded) == len(expected)
    assert tokenizer.bos_token_id not in store.token_id


def test_the_order_is_by_length_then_document_then_position(adapted, documents, tokenizer, tmp_path: Path):
    (store,) = make_sets(
        [tmp_path / "set"], adapter_readers(adapted, [MLP_2]), documents, skip_id=tokenizer.bos_token_id
    )
    places = list(zip(store.document.tolist(), store.position.tolist(), strict=True))
    assert places == sorted(places, key=lambda place: (len(documents[place[0]].ids), *place))


def test_one_pass_of_each_model_makes_the_sets_of_all_layers_and_sites(adapted, documents, tmp_path: Path):
    targets = [Target(2, "residual"), Target(1, "mlp"), Target(2, "attention")]
    passes = []

    def counted(read: Read) -> Read:
        def counting(ids: Tensor) -> list[Tensor]:
            passes.append(ids.shape)
            return read(ids)

        return counting

    first, second = (counted(read) for read in adapter_readers(adapted, targets))
    folders = [tmp_path / f"{target.layer}-{target.site}" for target in targets]
    stores = make_sets(folders, (first, second), documents, targets)
    n_batches = sum(len(shard.batches) for shard in planned_shards(documents, None, 400, 300))
    assert len(passes) == 2 * n_batches
    for store, target in zip(stores, targets, strict=True):
        (alone,) = make_sets([tmp_path / "alone"], adapter_readers(adapted, [target]), documents, [target])
        assert torch.equal(store.read(torch.arange(len(store))), alone.read(torch.arange(len(alone))))
        assert store.config.activation_scales == alone.config.activation_scales


def test_the_norms_beside_the_activations_are_those_of_what_is_stored(adapted, documents, tmp_path: Path):
    from safetensors.torch import load_file

    make_sets([tmp_path / "set"], adapter_readers(adapted, [MLP_2]), documents)
    shard = load_file(tmp_path / "set" / "shard-00001.safetensors")
    assert torch.allclose(shard["norms"], shard["activations"].double().norm(dim=-1), rtol=1e-14)


def test_shards_that_are_there_are_not_made_again(adapted, documents, tmp_path: Path):
    readers = adapter_readers(adapted, [MLP_2])
    shards = planned_shards(documents, None, 400, 300)
    assert len(shards) > 2
    make_sets([tmp_path / "whole"], readers, documents)
    writer = SetWriter(tmp_path / "killed", 64, {"of": "these"})
    writer.prepare()
    record(readers, [MLP_2], documents, shards[:2], [writer], None, "cpu")
    (writer.partial / ".shard-00002.safetensors.1234").write_text("half a shard")
    first = writer.partial / "shard-00000.safetensors"
    made = first.stat().st_mtime_ns

    again = SetWriter(tmp_path / "killed", 64, {"of": "these"}, drop_outliers=True)
    again.prepare()
    assert [shard.number for shard in shards if not again.has(shard.number)] == [s.number for s in shards[2:]]
    record(readers, [MLP_2], documents, shards[2:], [again], None, "cpu")
    assert first.stat().st_mtime_ns == made
    sizes = [shard.n_tokens for shard in shards]
    again.finish(token_table(documents, shards, None), stored_documents(documents), {}, sizes)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    other = SetWriter(tmp_path / "other", 64, {"of": "these"})
    other.prepare()
    record(readers, [MLP_2], documents, shards[:1], [other], None, "cpu")
    changed = SetWriter(tmp_path / "other", 64, {"of": "others"})
    changed.prepare()
    assert not changed.has(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_what_goes_wrong_in_the_writing_thread_is_raised_and_leaves_no_half_shard(adapted, documents, tmp_path: Path):
    writer = SetWriter(tmp_path / "set", 64, {})
    writer.prepare()
    shards = planned_shards(documents, None, 400, 300)
    writer.partial.joinpath("shard-00001.safetensors").mkdir()  # no file can take its name
    with pytest.raises(OSError, match="shard-00001"):
        record(adapter_readers(adapted, [MLP_2]), [MLP_2], documents, shards, [writer], None, "cpu")
    assert writer.has(0)
    assert not list(writer.partial.glob(".*"))


def test_the_ids_are_those_of_training_and_end_with_the_end_token(teacher_rows, documents, tokenizer):
    row = teacher_rows[3]
    ids, n_prompt = students.training_ids(tokenizer, row.prompt, row.generated_code)
    assert (documents[3].ids, documents[3].n_prompt) == (tuple(ids), n_prompt)
    assert documents[3].ids.count(tokenizer.bos_token_id) == 1
    assert documents[3].ids[-1] == tokenizer.eos_token_id


def test_raw_joins_prompt_and_program_without_the_chat_template(teacher_rows, tokenizer):
    document = documents_from_rows(teacher_rows, tokenizer, raw=True)[0]
    text = tokenizer.decode(document.ids)
    assert "[INST]" not in text
    assert teacher_rows[0].prompt + "\n" + teacher_rows[0].generated_code in text


def test_different_ids_of_the_two_models_are_refused():
    ours, theirs = Document("a", (1, 2, 3), 1), Document("a", (1, 2, 4), 1)
    with pytest.raises(UserError, match="document a: the tokenizers of the two models give different ids"):
        assert_same_ids([ours], [theirs])


def test_an_adapter_that_changes_nothing_is_noticed(adapted, documents, tmp_path: Path):
    without_adapter, _ = adapter_readers(adapted, [MLP_2])
    same = (without_adapter, without_adapter)
    with pytest.raises(UserError, match=r"layer 2 \(mlp\): fine-tuning changes nothing up to this layer"):
        make_sets([tmp_path / "set"], same, documents)
    make_sets([tmp_path / "set"], same, documents, allow_identical=True)


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "sizes"),
    [
        ([5, 6, 7, 49, 50, 200], 100, [3, 2, 1]),
        ([10] * 8, 80, [8]),
        ([10] * 9, 80, [5, 4]),
        ([10] * 11, 40, [4, 3, 4]),
        ([500, 600], 100, [1, 1]),
    ],
)
def test_batches_are_few_and_even_and_within_the_budget(lengths, batch_tokens, sizes):
    batches = batches_by_length(lengths, batch_tokens)
    assert [len(batch) for batch in batches] == sizes
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch[-1]] <= batch_tokens for batch in batches)


def test_shards_hold_every_document_once_and_do_not_depend_on_the_batches():
    documents = [Document(str(i), (1, *range(2, 2 + n)), 1) for i, n in enumerate([5, 50, 7, 49, 6, 200, 3])]
    small, large = (planned_shards(documents, 1, 60, batch_tokens) for batch_tokens in (20, 1000))
    assert [shard.n_tokens for shard in small] == [shard.n_tokens for shard in large] == [70, 250]
    order = [i for shard in small for batch in shard.batches for i in batch]
    assert order == [i for shard in large for batch in shard.batches for i in batch] == [6, 0, 4, 2, 3, 1, 5]


def test_a_batch_is_padded_on_the_right_and_padding_is_not_recorded():
    ids, rows = padded([(1, 5, 0), (1, 6, 0, 7)], skip_id=1)
    assert ids.tolist() == [[1, 5, 0, 0], [1, 6, 0, 7]]
    assert rows.tolist() == [1, 2, 5, 6, 7]


def test_an_end_token_that_is_bos_is_recorded(adapted, tokenizer, tmp_path: Path):
    bos = tokenizer.bos_token_id
    documents = [Document("0", (bos, 5, 6, bos), 2), Document("1", (7, bos, 8, 9, bos), 3)]
    (store,) = make_sets([tmp_path / "set"], adapter_readers(adapted, [MLP_2]), documents, skip_id=bos)
    assert store.token_id.tolist() == [5, 6, bos, 7, bos, 8, 9, bos]
    assert store.position.tolist() == [1, 2, 3, 0, 1, 2, 3, 4]


def test_the_fingerprint_changes_with_ids_and_facts(documents):
    first = fingerprint(documents, {"layer": 1})
    assert first == fingerprint(documents, {"layer": 1})
    assert first != fingerprint(documents, {"layer": 2})
    assert first != fingerprint(documents[:-1], {"layer": 1})


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(adapted, documents, tmp_path: Path):
    shards = planned_shards(documents, None, 400, 300)
    writer = SetWriter(tmp_path / "set", 64, {})
    writer.prepare()
    readers = adapter_readers(adapted, [MLP_2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # a shard takes more
    try:
        with pytest.raises(OSError, match="shard-00000") as error:
            record(readers, [MLP_2], documents, shards, [writer], None, "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno in REMEDIES
    assert [path.name for path in writer.partial.iterdir()] == ["plan.json"]
    record(readers, [MLP_2], documents, shards, [writer], None, "cpu")
    assert all(writer.has(shard.number) for shard in shards)


def test_models_that_cannot_fit_are_refused_before_they_are_loaded(tiny_student, capsys):
    model = sizes(read_config(str(tiny_student)))
    small, large = (recording_need(model, 1e6, False, 4, tokens, n_sets=1) for tokens in (4096, 8192))
    assert 4 * model.parameters + 1e6 < small.total < large.total < 2 * small.total
    check_fits("collecting activations", small, small.total, "cpu", "give less")
    assert "plan: collecting activations needs" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"collecting activations needs .* of memory and .* are free; give less"):
        check_fits("collecting activations", large, small.total, "cpu", "give less")
    assert recording_need(model, 1e6, True, 4, 4096, n_sets=1).total < small.total


def test_the_plan_of_recording_is_what_was_measured_on_a_gpu_and_at_most_a_quarter_more():
    from transformers import MistralConfig

    from benchmarks.parts.mistral_7b import SHAPES
    from benchmarks.parts.record import RESULTS
    from finqa.models.settings import DEFAULTS

    record = json.loads((RESULTS / "collect.json").read_text())
    model = sizes(MistralConfig(**SHAPES), DEFAULTS.lora_modules, record["rank"])
    need = recording_need(model, 4 * model.trained, False, 2, record["batch_tokens"], n_sets=1)
    assert 1.0 <= need.total / (1e9 * record["peak_memory_gb"]) <= 1.25
