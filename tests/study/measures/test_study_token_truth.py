"""Tokens that fine-tuning fixed: which they are, and what tells them from others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_up_questions import LAYOUT, made_up_questions, made_up_store, perfect_difference_sae

from crosscoder.activations.collection import Document
from crosscoder.activations.store import ActivationStore
from study.measures.auroc import auroc
from study.measures.readouts import Subject, dictionary_subject, difference, norm_subject
from study.measures.selectivity import halves
from study.measures.token_truth import (
    NOT_PREDICTED,
    TOKEN_GROUPS,
    divergence,
    fixed_tokens,
    predictions,
    probe_on_tokens,
    tells_fixed,
    token_groups,
    token_truth,
)

QUESTIONS = made_up_questions()
IN_ADDED = QUESTIONS.added[QUESTIONS.family[QUESTIONS.document]]
OPERATOR = torch.tensor([s == "operator" for s in LAYOUT]).repeat(len(QUESTIONS))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return made_up_store(tmp_path_factory.mktemp("set") / "activations", QUESTIONS)


def test_a_token_is_fixed_where_the_next_one_is_wrong_before_and_right_after(tmp_path: Path):
    questions = made_up_questions(n=10)
    store = made_up_store(tmp_path / "set", questions)
    n_ids = store.documents[0].n_ids
    ids = [list(range(100 * i, 100 * i + n_ids)) for i in range(10)]
    right = [torch.tensor([*row[1:], -5]) for row in ids]
    wrong_at = {2: [7, 9, n_ids - 1], 4: [3]}
    without = [
        torch.where(torch.isin(torch.arange(n_ids), torch.tensor(wrong_at.get(i, []))), -7, row)
        for i, row in enumerate(right)
    ]
    fixed = fixed_tokens(store, without, right, ids)
    places = {(int(store.document[t]), int(store.position[t])) for t in fixed.nonzero().squeeze(-1)}
    # Nothing follows the last token of a document.
    assert places == {(2, 7), (2, 9), (4, 3)}
    assert not fixed_tokens(store, without, without, ids).any()
    assert not fixed_tokens(store, right, without, ids).any()
    names = [TOKEN_GROUPS[g] for g in token_groups(store, questions, fixed).tolist()]
    # Position 3 is passage: only tokens whose next one is of the program are predicted.
    assert names.count("fixed") == 2
    of_document = [names[t] for t in (store.document == 2).nonzero().squeeze(-1).tolist()]
    assert of_document == [
        *["passage"] * 3, *["rest"] * 2, "other predicted", "fixed", "other predicted", "fixed",
        *["other predicted"] * 2, "rest",
    ]  # fmt: skip


def test_predictions_are_the_models_own_for_documents_of_any_length():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=None, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    lengths = [5, 12, 3, 12, 8]
    documents = [Document(f"d{n}", tuple((7 * i + n) % 50 for i in range(n)), n // 3) for n in lengths]
    for document, predicted in zip(documents, predictions(model, documents, batch_size=2), strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([document.ids])).logits[0]
        before = document.n_prompt - 1
        assert torch.equal(predicted.best[before:], alone.argmax(dim=-1)[before:])
        assert (predicted.best[:before] == NOT_PREDICTED).all()
        torch.testing.assert_close(predicted.log_probs.float(), alone[before:].log_softmax(dim=-1), atol=5e-3, rtol=0)


def test_area_and_mean_square_norm_are_those_of_counting(store):
    groups = token_groups(store, QUESTIONS, OPERATOR & IN_ADDED)
    choosing = halves(QUESTIONS)
    sae = dictionary_subject(perfect_difference_sae())
    truth = token_truth(sae, store, QUESTIONS, groups, choosing)
    raw = store.read(torch.arange(len(store)))
    values, squares = sae.read(raw), difference(raw).double().pow(2).sum(dim=-1)
    scored = ~choosing[QUESTIONS.document]
    fixed, other = (groups == TOKEN_GROUPS.index(name) for name in ("fixed", "other predicted"))
    there = scored & (fixed | other)
    expected = auroc(values[there], fixed[there][:, None])[:, 0]
    torch.testing.assert_close(truth.auroc, expected, atol=1e-12, rtol=0)
    for name in TOKEN_GROUPS:
        its = groups == TOKEN_GROUPS.index(name)
        assert truth.n_tokens[name] == int(its.sum())
        assert truth.mean_square_norm[name] == pytest.approx(squares[its].mean().item(), rel=1e-6)
    assert truth.share_in_added_families == 1.0
    assert truth.best_item in QUESTIONS.added.nonzero().squeeze(-1).tolist()
    assert truth.best.value == truth.auroc[truth.best_item].item()
    assert (truth.best.n, truth.best.n_others) == (int((scored & fixed).sum()), int((scored & other).sum()))


def test_the_norm_of_what_is_decoded_is_held_against_the_fixed_tokens(store):
    # The difference SAE decodes what was added, at every told token of the added families.
    groups = torch.where(IN_ADDED & OPERATOR, 0, torch.where(IN_ADDED, 3, 1))
    sae = dictionary_subject(perfect_difference_sae())
    assert token_truth(sae, store, QUESTIONS, groups, halves(QUESTIONS)).decoded.value == 1.0
    assert token_truth(norm_subject(), store, QUESTIONS, groups, halves(QUESTIONS)).decoded.value is None
    raw = store.read(torch.arange(5 * len(LAYOUT)))
    assert sae.decode is not None
    torch.testing.assert_close(sae.decode(raw), difference(raw), atol=0.3, rtol=0)


def test_a_probe_on_one_model_is_fitted_on_one_half_and_read_on_the_other(store):
    choosing = halves(QUESTIONS)[store.document]
    vectors = store.read(torch.arange(len(store))).float()
    known = ~IN_ADDED & (QUESTIONS.family[QUESTIONS.document] == 0)
    groups = torch.where(OPERATOR & known, 0, torch.where(OPERATOR, 1, 3))
    of_first = tells_fixed(probe_on_tokens(vectors[:, 0], groups, choosing), groups, ~choosing)
    assert of_first.value == 1.0  # a known family is in both models
    assert (of_first.n, of_first.n_others) == tuple(int((~choosing & (groups == g)).sum()) for g in (0, 1))
    assert probe_on_tokens(vectors[:, 0], torch.ones_like(groups), choosing).isnan().all()


def test_kl_per_token_is_that_of_the_two_models_next_tokens(tmp_path: Path):
    store = made_up_store(tmp_path / "set", made_up_questions(n=4))
    n, generator = store.documents[0].n_ids, torch.Generator().manual_seed(0)
    first, second = (
        [torch.randn(n - 6, 9, generator=generator).log_softmax(dim=-1) for _ in store.documents] for _ in range(2)
    )
    found = divergence(store, first, second)
    for token in range(len(store)):
        place = int(store.position[token]) - 6
        if place < 0:
            assert found[token].isnan()
            continue
        before, after = (its[int(store.document[token])][place] for its in (first, second))
        expected = torch.nn.functional.kl_div(before, after, reduction="sum", log_target=True)
        assert found[token].item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_item_that_is_on_at_the_fixed_tokens_alone_is_perfect(store):
    # In questions of added families the models differ at every told token: all but the operator's are set aside.
    fixed = OPERATOR & IN_ADDED
    groups = torch.where(fixed, 0, torch.where(IN_ADDED, 3, 1))
    truth = token_truth(norm_subject(), store, QUESTIONS, groups, halves(QUESTIONS))
    assert truth.best.value == 1.0


def test_without_a_fixed_token_there_is_no_figure(store):
    groups = token_groups(store, QUESTIONS, torch.zeros(len(store), dtype=torch.bool))
    truth = token_truth(norm_subject(), store, QUESTIONS, groups, halves(QUESTIONS))
    assert (truth.best_item, truth.best.value, truth.share_in_added_families) == (None, None, None)
    assert (truth.n_tokens["fixed"], truth.mean_square_norm["fixed"]) == (0, None)


def test_a_silent_subject_has_an_area_of_one_half(store):
    silent = Subject("silent", lambda raw: torch.zeros(len(raw), 2), None)
    truth = token_truth(silent, store, QUESTIONS, token_groups(store, QUESTIONS, OPERATOR), halves(QUESTIONS))
    assert truth.auroc.tolist() == [0.5, 0.5]
