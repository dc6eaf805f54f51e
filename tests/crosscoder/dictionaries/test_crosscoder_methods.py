"""The methods beside BatchTopK, and the settings of the loss, each by its definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_activations import planted_activations, take_steps, write_store

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries import losses
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, Method, TrainingConfig, check_together
from crosscoder.dictionaries.losses import Weights, objective
from crosscoder.dictionaries.methods import DifferenceSAE, L1Crosscoder, PartitionCrosscoder, new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.scaling import equal_difference_weight, fit_scaling
from crosscoder.training import schedule
from crosscoder.training.sizing import PUBLISHED, sized_configs
from crosscoder.training.trainer import Trainer
from finqa.runtime.errors import UserError

D, F, B, K = 12, 24, 60, 3
SHAPES: dict[Method, CrosscoderConfig] = {
    "batchtopk": CrosscoderConfig(D, F, K),
    "l1": CrosscoderConfig(D, F, K, method="l1"),
    "partition": CrosscoderConfig(D, F, K, method="partition", n_delta=8, k_delta=2),
    "dedicated": CrosscoderConfig(D, F, K, method="dedicated", reserved_share=0.25),
    "difference-sae": CrosscoderConfig(D, F, K, method="difference-sae"),
    "stagewise-sae": CrosscoderConfig(D, F, K, method="stagewise-sae"),
}
METHODS = tuple(SHAPES)
SETTINGS = TrainingConfig(batch_size=100, epochs=4, learning_rate=5e-3, seed=3, threshold_from_step=5)


def settings_of(method: Method, **changes) -> TrainingConfig:
    own = {"l1": {"l1_weight": 0.5}, "partition": {"difference_weight": "equal"}}.get(method, {})
    return replace(SETTINGS, **{**own, **changes})


def trainer(store: ActivationStore, folder: Path, method: Method, **changes) -> Trainer:
    settings = settings_of(method, **changes)
    generator = torch.Generator().manual_seed(settings.seed)
    model = new_dictionary(SHAPES[method], settings.decoder_norm, generator, settings.directions)
    return Trainer(model, store, settings, folder)


def random_model(method: Method) -> BatchTopKCrosscoder:
    """In float64, with nothing special about any of its numbers."""
    model = new_dictionary(SHAPES[method]).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def raw_activations() -> torch.Tensor:
    return torch.randn(B, 2, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("method", "kind"), [("l1", L1Crosscoder), ("difference-sae", DifferenceSAE)])
def test_a_checkpoint_comes_back_as_its_method(store, tmp_path: Path, method: Method, kind):
    model = trainer(store, tmp_path, method).fit()
    loaded = load_dictionary(tmp_path)
    assert type(loaded) is kind
    x = model.scale(store.read(torch.arange(50)))
    assert torch.equal(loaded(x), model(x))


def test_thresholds_means_and_scales_of_a_partition_come_back(store, tmp_path: Path):
    model = trainer(store, tmp_path, "partition", centre=True).fit()
    loaded = load_dictionary(tmp_path)
    assert type(loaded) is PartitionCrosscoder
    assert loaded.delta_threshold == model.delta_threshold is not None
    raw = store.read(torch.arange(50))
    assert torch.equal(loaded.scale(raw), model.scale(raw))
    assert torch.equal(loaded(loaded.scale(raw)), model(model.scale(raw)))


# L1


def test_l1_keeps_every_positive_value_in_training_and_at_inference(store, tmp_path: Path):
    model = trainer(store, tmp_path, "l1").fit()
    values = torch.tensor([[0.0, 1e-6, 3.0] + [0.0] * 21])
    assert torch.equal(model.select_batch_topk(values).values, values)
    assert torch.equal(model.select_by_threshold(values), values)
    assert model.threshold == 0


def test_the_price_is_each_value_times_both_decoder_norms():
    model, x = random_model("l1"), raw_activations()
    config = settings_of("l1", aux_weight=0.0)
    terms = objective(model, x, config, Weights(k=K, l1=0.5, difference=0.0))
    total = 0.0
    for i in range(B):
        for j in range(F):
            value = float(torch.relu((x[i] * model.W_enc[:, :, j]).sum() + model.b_enc[j]).detach())
            total += value * sum(math.sqrt(float(model.W_dec[j, m].detach().pow(2).sum())) for m in range(2)) / B
    assert terms.l1.item() == pytest.approx(total, rel=1e-12)
    assert terms.loss.item() == pytest.approx(terms.reconstruction.item() + 0.5 * total, rel=1e-12)
    (gradient,) = torch.autograd.grad(terms.l1, model.W_dec)
    with torch.no_grad():
        summed = torch.relu(model.activations(x)).sum(dim=0)[:, None, None] / B
        expected = summed * model.W_dec / model.W_dec.norm(dim=-1, keepdim=True)
    assert torch.allclose(gradient, expected)


def test_without_a_price_l1_is_refused():
    with pytest.raises(UserError, match="needs an --l1-weight above 0"):
        check_together(SHAPES["l1"], SETTINGS)


# Difference term


def test_the_difference_term_weighs_the_models_difference_of_errors():
    x, xhat = torch.randn(2, B, 2, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = x - xhat
    expected = sum(float((error[i, 1] - error[i, 0]).pow(2).sum()) for i in range(B)) / B
    assert losses.difference_loss(x, xhat).item() == pytest.approx(expected, rel=1e-12)
    # With u and v the sum and difference over sqrt(2), the loss is |u|^2 + (1 + 2 lambda) |v|^2.
    u, v = (error[:, 1] + error[:, 0]) / 2**0.5, (error[:, 1] - error[:, 0]) / 2**0.5
    by_parts = (u.pow(2).sum() + (1 + 2 * 0.7) * v.pow(2).sum()) / B
    loss = losses.reconstruction_loss(x, xhat, "mse") + 0.7 * losses.difference_loss(x, xhat)
    assert loss.item() == pytest.approx(by_parts.item(), rel=1e-12)


def test_the_equal_weight_makes_sum_and_difference_count_alike(store):
    model = new_dictionary(SHAPES["batchtopk"])
    sample = torch.arange(0, len(store), 2)
    fit_scaling(model, store, sample, centre=False)
    weight = equal_difference_weight(model, store, sample)
    x = model.scale(store.read(sample)).double()
    u, v = (x[:, 1] + x[:, 0]) / 2**0.5, (x[:, 1] - x[:, 0]) / 2**0.5
    of_u, of_v = ((t - t.mean(dim=0)).pow(2).sum().item() for t in (u, v))
    assert weight > 0
    assert (1 + 2 * weight) * of_v == pytest.approx(of_u, rel=1e-9)


def test_two_equal_models_have_no_difference_to_learn(tmp_path: Path):
    same = planted_activations(1000, D, 16)
    same[:, 1] = same[:, 0]
    write_store(tmp_path / "same", same)
    store = ActivationStore(tmp_path / "same")
    with pytest.raises(UserError, match="leave nothing to learn"):
        trainer(store, tmp_path / "run", "difference-sae")
    with pytest.raises(UserError, match="no difference to weigh"):
        trainer(store, tmp_path / "run", "partition")


# Partition


def test_a_partition_selects_its_two_kinds_of_latents_apart():
    model, x = random_model("partition"), raw_activations()
    values = model.activations(x)
    norms = model.W_dec.norm(dim=-1).sum(dim=-1)
    selected = model.select_batch_topk(values).values
    for part, k in ((slice(0, 16), 3), (slice(16, 24), 2)):
        scores = (values * norms)[:, part]
        cut = scores.flatten().sort(descending=True).values[k * B - 1]
        assert torch.equal(selected[:, part], torch.where(scores >= cut, values[:, part], 0))


def test_each_kind_of_latent_has_its_own_mean_number_at_inference(store, tmp_path: Path):
    run = trainer(store, tmp_path, "partition")
    model = run.fit()
    with torch.no_grad():
        active = model.encode(model.scale(store.read(run.split.train))) > 0
    n_tokens = len(run.split.train)
    assert active[:, :16].sum().item() == pytest.approx(3 * n_tokens, abs=1)
    assert active[:, 16:].sum().item() == pytest.approx(2 * n_tokens, abs=1)


def test_in_a_partition_the_delta_latents_alone_predict_the_raw_difference(store, tmp_path: Path):
    model = trainer(store, tmp_path, "partition").fit()
    assert torch.equal(model.W_dec[:16, 0], model.W_dec[:16, 1])
    assert model.activation_scales[0] == model.activation_scales[1]
    with torch.no_grad():
        x = model.scale(store.read(torch.arange(200)))
        f = model.encode(x)
        without_shared = torch.cat([torch.zeros_like(f[:, :16]), f[:, 16:]], dim=1)
        whole, of_delta = (model.difference(model.unscale(model.decode(f))) for f in (f, without_shared))
    assert torch.allclose(whole, of_delta, atol=1e-5)


def test_a_shared_vector_moves_as_the_one_parameter_that_it_is():
    model, x = random_model("partition"), raw_activations()
    model.W_dec.data[:16, 1] = model.W_dec.data[:16, 0]
    objective(model, x, SETTINGS, Weights(k=K, l1=0.0, difference=2.0)).loss.backward()
    assert model.W_dec.grad is not None
    separate = model.W_dec.grad.clone()
    model.correct_gradients()
    of_one = separate[:16].sum(dim=1)
    assert torch.allclose(model.W_dec.grad[:16, 0] * 2**0.5, of_one)
    assert torch.equal(model.W_dec.grad[:16, 0], model.W_dec.grad[:16, 1])
    assert torch.allclose(model.W_dec.grad[:16].norm(), of_one.norm())
    assert torch.equal(model.W_dec.grad[16:], separate[16:])


# Difference SAE


def test_a_difference_sae_reads_and_writes_the_difference_alone(store, tmp_path: Path):
    run = trainer(store, tmp_path, "difference-sae")
    model = run.fit()
    raw = store.read(torch.arange(300)).float()
    expected = (raw[:, 1] - raw[:, 0]) * model.activation_scales[0]
    assert torch.allclose(model.scale(raw)[:, 0], expected)
    lengths = store.read(run.split.train).double().diff(dim=1).norm(dim=-1)
    assert model.activation_scales[0] == pytest.approx(float(D**0.5 / lengths.mean()), rel=1e-6)
    assert model.W_dec.shape == (F, 1, D)
    assert torch.allclose(model.W_dec.norm(dim=-1), torch.ones(F, 1), atol=1e-6)
    assert torch.allclose(model.difference_decoder(), model.W_dec[:, 0] / model.activation_scales[0])


def test_its_gradient_has_no_part_along_a_decoder_vector():
    model, x = random_model("difference-sae"), raw_activations()
    model.constrain()
    objective(model, model.scale(x), SETTINGS, Weights(k=K, l1=0.0, difference=0.0)).loss.backward()
    assert model.W_dec.grad is not None
    assert model.W_dec.grad.abs().max() > 0
    model.correct_gradients()
    along = (model.W_dec.grad * model.W_dec).sum(dim=-1)
    assert along.abs().max() < 1e-12


# What every method can do


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_of_every_method_ends_with_the_same_numbers(store, tmp_path: Path, method: Method):
    changes = {} if method == "l1" else {"anneal_k_from": 10, "anneal_fraction": 0.5}
    expected = trainer(store, tmp_path / "whole", method, **changes).fit()
    first = trainer(store, tmp_path / "stopped", method, **changes)
    first.begin()
    take_steps(first, 31)
    first.save_state()
    take_steps(first, 1)
    again = trainer(store, tmp_path / "stopped", method, **changes).fit()
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    assert (again.threshold, again.delta_threshold) == (expected.threshold, expected.delta_threshold)
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.parametrize("method", METHODS)
def test_centred_data_have_mean_zero_and_come_back_unscaled(store, tmp_path: Path, method: Method):
    run = trainer(store, tmp_path, method, centre=True)
    raw = store.read(run.split.train)
    x = run.model.scale(raw)
    assert x.mean(dim=0).abs().max() < 1e-4
    lengths = x.norm(dim=-1).mean(dim=0)
    assert lengths.mean().item() == pytest.approx(D**0.5, rel=1e-3)
    assert torch.allclose(run.model.unscale(x), run.model.inputs(raw), atol=1e-5)


def test_the_default_takes_the_scales_of_the_store(store, tmp_path: Path):
    assert trainer(store, tmp_path, "batchtopk").model.activation_scales == store.config.activation_scales


def test_models_drawn_apart_start_with_a_direction_each_and_the_encoder_its_transpose():
    model = new_dictionary(SHAPES["batchtopk"], 0.08, torch.Generator().manual_seed(0), "apart")
    assert torch.allclose(model.W_dec.norm(dim=-1), torch.full((F, 2), 0.08))
    assert torch.cosine_similarity(model.W_dec[:, 0], model.W_dec[:, 1], dim=-1).abs().mean() < 0.6
    assert torch.equal(model.W_enc, model.W_dec.permute(1, 2, 0))


def test_without_decoder_norms_the_score_is_the_value():
    model = new_dictionary(replace(SHAPES["batchtopk"], score_norm="none"))
    model.W_dec.data[3] *= 100
    assert torch.equal(model.selection_norms(), torch.ones(F))


# Schedules


def test_k_falls_to_its_value_and_stays_there():
    config = TrainingConfig(anneal_k_from=20, anneal_fraction=0.5)
    ks = [schedule.k_at(config, 4, step, 100) for step in range(100)]
    assert ks[0] == 20
    assert ks == sorted(ks, reverse=True)
    assert set(ks[50:]) == {4}
    assert ks[25] == 12
    # A run with fewer steps than there are to anneal over starts where it should end.
    assert schedule.k_at(config, 4, 0, 1) == 4


def test_k_that_is_annealed_is_what_training_selects(store, tmp_path: Path):
    run = trainer(store, tmp_path, "batchtopk", anneal_k_from=10, anneal_fraction=0.5)
    run.log_every = 1
    selected = []
    run.on_log = lambda record: selected.append(record.l0)
    run.fit()
    assert selected[0] == pytest.approx(10, abs=0.5)
    assert set(selected[run.total_steps // 2 :]) == {3.0}


@pytest.mark.parametrize("given", [{"anneal_k_from": 20}, {"anneal_fraction": 0.5}])
def test_half_of_an_annealing_is_refused(given):
    with pytest.raises(UserError, match="need each other"):
        TrainingConfig(**given)


def test_annealing_from_below_k_is_refused():
    with pytest.raises(UserError, match="must be from --k"):
        check_together(SHAPES["batchtopk"], replace(SETTINGS, anneal_k_from=2, anneal_fraction=0.5))


def test_the_learning_rate_rises_stays_and_falls_within_the_run():
    config = TrainingConfig(learning_rate=1.0, warmup_fraction=0.1, decay_fraction=0.3)
    rates = [schedule.learning_rate(config, step, 100) for step in range(100)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:71] == [1.0] * 61
    assert rates[70:] == sorted(rates[70:], reverse=True)
    one = schedule.learning_rate(config, 0, 1)
    assert 0 < one <= 1
    cosine = replace(config, decay="cosine")
    assert schedule.learning_rate(cosine, 85, 100) == pytest.approx(0.5)
    assert schedule.learning_rate(replace(config, decay_fraction=0.0), 99, 100) == 1.0


def test_the_price_of_l1_rises_to_its_weight():
    config = TrainingConfig(l1_weight=2.0, l1_warmup_fraction=0.1)
    weights = [schedule.l1_weight_at(config, step, 100) for step in range(100)]
    assert weights[0] == pytest.approx(0.2)
    assert set(weights[9:]) == {2.0}


# Settings


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("difference-sae", {"difference_weight": 1.0}, "no difference term"),
        ("difference-sae", {"decoder_norm": 0.08}, "unit norm"),
        ("partition", {"directions": "apart"}, "one direction"),
        ("stagewise-sae", {"difference_weight": 1.0}, "no difference term"),
        ("stagewise-sae", {"l1_weight": 1.0}, "no L1 term"),
        ("stagewise-sae", {"directions": "apart"}, "one direction"),
        ("dedicated", {"batch_size": 1}, "less than one active latent"),
    ],
)
def test_settings_that_make_no_sense_for_a_method_are_refused(method: Method, change, message):
    with pytest.raises(UserError, match=message):
        check_together(SHAPES[method], replace(SETTINGS, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_delta": 2}, "belong to partition"),
        ({"method": "partition"}, "--delta-latents must be above 0"),
        ({"method": "partition", "n_delta": 4, "k_delta": 5}, "at most the 4 delta latents"),
        ({"method": "partition", "n_delta": 22, "k_delta": 1}, "more than the 2 shared latents"),
        ({"method": "topk"}, "method is one of batchtopk, l1, partition, dedicated, difference-sae"),
        ({"reserved_share": 0.1}, "--reserved belongs to dedicated"),
        ({"method": "dedicated"}, "--reserved must be above 0 and below 0.5"),
        ({"method": "dedicated", "reserved_share": 0.02}, "leave a latent to each model"),
        ({"method": "dedicated", "reserved_share": 0.49}, "and some shared"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        CrosscoderConfig(**({"d_model": D, "n_latents": F, "k": K} | change))


def test_the_published_settings_are_settings():
    crosscoder, training = sized_configs(4096, 1_260_000, **PUBLISHED)
    assert (crosscoder.n_latents, crosscoder.k, crosscoder.score_norm) == (16_384, 100, "none")
    assert (training.batch_size, training.learning_rate, training.decay_fraction) == (4096, 5e-5, 0.2)
    assert (training.seed, training.epochs, training.decoder_norm) == (49, 1.0, 0.08)
    assert training.total_steps(1_260_000) == 307


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_settings_that_suit_the_data(method: Method):
    crosscoder, training = sized_configs(256, 200_000, method)
    assert crosscoder.method == method
    assert training.total_steps(200_000) > 100
