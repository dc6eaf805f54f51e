"""Every method trained by the study on a planted set: equally many latents active, one result whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from made_up_activations import D_MODEL, planted_activations, write_store

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.interventions.sets import Reading
from study.invented.diff.dictionaries import Settings, train, trained_until_converged
from study.invented.diff.plan import METHODS, Form, Lengths
from study.invented.diff.sources import OfDictionary, energies, exclusivity, top

L0 = 4
SETTINGS = Settings(n_latents=32, k=6, rate=1.0)
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
    store: ActivationStore, method: str, form: Form, tmp_path: Path
):
    made = train(store, method, form, 0, SETTINGS, 4, tmp_path / "one", L0)
    assert made.quality["l0"] == pytest.approx(L0, rel=0.12)
    assert (made.quality["passes"] == 0) == (form == "untrained")
    again = train(store, method, form, 0, SETTINGS, 4, tmp_path / "one", L0)  # that is there, and is not trained again
    assert again.quality == made.quality
    start = new_dictionary(made.model.config, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.model.W_dec.cpu(), start.W_dec) == (form != "trained")
    energy = energies(OfDictionary(made.model), store, "cpu")
    chosen = top(energy, 5)
    reading = Reading(store.read(torch.arange(100)))
    added = OfDictionary(made.model).addition(chosen)(reading)
    assert added.shape == (100, D_MODEL) and energy.shape == (32,)
    told = exclusivity(made.model, store, store.split(0.1, 0).held_out)
    assert (told is None) == (method in ("difference SAE", "stage-wise SAE"))


def test_the_energy_of_an_item_is_what_it_adds(store: ActivationStore, tmp_path: Path):
    source = OfDictionary(train(store, "plain", "trained", 0, SETTINGS, 2, tmp_path / "one", L0).model)
    reading = Reading(store.read(torch.arange(len(store))))
    one = top(energies(source, store, "cpu"), 1)
    added = source.addition(one)(reading).double().square().sum(dim=-1).mean()
    assert float(energies(source, store, "cpu")[one[0]]) == pytest.approx(float(added), rel=1e-5)


def test_the_dictionary_of_the_last_passes_stays(store: ActivationStore, tmp_path: Path):
    how_long = Lengths(ks=(L0,), passes=1, most_passes=4)
    made = trained_until_converged(store, "plain", 0, SETTINGS, tmp_path / "plain", how_long)
    passes = made.quality["passes"]
    assert passes in (2, 4) and [path.name for path in tmp_path.iterdir()] == [f"plain-{passes}"]
    assert made.quality["converged"] == (made.quality["gain"] < 0.01)
