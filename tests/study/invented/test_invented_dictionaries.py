"""Every method trained by the study on a planted set: equally many latents active, one result whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from made_up_activations import D_MODEL, planted_activations, write_store

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.interventions.sets import Latents, Reading
from finqa.models import students
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import Folders
from study.invented.diff import dictionaries, pairs, sources
from study.invented.diff.carrying import Carrier
from study.invented.diff.dictionaries import Settings, train
from study.invented.diff.plan import (
    ALL,
    ANY_ITEM,
    BY_NU,
    BY_RUN,
    DECODED,
    ENERGY,
    METHODS,
    TOLD,
    TOP_BY_NU,
    Form,
    Lengths,
    sites,
    subjects,
)
from study.invented.diff.sources import Decoded, OfDictionary, energies, exclusivity, ranked, top
from study.invented.files import DOCUMENTS, Place
from study.invented.plan import Plan
from study.work import read_json

L0 = 4
SETTINGS = Settings(n_latents=32, k=6, rate=1.0, passes=4)
FORMS = [form for form in get_args(Form) if form != "baseline"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """4,000 tokens in 80 documents."""
    folder: Path = tmp_path_factory.mktemp("planted")
    write_store(folder, planted_activations(4000, D_MODEL, 16))
    return ActivationStore(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_read_with_equally_many_latents_active(
    store: ActivationStore,
    method: str,
    form: Form,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    made = train(store, method, form, 0, SETTINGS, tmp_path / "one", L0)
    begun, *log = capsys.readouterr().out.splitlines()
    steps = int(begun.removeprefix("one: ").removesuffix(" steps"))
    assert (steps == 0) == (form == "untrained") and (f"step {steps} of {steps}: loss" in "".join(log)) == (steps > 0)
    assert made.quality["l0"] == pytest.approx(L0, rel=0.12)
    assert (made.quality["passes"] == 0) == (form == "untrained")
    again = train(store, method, form, 0, SETTINGS, tmp_path / "one", L0)  # that is there, and is not trained again
    assert again.quality == made.quality
    start = new_dictionary(made.model.config, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.model.W_dec.cpu(), start.W_dec) == (form != "trained")
    energy = energies(OfDictionary(made.model), store, "cpu")
    chosen = top(energy, 5)
    reading = Reading(store.read(torch.arange(100)))
    added = OfDictionary(made.model).addition(chosen)(reading)
    assert added.shape == (100, D_MODEL) and energy.shape == (32,)
    torch.testing.assert_close(added, Latents(made.model, chosen)(reading))  # of the whole dictionary
    monkeypatch.setattr(sources, "READ_AT_ONCE", 30)
    torch.testing.assert_close(Decoded(made.model, False)(reading), Latents(made.model, range(32))(reading))
    rebuilt = made.model.unscale(made.model.reconstruct(made.model.scale(reading.pairs))[1])
    torch.testing.assert_close(Decoded(made.model, True)(reading), made.model.difference(rebuilt))
    told = exclusivity(made.model, store, store.split(0.1, 0).held_out)
    assert (told is None) == (method in ("difference SAE", "stage-wise SAE"))


def test_the_energy_of_an_item_is_what_it_adds(store: ActivationStore, tmp_path: Path):
    source = OfDictionary(train(store, "plain", "trained", 0, SETTINGS, tmp_path / "one", L0).model)
    reading = Reading(store.read(torch.arange(len(store))))
    one = top(energies(source, store, "cpu"), 1)
    added = source.addition(one)(reading).double().square().sum(dim=-1).mean()
    assert float(energies(source, store, "cpu")[one[0]]) == pytest.approx(float(added), rel=1e-5)


def test_what_a_dictionary_is_ranked_by_is_computed_once_and_not_taken_from_another(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, other = (train(store, "plain", "trained", seed, SETTINGS, tmp_path / str(seed), L0).model for seed in (0, 1))
    found = ranked(tmp_path / "0", made, store, "cpu")
    expected = exclusivity(made, store, store.split(0.1, 0).held_out)
    assert torch.equal(found.energies, energies(OfDictionary(made), store, "cpu"))
    assert expected is not None and found.exclusive is not None
    torch.testing.assert_close(found.exclusive, expected, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(store, "batches", lambda *_: pytest.fail("read again"))
    assert torch.equal(ranked(tmp_path / "0", made, store, "cpu").energies, found.energies)
    monkeypatch.undo()
    assert not torch.equal(ranked(tmp_path / "0", other, store, "cpu").energies, found.energies)


@pytest.mark.parametrize(
    ("form", "by_nu", "sets"),
    [
        ("trained", [4], [(TOLD, 3), (TOP_BY_NU, 1), ("first 6", 6), (ALL, 32), (DECODED, 32)]),
        ("trained", [], [(TOLD, 3), ("first 6", 6), (ALL, 32), (DECODED, 32)]),
        ("untrained", [4], [(TOLD, 3), (ALL, 32)]),
    ],
)
def test_the_sets_that_are_explored_and_what_each_puts_in(
    store: ActivationStore, form: Form, by_nu: list[int], sets: list[tuple[str, int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("study.invented.diff.carrying.FIRST", (6, 30))
    source = OfDictionary(train(store, "plain", form, 0, SETTINGS, tmp_path / "one", L0).model)
    orders = {ENERGY: list(range(29, -1, -1)), BY_NU: by_nu, ANY_ITEM: [1, 2, 5]}
    put_in = []

    def explored(addition, method, form, name, items):
        put_in.append(addition)
        return method, form, name, items

    carrier = Carrier.__new__(Carrier)
    monkeypatch.setattr(carrier, "explored", explored)
    rows = list(carrier.explored_dictionary(source, "plain", form, orders))
    assert rows == [("plain", form, name, n) for name, n in sets]
    reading = Reading(store.read(torch.arange(50)))
    items = {TOLD: [1, 2, 5], TOP_BY_NU: [4], "first 6": range(24, 30), ALL: range(32)}
    for (name, _), addition in zip(sets, put_in, strict=True):
        if name != DECODED:
            torch.testing.assert_close(addition(reading), Latents(source.model, items[name])(reading))


def test_passes_are_chosen_on_the_control_and_are_those_of_every_pair(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "m"), "pocket-mistral", "FinQA-mini")
    site = sites(plan)["residual2"]
    how_long = Lengths(seeds=(0,), latents=(32,), ks=(L0,), rates=(1.0,), passes=1, most_passes=4, controls=False)
    monkeypatch.setattr(dictionaries, "lengths", lambda _: how_long)
    monkeypatch.setattr(dictionaries, "recorded", lambda *_: store.folder)
    monkeypatch.setattr(students, "default_device", lambda: torch.device("cpu"))
    recorded = plan.place.part(DOCUMENTS).activations(dictionaries.recording(plan, BY_RUN["K-seed3"], site).name)
    recorded.mkdir(parents=True)
    said = dictionaries.choose_settings(plan, BY_RUN["K-seed3"], site, "plain")
    assert said.startswith("plain: 32-k4-x1-") and recorded.exists()
    for method in METHODS.keys() - {"plain"}:
        write_json(dictionaries.settings_path(plan, method), {})
    assert dictionaries.choose_settings(plan, BY_RUN["K-seed3"], site, "plain") == said
    assert not recorded.exists()  # of no more use
    chosen = dictionaries.read_settings(plan, "plain")
    explained = read_json(dictionaries.settings_path(plan, "plain"))["explained_difference"]
    last, before = (explained[f"32-k4-x1-{n}"] for n in (chosen.settings.passes, chosen.settings.passes // 2))
    assert chosen.settings.passes in (2, 4) and chosen.converged == (abs(last - before) < 0.01)

    pair = BY_RUN["A-seed3"]
    untrained, trained = [one for one in subjects(plan, pair, "diff") if one.method == "plain"]
    pairs.train(plan, pair, site, "plain")
    folder = dictionaries.folder_of(plan, pair, site)
    assert {path.name for path in folder.iterdir()} == {trained.name, untrained.name}
    made = dictionaries.of_pair(plan, store, pair, site, trained)
    assert (made.quality["passes"], made.quality["converged"]) == (chosen.settings.passes, chosen.converged)
