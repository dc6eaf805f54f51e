"""The kind of every token, and explained variance and activation on each kind, beside float64 references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_activations import D_MODEL
from made_up_documents import write_documents
from safetensors.torch import load_file

from crosscoder.activations.collection import documents_from_rows
from crosscoder.activations.layout import KINDS, TEMPLATE
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.measures import explained_variance
from crosscoder.analysis.statistics import latent_statistics
from crosscoder.analysis.token_kinds import explained_variance_by_kind, kind_rows, token_kinds
from crosscoder.dictionaries.checkpoint import save_tensors
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.models import students
from finqa.task.prompts import END_PYTHON, PASSAGE, PYTHON, QUESTION, REQUEST, page_from_prompt, training_prompt
from finqa.task.records import Question, TeacherRow, format_table

PAGE = Question(
    id="kinds-1",
    pre_text="net sales rose | as the table shows .\nthe change was small .",
    table=[["year", "2009", "2008"], ["net sales", "$ 206588", "181001"], ["costs", "99", "98"]],
    post_text="see note 9 .",
    question="what was the change ?",
    answer="25587",
)
BARE = Question(
    id="kinds-2",
    pre_text="costs fell .",
    table=[],
    post_text="",
    question="how much ?",
    answer="1",
)
CODE = "change = 206588 - 181001\nans = change"


@pytest.fixture(scope="module")
def tokenizer(tiny_student: Path) -> Any:
    return students.load_tokenizer(str(tiny_student))


def rows(*prompts: str) -> list[TeacherRow]:
    return [
        TeacherRow(prompt=prompt, generated_code=CODE, actual_answer="1", expected_answer="1", id=f"row-{i}")
        for i, prompt in enumerate(prompts)
    ]


def noise(table: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    by_token = torch.randn(1000, 2, D_MODEL, generator=generator)
    return by_token[table["token_id"]] + 0.3 * torch.randn(len(table["token_id"]), 2, D_MODEL, generator=generator) + 2


def store_of(folder: Path, tokenizer: Any, prompts: list[str], raw: bool = False, bos: bool = False, **how: Any):
    documents = documents_from_rows(rows(*prompts), tokenizer, raw)
    return write_documents(folder, documents, None if bos else tokenizer.bos_token_id, **{"activations": noise, **how})


def texts_by_kind(store: ActivationStore, kinds: torch.Tensor, tokenizer: Any, document: int) -> dict[str, str]:
    own = (store.document == document).nonzero().squeeze(-1)
    return {
        kind: tokenizer.decode(store.token_id[own[kinds[own] == number]].tolist())
        for number, kind in enumerate(KINDS)
        if (kinds[own] == number).any()
    }


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_is_of_the_part_of_the_document_that_it_stands_in(tmp_path, tokenizer, bos):
    store = store_of(tmp_path / "set", tokenizer, [training_prompt(PAGE), training_prompt(BARE)], bos=bos)
    found = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 0)
    mark_up = "[INST][/INST]"
    expected = {
        "chat": f"<s>{mark_up}" if bos else mark_up,
        "frame": REQUEST + PASSAGE + QUESTION + PYTHON,
        "passage": PAGE.pre_text + PAGE.post_text,
        "table": format_table(PAGE.table),
        "question": PAGE.question,
        "program": CODE,
        "end": f"{END_PYTHON}</s>",
    }
    assert {kind: squeezed(text) for kind, text in found.items()} == {k: squeezed(t) for k, t in expected.items()}
    without = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 1)
    assert "table" not in without and squeezed(without["passage"]) == squeezed(BARE.pre_text)


def test_the_table_is_what_the_prompts_parser_takes_for_it(tmp_path, tokenizer):
    for number, page in enumerate((PAGE, BARE)):
        prompt = training_prompt(page)
        store = store_of(tmp_path / str(number), tokenizer, [prompt, prompt])
        found = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 0)
        assert squeezed(found.get("table", "")) == squeezed(format_table(page_from_prompt(prompt).table))


def test_without_the_chat_template_there_is_no_chat(tmp_path, tokenizer):
    prompt = training_prompt(PAGE)
    store = store_of(tmp_path / "set", tokenizer, [prompt, prompt], raw=True)
    found = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 0)
    assert "chat" not in found
    assert squeezed(found["program"]) == squeezed(CODE) and squeezed(found["end"]) == squeezed(END_PYTHON)


def test_markers_that_the_page_or_the_program_repeats_change_nothing_else(tmp_path, tokenizer):
    prompt = training_prompt(PAGE).replace("the change was small .", f"the {PASSAGE} {PYTHON} was small .")
    store = store_of(tmp_path / "set", tokenizer, [prompt, prompt])
    found = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 0)
    assert squeezed(f"the {PASSAGE} {PYTHON} was") in squeezed(found["passage"])
    assert squeezed(found["frame"]) == squeezed(REQUEST + PASSAGE + QUESTION + PYTHON)


def test_a_prompt_without_markers_is_other_and_its_program_is_known(tmp_path, tokenizer):
    store = store_of(tmp_path / "set", tokenizer, ["what is 1 + 1 ?", "what is 2 + 2 ?"])
    found = texts_by_kind(store, token_kinds(store, tokenizer), tokenizer, 0)
    assert set(found) == {"chat", "other", "program", "end"}
    assert squeezed(found["other"]) == "whatis1+1?"


def test_a_token_that_is_left_out_as_an_outlier_does_not_hide_a_marker(tmp_path, tokenizer):
    """The store drops it, so that the marker's text has a gap; the record on disk has none."""
    prompt = training_prompt(PAGE)
    (hash_id, *_) = tokenizer.encode(QUESTION, add_special_tokens=False)

    def with_sinks(table: dict[str, torch.Tensor]) -> torch.Tensor:
        made = noise(table)
        made[table["token_id"] == hash_id] *= 1000
        return made

    plain = store_of(tmp_path / "plain", tokenizer, [prompt, prompt])
    dropped = store_of(tmp_path / "dropped", tokenizer, [prompt, prompt], activations=with_sinks, drop_outliers=True)
    assert 0 < len(dropped) < len(plain)
    kept = plain.token_id != hash_id
    assert torch.equal(token_kinds(dropped, tokenizer), token_kinds(plain, tokenizer)[kept])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("prompts", [[training_prompt(PAGE), training_prompt(BARE)], ["what is 1 + 1 ?", "x"]])
def test_a_set_keeps_the_kinds_and_one_without_them_has_them_found_by_its_ids(tmp_path, tokenizer, prompts, bos, raw):
    new = store_of(tmp_path / "set", tokenizer, prompts, raw, bos)
    assert new.config.version == 2 and new.recorded.kind is not None
    table = load_file(new.folder / "tokens.safetensors")
    del table["kind"]
    save_tensors(new.folder / "tokens.safetensors", table)
    config = json.loads((new.folder / "config.json").read_text())
    del config["version"], config["files"]
    (new.folder / "config.json").write_text(json.dumps(config))
    old = ActivationStore(new.folder)
    assert old.config.version == 1 and old.recorded.kind is None
    assert torch.equal(token_kinds(new, tokenizer), token_kinds(old, tokenizer))


# Explained variance


def dictionary_of(method: str, store: ActivationStore) -> BatchTopKCrosscoder:
    groups = {"partition": {"n_delta": 12, "k_delta": 2}, "dedicated": {"reserved_share": 0.25}}.get(method, {})
    config = CrosscoderConfig(D_MODEL, 24, 6, method=method, **groups)  # pyright: ignore[reportArgumentType]
    model = new_dictionary(config, generator=torch.Generator().manual_seed(3))
    model.activation_scales = (0.7, 1.3)[: config.n_inputs]
    for stage in model.stages:
        model.stage = stage
        model.set_thresholds([1.5, 1.0, 0.5][: max(1, len(model.groups()))])
    model.stage = None
    torch.nn.init.normal_(model.b_dec, generator=torch.Generator().manual_seed(4))
    return model


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory, tokenizer) -> tuple[ActivationStore, torch.Tensor]:
    prompts = [training_prompt(PAGE), training_prompt(BARE)] * 6
    store = store_of(tmp_path_factory.mktemp("kinds") / "set", tokenizer, prompts)
    return store, token_kinds(store, tokenizer)


def reference(x: torch.Tensor, xhat: torch.Tensor, mean: torch.Tensor) -> float:
    error, total = ((x - xhat) ** 2).sum(), ((x - mean) ** 2).sum()
    return float(1 - error / total)


@pytest.mark.parametrize("method", ["batchtopk", "partition", "dedicated", "difference-sae", "stagewise-sae"])
def test_explained_variance_by_kind_is_that_of_a_float64_reference(two_pages, method):
    store, kinds = two_pages
    model = dictionary_of(method, store)
    indices = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))[: len(store) // 2]
    raw = store.read(indices)
    with torch.no_grad():
        x, xhat = (t.double() for t in (model.scale(raw), model.forward(model.scale(raw))))
    scales = torch.tensor(model.activation_scales).double()[:, None]
    difference = [
        (v / scales)[:, -1] - (v / scales)[:, 0] if len(scales) == 2 else (v / scales)[:, 0] for v in (x, xhat)
    ]
    found = {each.kind: each for each in explained_variance_by_kind(model, store, indices, kinds, batch_size=37)}
    absent = ("other", "prompt", "completion")
    names = {"all": KINDS, "template": TEMPLATE} | {kind: (kind,) for kind in KINDS if kind not in absent}
    assert list(found) == list(names)
    for name, members in names.items():
        at = torch.isin(kinds[indices], torch.tensor([KINDS.index(kind) for kind in members]))
        each = found[name]
        assert each.own_mean.n_tokens == int(at.sum())
        for explained, over in ((each.own_mean, at), (each.common_mean, torch.ones_like(at))):
            d, dhat = (v[at] for v in difference)
            assert explained.difference == pytest.approx(reference(d, dhat, difference[0][over].mean(0)), rel=1e-6)
            if method == "difference-sae":
                assert explained.instruct is explained.joint is None
                continue
            for m, value in enumerate((explained.instruct, explained.fine_tuned)):
                assert value == pytest.approx(reference(x[at, m], xhat[at, m], x[over, m].mean(0)), rel=1e-6)
            assert explained.joint == pytest.approx(reference(x[at], xhat[at], x[over].mean(0)), rel=1e-6)


def test_all_kinds_together_are_the_figure_of_the_report_and_the_average_of_the_parts(two_pages):
    store, kinds = two_pages
    model = dictionary_of("batchtopk", store)
    indices = torch.arange(len(store))
    found = explained_variance_by_kind(model, store, indices, kinds)
    whole = explained_variance(model, (raw for _, raw in store.batches(indices, 4096)))
    assert found[0].own_mean == pytest.approx(whole, rel=1e-9) and found[0].common_mean == pytest.approx(
        whole, rel=1e-9
    )
    parts = [each for each in found if each.kind in KINDS]
    average = sum(each.share_of_variance * each.common_mean.difference for each in parts)
    assert average == pytest.approx(whole.difference)
    assert sum(each.share_of_error for each in parts) == pytest.approx(1)
    assert sum(each.own_mean.n_tokens for each in parts) == len(store)


def test_that_a_token_is_of_its_kind_explains_nothing_by_the_kinds_own_mean(two_pages):
    """A dictionary that gives every token the mean of its kind: all of what is between the kinds, nothing within."""
    store, kinds = two_pages
    model = dictionary_of("batchtopk", store)
    raw = store.read(torch.arange(len(store))).float()
    means = torch.stack([raw[kinds == k].mean(0) if (kinds == k).any() else raw[0] for k in range(len(KINDS))])
    model.activation_scales = (1.0, 1.0)
    model.forward = lambda x: means[kinds]  # pyright: ignore[reportAttributeAccessIssue]
    model.decode = lambda f: means[kinds]  # pyright: ignore[reportAttributeAccessIssue]
    for each in explained_variance_by_kind(model, store, torch.arange(len(store)), kinds, batch_size=len(store)):
        if each.kind in KINDS:
            assert each.own_mean.joint == pytest.approx(0, abs=1e-5)
        if each.kind == "all":
            assert each.own_mean.joint is not None and each.own_mean.joint > 0.05


def test_rows_are_flat_and_hold_no_number_that_is_none(two_pages):
    store, kinds = two_pages
    one = torch.tensor([5])
    (everything, *_) = kind_rows(explained_variance_by_kind(dictionary_of("batchtopk", store), store, one, kinds))
    assert everything["kind"] == "all" and everything["n_tokens"] == 1
    # A single token does not vary.
    assert everything["instruct"] is None and everything["share_of_variance"] is None
    assert all(v is None or isinstance(v, str) or math.isfinite(v) for v in everything.values())


# Latents


def test_the_share_on_template_tokens_is_of_the_summed_activation(two_pages):
    store, kinds = two_pages
    model = dictionary_of("batchtopk", store)
    model.b_enc.data[7] = -1e6
    indices = torch.arange(0, len(store), 2)
    with torch.no_grad():
        f = model.encode(model.scale(store.read(indices))).double()
    found = latent_statistics(model, store, indices, batch_size=41, kinds=kinds)
    share = found.template_share
    assert share is not None
    template = torch.isin(kinds[indices], torch.tensor([KINDS.index(kind) for kind in TEMPLATE]))
    torch.testing.assert_close(share, f[template].sum(0) / f.sum(0).clamp_min(1e-12), rtol=1e-5, atol=1e-7)
    assert share[7] == 0 and found.n_firings[7] == 0
    assert share.max() > 0
    assert latent_statistics(model, store, indices).template_share is None
