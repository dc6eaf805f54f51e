"""Collecting activations: nnsight reads what a forward hook reads, stops early, and pairs the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscoder.activation_store import ActivationStore, ActivationWriter
from crosscoder.collection import (
    Document,
    adapter_readers,
    assert_same_ids,
    batches_by_length,
    documents_from_rows,
    fingerprint,
    reader,
    record,
)
from finqa import students
from finqa.errors import UserError
from finqa.paths import Folders


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


def hooked(model: Any, module: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The module's output in a whole forward pass, by a plain hook."""
    seen: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return seen[0]


SITES: dict[str, Callable[[Any], torch.nn.Module]] = {
    "mlp": lambda block: block.mlp,
    "attention": lambda block: block.self_attn,
    "residual": lambda block: block,
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [1, 2])
def test_both_readers_equal_a_forward_hook_with_the_adapter_off_and_on(adapted, documents, site, layer):
    ids = torch.tensor([documents[0].ids, documents[4].ids])
    mask = torch.ones_like(ids)
    module = SITES[site](adapted.get_base_model().model.layers[layer - 1])
    instruct, fine_tuned = adapter_readers(adapted, layer, site)
    with adapted.disable_adapter():
        off = hooked(adapted, module, ids, mask)
    assert torch.equal(instruct(ids, mask), off)
    assert torch.equal(fine_tuned(ids, mask), hooked(adapted, module, ids, mask))
    assert not torch.equal(instruct(ids, mask), fine_tuned(ids, mask))


def test_nothing_after_the_layer_runs(adapted, documents):
    whole = adapted.get_base_model()
    started: list[str] = []
    modules = {"layer 1": whole.model.layers[0], "layer 2": whole.model.layers[1], "head": whole.lm_head}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: started.append(name)) for name, module in modules.items()
    ]
    ids = torch.tensor([documents[0].ids])
    for read in adapter_readers(adapted, 1, "residual"):
        read(ids, torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    assert started == ["layer 1", "layer 1"]


def test_padding_changes_no_activation(adapted, documents, tmp_path: Path):
    read = adapter_readers(adapted, 2, "mlp")
    writer = ActivationWriter(tmp_path / "together", 64)
    writer.finish(record(read, documents, writer, None, "cpu", batch_tokens=100_000), {})
    writer = ActivationWriter(tmp_path / "alone", 64)
    writer.finish(record(read, documents, writer, None, "cpu", batch_tokens=1), {})
    together, alone = ActivationStore(tmp_path / "together"), ActivationStore(tmp_path / "alone")
    assert torch.equal(together.document, alone.document)
    everything = torch.arange(len(alone))
    assert torch.allclose(together.read(everything).float(), alone.read(everything).float(), atol=1e-2)


def test_every_token_but_bos_is_recorded_once_with_its_place(adapted, documents, tokenizer, tmp_path: Path):
    writer = ActivationWriter(tmp_path / "set", 64)
    stored = record(adapter_readers(adapted, 2, "mlp"), documents, writer, tokenizer.bos_token_id, "cpu", 300)
    writer.finish(stored, {})
    store = ActivationStore(tmp_path / "set")
    recorded = set(zip(store.document.tolist(), store.position.tolist(), store.token_id.tolist(), strict=True))
    expected = {(i, t, token) for i, d in enumerate(documents) for t, token in enumerate(d.ids) if t > 0}
    assert recorded == expected
    assert len(store) == len(expected)
    assert tokenizer.bos_token_id not in store.token_id


def test_what_is_recorded_is_the_activation_of_that_token(adapted, documents, tokenizer, tmp_path: Path):
    writer = ActivationWriter(tmp_path / "set", 64)
    writer.finish(record(adapter_readers(adapted, 2, "mlp"), documents, writer, tokenizer.bos_token_id, "cpu", 300), {})
    store = ActivationStore(tmp_path / "set")
    ids = torch.tensor([documents[7].ids])
    expected = hooked(adapted, adapted.get_base_model().model.layers[1].mlp, ids, torch.ones_like(ids))[0, 1:]
    ours = store.read((store.document == 7).nonzero().squeeze(-1))[:, 1]
    assert torch.allclose(ours.float(), expected.bfloat16().float(), atol=1e-2)


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
    without_adapter, _ = adapter_readers(adapted, 2, "mlp")
    same = (without_adapter, without_adapter)
    with pytest.raises(UserError, match="the adapter changes nothing up to this layer"):
        record(same, documents, ActivationWriter(tmp_path / "set", 64), None, "cpu", 300)
    record(same, documents, ActivationWriter(tmp_path / "set", 64), None, "cpu", 300, allow_identical=True)


def test_batches_hold_documents_of_like_length_within_the_budget():
    lengths = [5, 50, 7, 49, 6, 200]
    documents = [Document(str(i), (1,) * n, 1) for i, n in enumerate(lengths)]
    batches = list(batches_by_length(documents, 100))
    assert batches == [[0, 4, 2], [3, 1], [5]]


def test_a_layer_the_model_does_not_have_is_refused(adapted):
    with pytest.raises(UserError, match="--layer 3: the model has layers 1 to 2"):
        reader(adapted.get_base_model(), 3, "mlp")


def test_the_fingerprint_changes_with_ids_and_facts(documents):
    first = fingerprint(documents, {"layer": 1})
    assert first == fingerprint(documents, {"layer": 1})
    assert first != fingerprint(documents, {"layer": 2})
    assert first != fingerprint(documents[:-1], {"layer": 1})
