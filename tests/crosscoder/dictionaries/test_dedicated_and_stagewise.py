"""Dedicated feature crosscoders and stagewise SAEs; the untrained and the frozen-decoder form of every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_activations import planted_activations, take_steps, write_store
from test_crosscoder_methods import METHODS, SHAPES, B, D, F, K, random_model, raw_activations, settings_of, trainer

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import Method, TrainingConfig
from crosscoder.dictionaries.losses import Weights, objective
from crosscoder.dictionaries.methods import DedicatedCrosscoder, StagewiseSAE, new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.sets import Latents, Reading, dictionary_digest
from crosscoder.training.report import crosscoder_report
from crosscoder.training.sizing import sized_configs
from finqa.runtime.errors import UserError

SHARED, INSTRUCT, FINE_TUNED = slice(0, 12), slice(12, 18), slice(18, 24)
"""Groups of SHAPES["dedicated"]."""


def parameters(model: BatchTopKCrosscoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Dedicated feature crosscoder


def others(model: BatchTopKCrosscoder) -> list[torch.Tensor]:
    """All that reserved latents have for the other model."""
    decoder, encoder, raw = model.W_dec, model.W_enc, model.raw_decoder()
    return [
        *(decoder[INSTRUCT, 1], decoder[FINE_TUNED, 0], raw[INSTRUCT, 1], raw[FINE_TUNED, 0]),
        *(encoder[1, :, INSTRUCT], encoder[0, :, FINE_TUNED]),
    ]


@pytest.mark.parametrize("changes", [{}, {"directions": "apart"}, {"centre": True}, {"freeze_decoder": True}])
def test_a_reserved_latent_has_exactly_nothing_to_do_with_the_other_model(store, tmp_path: Path, changes):
    # Latents die after a batch, so that many are drawn anew.
    run = trainer(store, tmp_path, "dedicated", dead_after_tokens=100, **changes)
    assert not any(each.any() for each in others(run.model))
    run.begin()
    take_steps(run, 20)
    for parameter in (run.model.W_dec, run.model.W_enc):
        moments = run.optimizer.state.get(parameter, {})
        for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
            moved = moments[name]
            parts = (
                (moved[INSTRUCT, 1], moved[FINE_TUNED, 0])
                if parameter is run.model.W_dec
                else (moved[1, :, INSTRUCT], moved[0, :, FINE_TUNED])
            )
            assert moved.any() and not any(part.any() for part in parts)
    run.save_state()
    again = trainer(store, tmp_path, "dedicated", dead_after_tokens=100, **changes)
    model = again.fit()
    for each in (model, load_dictionary(tmp_path)):
        assert not any(part.any() for part in others(each))
        assert analysis.delta(analysis.decoder_norms(each))[INSTRUCT].eq(0).all()
        assert analysis.delta(analysis.decoder_norms(each))[FINE_TUNED].eq(1).all()
    assert (model.W_dec[SHARED].norm(dim=-1) > 0).all()


def test_each_group_is_selected_by_its_share_of_k_in_training_and_at_inference(store, tmp_path: Path):
    model, x = random_model("dedicated"), raw_activations()
    values, norms = model.activations(x), model.W_dec.norm(dim=-1).sum(dim=-1)
    selected = model.select_batch_topk(values).values
    for group, k in ((SHARED, 0.5 * K), (INSTRUCT, 0.25 * K), (FINE_TUNED, 0.25 * K)):
        scores = (values * norms)[:, group]
        cut = scores.flatten().sort(descending=True).values[round(k * B) - 1]
        assert torch.equal(selected[:, group], torch.where(scores >= cut, values[:, group], 0))
    run = trainer(store, tmp_path, "dedicated")
    model = run.fit()
    with torch.no_grad():
        active = model.encode(model.scale(store.read(run.split.train))) > 0
    for group, k in ((SHARED, 0.5 * K), (INSTRUCT, 0.25 * K), (FINE_TUNED, 0.25 * K)):
        assert active[:, group].sum().item() == pytest.approx(k * len(run.split.train), abs=1)
    loaded = load_dictionary(tmp_path)
    assert type(loaded) is DedicatedCrosscoder
    assert loaded.further_thresholds == model.further_thresholds and len(model.further_thresholds) == 2
    raw = store.read(torch.arange(50))
    assert torch.equal(loaded(loaded.scale(raw)), model(model.scale(raw)))
    digest = dictionary_digest(loaded)
    other = load_dictionary(tmp_path)
    other.further_thresholds = (0.0, 0.0)
    assert dictionary_digest(other) != digest


def test_classes_follow_the_group_and_not_the_norms():
    model = new_dictionary(SHAPES["dedicated"])
    model.W_dec.data[0, 0] *= 0.01
    expected = ["shared"] * 12 + ["instruct-only"] * 6 + ["fine-tuned-only"] * 6
    assert analysis.latent_classes(model) == expected
    crosscoder = new_dictionary(SHAPES["batchtopk"])
    crosscoder.W_dec.data[0, 0] *= 0.01
    assert analysis.latent_classes(crosscoder)[:2] == ["fine-tuned-only", "shared"]


def test_a_twentieth_is_reserved_for_either_model_unless_the_user_says_otherwise():
    crosscoder, _ = sized_configs(256, 200_000, "dedicated")
    assert crosscoder.reserved_share == 0.05
    assert (crosscoder.n_latents, crosscoder.n_reserved, crosscoder.n_shared) == (1024, 51, 922)


# Stagewise SAE


def test_a_stage_trains_one_model_and_leaves_the_other_alone(store, tmp_path: Path):
    run = trainer(store, tmp_path, "stagewise-sae")
    start = parameters(run.model)
    run.begin()
    take_steps(run, run.steps_a_stage)
    before = parameters(run.model)
    assert torch.equal(before["W_enc"][1], start["W_enc"][1]) and torch.equal(before["b_enc"], start["b_enc"])
    assert not torch.equal(before["W_enc"][0], start["W_enc"][0])
    take_steps(run, 1)
    first = parameters(run.model)
    # The second stage begins where the first ended: one step of Adam moves a number by the learning rate at most.
    assert (first["W_enc"][1] - before["W_enc"][0]).abs().max() < 1.01 * run.config.learning_rate
    take_steps(run, run.steps_a_stage - 1)
    after = parameters(run.model)
    assert torch.equal(after["W_enc"][0], before["W_enc"][0]) and torch.equal(after["b_dec"][0], before["b_dec"][0])
    assert torch.equal(after["W_dec"][:, 0], before["W_dec"][:, 0])
    assert torch.equal(after["b_enc_before"], before["b_enc_before"])
    assert torch.allclose(run.model.W_dec.norm(dim=-1), torch.ones(F, 2), atol=1e-6)
    assert run.steps_done == run.total_steps == 2 * run.steps_a_stage


def test_the_first_stage_is_an_autoencoder_of_the_instruct_model_by_autograd():
    model, x = random_model("stagewise-sae"), raw_activations()
    model.enter_stage(0)
    scaled = model.scale(x)
    assert torch.equal(scaled, x[:, :1])
    terms = objective(model, scaled, settings_of("stagewise-sae", aux_weight=0.0), Weights(k=K, l1=0.0, difference=0.0))
    values = torch.relu(x[:, 0] @ model.W_enc[0] + model.b_enc_before)
    cut = values.detach().flatten().sort(descending=True).values[K * B - 1]
    kept = torch.where(values >= cut, values, 0)
    error = x[:, 0] - kept @ model.W_dec[:, 0] - model.b_dec[0]
    assert terms.loss.item() == pytest.approx(error.pow(2).sum(dim=-1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("stop", [31, 81])
def test_a_run_that_is_stopped_in_either_stage_ends_with_the_same_numbers(store, tmp_path: Path, stop: int):
    expected = trainer(store, tmp_path / "whole", "stagewise-sae").fit()
    first = trainer(store, tmp_path / "stopped", "stagewise-sae")
    assert 31 < first.steps_a_stage < 81 < first.total_steps
    first.begin()
    take_steps(first, stop)
    first.save_state()
    again = trainer(store, tmp_path / "stopped", "stagewise-sae").fit()
    for name, value in parameters(expected).items():
        assert torch.equal(value, parameters(again)[name]), name
    assert (again.threshold, again.further_thresholds) == (expected.threshold, expected.further_thresholds)


def test_each_stage_has_k_active_latents_by_its_own_threshold_and_both_reconstruct(store, tmp_path: Path):
    run = trainer(store, tmp_path, "stagewise-sae")
    run.fit()
    model = load_dictionary(tmp_path)
    assert isinstance(model, StagewiseSAE)
    with torch.no_grad():
        x = model.scale(store.read(run.split.train))
        f, before = model.encode(x), model.encode_before(x)
    for values in (f, before):
        assert (values > 0).sum().item() == pytest.approx(K * len(x), abs=1)
    explained = analysis.explained_variance(model, [store.read(run.split.held_out)])
    assert explained.instruct is not None and explained.instruct > 0.5
    assert explained.fine_tuned is not None and explained.fine_tuned > 0.5
    # Both models have one scale: nothing changes where nothing was trained.
    assert model.activation_scales[0] == model.activation_scales[1]


@pytest.mark.parametrize("method", ["batchtopk", "dedicated", "difference-sae", "stagewise-sae"])
def test_the_report_of_a_run_has_in_one_pass_what_each_measure_gives_by_itself(store, tmp_path: Path, method: Method):
    run = trainer(store, tmp_path, method)
    model = run.fit()
    report = crosscoder_report(model, store, run.split, [])
    for found, tokens in ((report.held_out, run.split.held_out), (report.training, run.split.train)):
        assert found == analysis.explained_variance(model, (raw for _, raw in store.batches(tokens)))
    assert (report.latent_scaling is not None) == model.config.compares_models


def test_what_its_latents_add_to_the_difference_is_that_of_both_reconstructions(store, tmp_path: Path):
    model = trainer(store, tmp_path, "stagewise-sae").fit()
    raw = store.read(torch.arange(200)).float()
    with torch.no_grad():
        whole = model.difference(model.unscale(model(model.scale(raw)) - model.b_dec))
        alone = Latents(model, [3])(Reading(raw))
        x = model.scale(raw)
        f, before = model.encode(x)[:, 3:4], model.encode_before(x)[:, 3:4]
        expected = (f * model.W_dec[3, 1] - before * model.W_dec[3, 0]) / model.activation_scales[0]
    torch.testing.assert_close(Latents(model, range(F))(Reading(raw)), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_change_is_0_where_a_latent_stayed_and_2_where_it_turned_about():
    model = new_dictionary(SHAPES["stagewise-sae"])
    assert isinstance(model, StagewiseSAE)
    model.W_dec.data[0, 1] *= -1
    model.W_enc.data[1, :, 0] *= -3
    model.W_enc.data[1, :, 1] = 0
    model.W_enc.data[1, :, 2] *= 5
    assert model.change()[:4].tolist() == pytest.approx([2, 0.5, 0, 0], abs=1e-6)


# Untrained, and with a frozen decoder


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_dictionary_is_what_training_starts_from_with_the_thresholds_of_the_data(store, tmp_path, method):
    start = trainer(store, tmp_path / "start", method)
    run = trainer(store, tmp_path / "run", method, untrained=True)
    assert run.total_steps == 0
    start.begin()
    run.fit()
    model = load_dictionary(tmp_path / "run")
    for name, value in parameters(start.model).items():
        if method == "stagewise-sae" and name == "b_dec":
            value[1] = value[0]
        assert torch.equal(parameters(model)[name], value), name
    assert model.activation_scales == start.model.activation_scales
    with torch.no_grad():
        active = model.encode(model.scale(store.read(run.split.train))) > 0
    for group, k in model.groups():
        assert active[:, group].sum().item() == pytest.approx(k * len(active), abs=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_decoder_stays_and_the_rest_is_trained(store, tmp_path: Path, method: Method):
    start = trainer(store, tmp_path / "start", method).model.W_dec.detach().clone()
    run = trainer(store, tmp_path / "run", method, freeze_decoder=True, dead_after_tokens=100)
    encoder, losses = run.model.W_enc.detach().clone(), []
    run.log_every, run.on_log = 1, lambda record: losses.append(record.reconstruction)
    run.begin()
    take_steps(run, 41)
    run.save_state()
    again = trainer(store, tmp_path / "run", method, freeze_decoder=True, dead_after_tokens=100)
    again.fit()
    model = load_dictionary(tmp_path / "run")
    assert torch.equal(model.W_dec, start)
    assert not torch.equal(model.W_enc, encoder)
    assert min(losses) < 0.95 * losses[0]


def test_untrained_and_frozen_at_once_is_refused():
    with pytest.raises(UserError, match="exclude each other"):
        TrainingConfig(untrained=True, freeze_decoder=True)


def test_a_frozen_decoder_has_no_step_by_hand(store, tmp_path: Path):
    run = trainer(store, tmp_path, "batchtopk", freeze_decoder=True)
    run._step_kind = "by-hand"
    with pytest.raises(UserError, match="there is no step by hand for a frozen decoder: --step autograd, or auto"):
        run.begin()


def test_dictionaries_of_an_earlier_version_have_no_further_thresholds(store, tmp_path: Path):
    import json

    trainer(store, tmp_path, "batchtopk").fit()
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["further_thresholds"], values["largest_norms"], values["crosscoder"]["reserved_share"]
    del values["training"]["untrained"], values["training"]["freeze_decoder"]
    path.write_text(json.dumps(values))
    model = load_dictionary(tmp_path)
    assert model.further_thresholds == model.largest_norms == ()
    assert model.config == replace(SHAPES["batchtopk"], d_model=D)


@pytest.mark.parametrize("method", SHAPES)
def test_an_attention_sink_gets_nothing_of_a_dictionary_that_was_trained_on_none(method: str, tmp_path: Path):
    """Of two documents' first tokens, 1,000 times as long as others; and of a dictionary that was trained on them all,
    which differs in nothing else that is read here."""
    activations = planted_activations(2000, D, 16)
    activations[:2] *= 1000
    write_store(tmp_path / "set", activations, drop_outliers=True)
    trainer(ActivationStore(tmp_path / "set"), tmp_path / "made", method).fit()
    model, everything = load_dictionary(tmp_path / "made"), load_dictionary(tmp_path / "made")
    everything.largest_norms = ()
    every = range(model.config.n_latents)
    added, all_of_it = (Latents(one, every)(Reading(activations[:50])) for one in (model, everything))
    assert not added[:2].any() and all_of_it[:2].norm(dim=-1).max() > added.norm(dim=-1).max()
    assert torch.equal(added[2:], all_of_it[2:]) and added[2:].any()
    assert dictionary_digest(model) != dictionary_digest(everything)
