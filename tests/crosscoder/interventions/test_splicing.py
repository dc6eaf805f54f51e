"""Loss recovered by dictionaries of which it is known: the identity, nothing, and the difference alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from made_up_documents import write_documents
from small_pair import small_pair

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target, reader
from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions import splicing
from crosscoder.interventions.halves import pair_of
from crosscoder.interventions.splicing import (
    ABLATIONS,
    CONDITIONS,
    LossRecovered,
    SpliceLosses,
    loss_recovered,
    mean_activations,
    splice_losses,
    stored_texts,
    target_of,
)
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal

WIDTH = 32
SITES = ("mlp", "attention", "residual")
BOS = 1


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return small_pair(WIDTH)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    dice = torch.Generator().manual_seed(0)
    lengths = (9, 12, 12, 16, 21)
    return [
        Document(f"d{i}", (BOS, *torch.randint(3, 40, (length,), generator=dice).tolist()), length - 4)
        for i, length in enumerate(lengths)
    ]


def recorded(models: tuple[Any, Any], documents: list[Document], folder: Path, site: Any = "mlp") -> ActivationStore:
    """A set of what both models give at layer 2."""
    read = [reader(model, [Target(2, site)], "hooks") for model in models]
    of_document = [torch.stack([r(torch.tensor([d.ids]))[0][0] for r in read], dim=1) for d in documents]

    def activations(table: dict[str, torch.Tensor]) -> torch.Tensor:
        places = zip(table["document"].tolist(), table["position"].tolist(), strict=True)
        return torch.stack([of_document[document][position] for document, position in places])

    return write_documents(folder, documents, BOS, activations)


@pytest.fixture(scope="module")
def store(models, documents, tmp_path_factory) -> ActivationStore:
    return recorded(models, documents, tmp_path_factory.mktemp("splicing") / "set")


def identity(method: str = "batchtopk", scales: tuple[float, ...] = (0.5, 3.0)) -> BatchTopKCrosscoder:
    """One latent for either sign of every input: it reconstructs whatever it reads."""
    n_inputs = 1 if method == "difference-sae" else 2
    width = n_inputs * WIDTH
    config = CrosscoderConfig(WIDTH, 2 * width, 2 * width, method=method)  # pyright: ignore[reportArgumentType]
    model = new_dictionary(config)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    model.W_dec.data = both.view(2 * width, n_inputs, WIDTH)
    model.W_enc.data = both.T.reshape(n_inputs, WIDTH, 2 * width).contiguous()
    model.threshold, model.activation_scales = 0.0, scales[:n_inputs]
    return model


def nothing(method: str = "batchtopk") -> BatchTopKCrosscoder:
    model = identity(method)
    model.W_dec.data.zero_()
    return model


def opened(path: Path) -> KeyedJournal:
    journal = KeyedJournal(path)
    journal.open()
    return journal


def recovered(model, models, store, site: Any = "mlp") -> dict[tuple[str, str, str], LossRecovered]:
    texts = stored_texts(store, range(len(store.documents)), BOS)
    means = mean_activations(store, torch.arange(len(store)))
    with TemporaryDirectory() as folder:
        journal = opened(Path(folder) / "splicing.jsonl")
        losses = splice_losses(model, pair_of(*models), texts, Target(2, site), means, journal, batch_tokens=40)
    found = loss_recovered(losses)
    return {(each.model, each.tokens, each.ablation): each for each in found}


@pytest.mark.parametrize("site", SITES)
def test_the_identity_recovers_all_and_nothing_recovers_nothing(models, documents, store, tmp_path, site):
    store = store if site == "mlp" else recorded(models, documents, tmp_path / "set", site)
    everything = recovered(identity(), models, store, site)
    assert len(everything) == 2 * 2 * len(ABLATIONS)
    for each in everything.values():
        assert each.recovered == pytest.approx(1, abs=1e-3) and each.clean == pytest.approx(each.spliced, abs=1e-4)
        assert each.low == pytest.approx(1, abs=1e-2) and each.high == pytest.approx(1, abs=1e-2)
        assert each.divergence_recovered == pytest.approx(1, abs=1e-4) and each.divergence_ablated > 0
    for (_, _, ablation), each in recovered(nothing(), models, store, site).items():
        if ablation == "zero":
            assert each.recovered == pytest.approx(0, abs=1e-9) and each.spliced == each.ablated != each.clean
            assert each.divergence_recovered == pytest.approx(0, abs=1e-9)


def test_a_dictionary_that_gives_the_mean_recovers_nothing_of_the_mean_ablation(models, store):
    model = nothing()
    model.activation_means = mean_activations(store, torch.arange(len(store))).float()
    for (_, _, ablation), each in recovered(model, models, store).items():
        if ablation == "mean":
            assert each.recovered == pytest.approx(0, abs=1e-5)


def test_a_difference_sae_answers_to_the_instruct_activation_in_the_fine_tuned_model_alone(models, store):
    full, empty = (recovered(make("difference-sae"), models, store) for make in (identity, nothing))
    assert {name for name, _, _ in full} == {"fine-tuned"}
    for tokens in ("program", "all"):
        assert full["fine-tuned", tokens, "other"].recovered == pytest.approx(1, abs=1e-3)
        assert empty["fine-tuned", tokens, "other"].recovered == pytest.approx(0, abs=1e-9)


def test_the_other_models_activation_at_the_last_residual_is_the_other_model(models, documents, tmp_path):
    """Above the only layer that differs, so that the ablated model must lose just what tells the two apart."""
    store = recorded(models, documents, tmp_path / "set", "residual")
    found = recovered(identity(), models, store, "residual")
    # BOS keeps its own activation, so the two are near each other, not equal.
    instruct, fine_tuned = (found[name, "program", "other"] for name in ("instruct", "fine-tuned"))
    assert instruct.ablated == pytest.approx(fine_tuned.clean, rel=0.1)
    assert abs(instruct.ablated - fine_tuned.clean) < abs(instruct.clean - fine_tuned.clean)


@pytest.mark.parametrize("rows_at_once", [7, 2048])
def test_losses_are_the_models_own_cross_entropies(models, documents, store, monkeypatch, rows_at_once, tmp_path):
    monkeypatch.setattr("crosscoder.interventions.splicing.ROWS_AT_ONCE", rows_at_once)
    texts = stored_texts(store, range(len(documents)), BOS)
    means = mean_activations(store, torch.arange(len(store)))
    journal = opened(tmp_path / "splicing.jsonl")
    losses = splice_losses(identity(), pair_of(*models), texts, target_of(store), means, journal, batch_tokens=30)
    # The dictionary is the identity, so that what is spliced is what was there.
    spliced, clean = (losses.sums[:, :, CONDITIONS.index(name)] for name in ("spliced", "clean"))
    torch.testing.assert_close(spliced, clean, rtol=1e-4, atol=1e-4)
    for number, document in enumerate(documents):
        ids = torch.tensor([document.ids])
        for m, model in enumerate(models):
            with torch.no_grad():
                each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            assert losses.divergences[number, m, CONDITIONS.index("clean")].tolist() == [0, 0]
            own = losses.sums[number, m, CONDITIONS.index("clean")]
            assert own.tolist() == pytest.approx([float(each[document.n_prompt - 1 :].sum()), float(each[1:].sum())])
        assert losses.counts[number].tolist() == [len(document.ids) - document.n_prompt, len(document.ids) - 2]


def test_a_model_and_its_adapter_are_the_two_models(models, documents, store, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(models[0]), settings).eval()
    whole = copy.deepcopy(adapted).merge_and_unload()
    texts = stored_texts(store, range(len(documents)), BOS)
    means = torch.zeros(2, WIDTH)
    switched, apart = (
        splice_losses(nothing(), pair, texts, Target(2, "mlp"), means, opened(tmp_path / name))
        for name, pair in (("switched", pair_of(adapted)), ("apart", pair_of(models[0], whole)))
    )
    torch.testing.assert_close(switched.sums, apart.sums, rtol=1e-4, atol=1e-3)


def test_what_the_set_does_not_read_keeps_its_activation(models, documents, store, tmp_path):
    """Of the first document the set reads the second token alone, as if the others were outliers."""
    (text,) = stored_texts(store, [0], BOS)
    only = replace(text, untouched=tuple(place for place in range(len(text.ids)) if place != 1))
    means, journal = torch.full((2, WIDTH), 100.0), opened(tmp_path / "splicing.jsonl")
    losses = splice_losses(nothing(), pair_of(*models), [only], Target(2, "mlp"), means, journal)
    ids = torch.tensor([documents[0].ids])
    mean = CONDITIONS.index("mean")
    for m, model in enumerate(models):
        with torch.no_grad():
            clean = model(ids).logits[0, 1:-1].double().softmax(-1)
        hook = model.model.layers[1].mlp.register_forward_hook(
            lambda _module, _inputs, out: torch.where(torch.arange(out.shape[1])[:, None] == 1, 100.0, out)
        )
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        hook.remove()
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        divergence = (clean * (clean.log() - logits[1:].double().log_softmax(-1))).sum()
        assert float(losses.divergences[0, m, mean, 1]) == pytest.approx(float(divergence), rel=1e-4)
        own = losses.sums[0, m, mean]
        assert own.tolist() == pytest.approx([float(each[documents[0].n_prompt - 1 :].sum()), float(each[1:].sum())])


def test_splicing_that_was_killed_goes_on_and_gives_the_same(models, documents, store, monkeypatch, tmp_path):
    arguments = (identity(), pair_of(*models), documents, Target(2, "mlp"), torch.ones(2, WIDTH))
    whole = splice_losses(*arguments, opened(tmp_path / "whole"), batch_tokens=30)
    true_losses, calls = splicing._losses_of_batch, []

    def killed(*of_batch):
        calls.append(of_batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true_losses(*of_batch)

    monkeypatch.setattr(splicing, "_losses_of_batch", killed)
    with pytest.raises(KeyboardInterrupt), KeyedJournal(tmp_path / "killed") as journal:
        splice_losses(*arguments, journal, batch_tokens=30)
    again = splice_losses(*arguments, opened(tmp_path / "killed"), batch_tokens=30)
    assert len(calls) == 1 + len(KeyedJournal(tmp_path / "whole").read().found)
    assert not torch.equal(whole.sums, whole.sums.float().double())  # nothing is rounded on the way
    for name in ("sums", "divergences", "counts"):
        assert torch.equal(getattr(again, name), getattr(whole, name))


def test_stored_documents_are_what_the_models_read(documents, store):
    assert stored_texts(store, [3, 0], BOS) == [documents[3], documents[0]]
    with pytest.raises(UserError, match="no BOS"):
        stored_texts(store, [0], None)


def losses_of(clean: list[float], spliced: list[float], ablated: list[float], counts: list[int]) -> SpliceLosses:
    n = len(counts)
    sums = torch.zeros(n, 2, len(CONDITIONS), 2, dtype=torch.float64)
    for condition, values in (("clean", clean), ("spliced", spliced), ("zero", ablated)):
        sums[:, :, CONDITIONS.index(condition)] = torch.tensor(values).double()[:, None, None]
    return SpliceLosses(sums, sums, torch.tensor(counts)[:, None].expand(-1, 2))


def test_recovered_is_of_means_over_tokens_and_its_interval_is_of_documents():
    found = loss_recovered(losses_of([2, 30], [4, 30], [6, 90], [2, 10]))[0]
    assert (found.clean, found.spliced, found.ablated) == pytest.approx((32 / 12, 34 / 12, 96 / 12))
    assert found.recovered == pytest.approx(62 / 64)
    # Resamples hold the first document alone (a half), the second alone (1), or both.
    assert (found.low, found.high) == pytest.approx((0.5, 1))
    assert loss_recovered(losses_of([2, 30], [4, 30], [6, 90], [2, 10]))[0] == found


def test_intervals_get_narrower_with_documents():
    def width(n: int) -> float:
        dice = torch.Generator().manual_seed(0)
        noise = (torch.rand(n, generator=dice)).tolist()
        found = loss_recovered(losses_of([1.0] * n, [1 + x for x in noise], [3.0] * n, [1] * n))[0]
        assert found.low < found.recovered < found.high
        return found.high - found.low

    assert all(wide > 1.5 * narrow for wide, narrow in pairwise(width(n) for n in (20, 80, 320)))


def test_an_ablation_that_costs_nothing_has_no_figure():
    found = loss_recovered(losses_of([2, 30], [4, 30], [2, 30], [2, 10]))[0]
    assert math.isnan(found.recovered)
