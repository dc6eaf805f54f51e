"""Training: it explains held-out data, follows its settings, and goes on exactly where it was stopped."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_activations import planted_activations, take_steps, write_store

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import measures as analysis
from crosscoder.dictionaries.checkpoint import STATE_FILE, load_dictionary, read_config
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.losses import objective
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import Ranks
from crosscoder.dictionaries.threshold import RunningThreshold, calibrated_threshold
from crosscoder.training import plan
from crosscoder.training.dead_latents import DeadLatents, resample_latents
from crosscoder.training.run_log import StepRecord
from crosscoder.training.step_choice import not_by_hand
from crosscoder.training.trainer import Trainer
from finqa.runtime.errors import UserError
from finqa.runtime.memory.needs import Need
from finqa.runtime.paths import REPOSITORY

SHAPE = CrosscoderConfig(d_model=12, n_latents=24, k=4)
SETTINGS = TrainingConfig(batch_size=100, epochs=4, learning_rate=5e-3, seed=3, threshold_from_step=5)


def trainer(store: ActivationStore, folder: Path, settings: TrainingConfig = SETTINGS, **options) -> Trainer:
    generator = torch.Generator().manual_seed(settings.seed)
    return Trainer(BatchTopKCrosscoder(SHAPE, generator=generator), store, settings, folder, **options)


def parameters(model: BatchTopKCrosscoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_explains_most_of_held_out_documents(store, tmp_path: Path):
    run = trainer(store, tmp_path / "run", replace(SETTINGS, epochs=30))
    model = run.fit()
    held_out = analysis.explained_variance(model, [store.read(run.split.held_out)])
    assert min(held_out.instruct, held_out.fine_tuned) > 0.9


def test_the_mean_number_of_active_latents_is_k_at_inference(store, tmp_path: Path):
    run = trainer(store, tmp_path / "run")
    model = run.fit()
    with torch.no_grad():
        active = model.encode(model.scale(store.read(run.split.train))) > 0
    assert active.sum().item() == pytest.approx(SHAPE.k * len(run.split.train), abs=1)


def test_calibration_finds_the_score_above_which_exactly_k_a_token_lie(store):
    model = BatchTopKCrosscoder(SHAPE, generator=torch.Generator().manual_seed(0))
    model.activation_scales = store.config.activation_scales
    indices = torch.arange(1000)
    threshold = calibrated_threshold(model, store, indices, slice(None), SHAPE.k)
    with torch.no_grad():
        scores = model.activations(model.scale(store.read(indices))) * model.selection_norms()
    assert (scores > threshold).sum().item() == SHAPE.k * 1000
    assert (scores >= threshold).sum().item() == SHAPE.k * 1000 + 1


def test_without_enough_positive_scores_every_positive_one_is_active(store):
    model = BatchTopKCrosscoder(SHAPE, generator=torch.Generator().manual_seed(0))
    model.b_enc.data[2:] = -1e6
    assert calibrated_threshold(model, store, torch.arange(1000), slice(None), SHAPE.k) == 0


def test_the_running_threshold_takes_its_first_value_and_then_decays():
    running = RunningThreshold(from_step=2, decay=0.9)
    for step, score in enumerate([100.0, 4.0, torch.inf, 14.0], start=1):
        running.update(step, torch.tensor(score))
    assert running.value == pytest.approx(0.9 * 4 + 0.1 * 14)


def test_a_stopped_run_goes_on_and_ends_with_the_same_numbers(store, tmp_path: Path):
    whole: list[StepRecord] = []
    expected = parameters(trainer(store, tmp_path / "whole", on_log=whole.append, log_every=1).fit())

    halves: list[StepRecord] = []
    first = trainer(store, tmp_path / "stopped", on_log=halves.append, log_every=1)
    first.begin()
    take_steps(first, 31)
    first.save_state()
    take_steps(first, 1)  # lost when the run is killed
    del halves[31:]
    second = trainer(store, tmp_path / "stopped", on_log=halves.append, log_every=1)
    assert same(parameters(second.fit()), expected)
    assert halves == whole
    assert second.model.threshold == read_config(tmp_path / "whole").threshold


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(store, tmp_path: Path):
    runs = [
        parameters(trainer(store, tmp_path / str(i), replace(SETTINGS, seed=seed)).fit())
        for i, seed in enumerate([3, 3, 4])
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_run_with_other_settings_is_not_gone_on_with(store, tmp_path: Path):
    first = trainer(store, tmp_path)
    first.begin()
    take_steps(first, 1)
    first.save_state()
    with pytest.raises(UserError, match="holds a run with other settings or data"):
        trainer(store, tmp_path, replace(SETTINGS, learning_rate=1e-3)).fit()


def test_a_finished_run_leaves_a_checkpoint_with_scales_threshold_and_settings(store, tmp_path: Path):
    model = trainer(store, tmp_path).fit()
    config = read_config(tmp_path)
    scales = store.config.activation_scales
    assert config[:6] == (SHAPE, scales, model.threshold, None, SETTINGS, store.config.recorded)
    assert not (tmp_path / STATE_FILE).exists()
    loaded = load_dictionary(tmp_path)
    x = model.scale(store.read(torch.arange(5)))
    assert torch.equal(loaded(x), model(x))


def test_the_learning_rate_falls_over_the_last_fifth_and_never_reaches_zero(store, tmp_path: Path):
    run = trainer(store, tmp_path)
    rates = [run.learning_rate(step) for step in range(run.total_steps)]
    flat = int(0.8 * run.total_steps)
    assert set(rates[: flat + 1]) == {SETTINGS.learning_rate}
    steps = [a - b for a, b in zip(rates[flat + 1 :], rates[flat + 2 :], strict=False)]
    assert min(steps) > 0
    assert max(steps) == pytest.approx(min(steps))
    assert rates[-1] == pytest.approx(SETTINGS.learning_rate / (0.2 * run.total_steps))


def test_parameters_stay_fp32(store, tmp_path: Path):
    model = trainer(store, tmp_path, replace(SETTINGS, precision="bf16", epochs=1)).fit()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_only_dead_latents_get_the_auxiliary_gradient(store, tmp_path: Path):
    run = trainer(store, tmp_path)
    run.dead_latents.since_selected[[2, 5]] = run.dead_latents.window
    x = run.model.scale(store.read(torch.arange(100)))
    values = run.model.activations(x)
    losses_of = objective(run.model, x, run.config, run.weights(0), run.dead_latents.dead)
    assert torch.equal(losses_of.values, values)
    losses_of.auxiliary.backward()
    assert run.model.W_dec.grad is not None
    moved = run.model.W_dec.grad.flatten(1).any(dim=-1)
    assert moved.nonzero().flatten().tolist() == [2, 5]
    assert run.model.b_dec.grad is None


def test_never_selected_and_never_positive_are_counted_apart():
    dead_latents = DeadLatents(3, window=20, device=torch.device("cpu"))
    positive, selected = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    for _ in range(2):
        dead_latents.update(positive, selected, n_tokens=10)
    assert dead_latents.dead.tolist() == [False, True, True]
    assert dead_latents.never_positive.tolist() == [False, False, True]


def test_a_latent_that_is_never_positive_is_drawn_anew_and_becomes_positive(store, tmp_path: Path):
    run = trainer(store, tmp_path)
    run.begin()
    take_steps(run, 3)
    run.model.b_enc.data[7] = -1e6
    x = run.model.scale(store.read(torch.arange(500)))
    before = parameters(run.model)
    lost = torch.zeros(24, dtype=torch.bool)
    lost[7] = True
    assert resample_latents(run.model, run.optimizer, lost, x.mean(dim=0), SETTINGS, run.generator) == 1
    share = (run.model.activations(x)[:, 7] > 0).float().mean().item()
    assert 0.2 < share < 0.8
    others = ~lost
    assert torch.equal(run.model.W_dec[others], before["W_dec"][others])
    assert torch.equal(run.model.W_enc[:, :, others], before["W_enc"][:, :, others])
    assert not run.optimizer.state[run.model.W_dec]["exp_avg"][7].any()


def test_training_revives_a_latent_that_began_out_of_reach(store, tmp_path: Path):
    run = trainer(store, tmp_path, replace(SETTINGS, dead_after_tokens=500))
    run.model.b_enc.data[:6] = -1e6
    model = run.fit()
    with torch.no_grad():
        positive = (model.activations(model.scale(store.read(run.split.train))) > 0).any(dim=0)
    assert run.drawn_anew >= 6
    assert positive.all()


def test_a_loss_that_is_no_number_stops_the_run_at_its_step(store, tmp_path: Path):
    run = trainer(store, tmp_path)
    run.model.b_dec.data[0, 0] = torch.nan
    run.config = replace(SETTINGS, decoder_bias="zero")
    with pytest.raises(UserError, match="no number at step 1; no state was saved before it"):
        run.fit()


def test_a_run_that_diverges_stops_at_its_step_and_never_saves_over_the_last_good_state(store, tmp_path: Path):
    run = trainer(store, tmp_path, log_every=1000)
    run.begin()
    take_steps(run, 5)
    run.save_state()
    good = (tmp_path / STATE_FILE).read_bytes()
    run.model.W_dec.data *= 1000
    take_steps(run, 3)
    with pytest.raises(UserError, match=r"at step 6; the last good state is .*training_state"):
        run.save_state()
    assert (tmp_path / STATE_FILE).read_bytes() == good


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(store, tmp_path: Path):
    with pytest.raises(UserError, match="does not divide among 3 processes"):
        trainer(store, tmp_path, replace(SETTINGS, batch_size=100), ranks=Ranks(0, 3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_thread_that_reads_ahead_ends_with_the_run_whatever_ends_it(store, tmp_path: Path, error):
    def stop(record: StepRecord) -> None:
        assert feeds(), "the batches are read ahead"
        raise error

    def feeds() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("activation feed")]

    with pytest.raises(error):
        trainer(store, tmp_path / "stopped", on_log=stop).fit()
    assert not feeds()
    diverging = trainer(store, tmp_path / "diverging", replace(SETTINGS, learning_rate=50.0), log_every=1)
    with pytest.raises(UserError, match="diverged"):
        diverging.fit()
    assert not feeds()
    trainer(store, tmp_path / "whole", replace(SETTINGS, epochs=1)).fit()
    assert not feeds()


@pytest.mark.parametrize(
    ("device", "memory", "on_gpu", "place"),
    [
        ("cpu", 300_000, 0, "memory"),
        ("cpu", 190_000, 0, "disk"),
        ("cuda", 0, 300_000, "gpu"),
        ("cuda", 150_000, 190_000, "memory"),
        ("cuda", 50_000, 190_000, "disk"),
    ],
)
def test_activations_are_held_where_they_fit_beside_the_run(store, monkeypatch, capsys, device, memory, on_gpu, place):
    monkeypatch.setattr(plan, "free_memory", lambda device: memory if device == "cpu" else on_gpu)
    assert store.size_bytes == 96_000
    need = Need((("all of it", 150_000.0, "made up"),))
    assert plan.plan_training(store, need, device) == place
    said = capsys.readouterr().out
    assert "plan: training needs 0 MB" in said and f"{plan.PLACES[place]} (--store)" in said
    for asked in {"cpu": ("memory",), "cuda": ("gpu", "memory")}[device]:
        fits = asked == place or ((asked, place) == ("memory", "gpu") and memory > 100_000)
        if not fits:
            with pytest.raises(UserError, match="give --store auto, or disk"):
                plan.plan_training(store, need, device, asked)
    assert plan.plan_training(store, need, device, "disk") == "disk"


def test_a_run_that_does_not_fit_names_the_flags_that_help(store, monkeypatch):
    need = plan.training_need(CrosscoderConfig(4096, 16_384, 100), TrainingConfig(), by_hand=True, product_bytes=2)
    weights = next(size for name, size, _ in need.parts if name == "weights")
    assert weights == 4 * (2 * 2 * 4096 * 16_384 + 16_384 + 2 * 4096)
    monkeypatch.setattr(plan, "free_memory", lambda device: 1e9)
    with pytest.raises(UserError, match=r"training needs .* GB .*--latents or --step-tokens, or --device cpu"):
        plan.plan_training(store, need, "cuda")


@pytest.mark.parametrize(
    ("way", "by_hand", "product_bytes"),
    [
        ("by hand", True, 2),
        ("by hand, from memory", True, 2),
        ("+ auxiliary", True, 2),
        ("autograd, bf16", False, 2),
        ("autograd, fp32", False, 4),
    ],
)
def test_the_plan_is_what_was_measured_on_a_gpu_and_at_most_a_quarter_more(way, by_hand, product_bytes):
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "crosscoder_step.json").read_text())
    settings = record["settings"]
    activations = 0 if "memory" in way else 2 * 2 * settings["d_model"] * settings["tokens"]  # they were on the GPU too
    for n_latents, ways in record["steps"].items():
        if way not in ways:
            continue
        shape = CrosscoderConfig(settings["d_model"], int(n_latents), settings["k"])
        config = TrainingConfig(batch_size=settings["batch"])
        planned = plan.training_need(shape, config, by_hand, product_bytes).total + activations
        assert 1.0 <= planned / (1e9 * ways[way]["peak_gb"]) <= 1.25, n_latents


def test_the_plan_of_a_whole_run_is_what_was_measured_on_a_gpu_and_at_most_a_quarter_more():
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "diff.json").read_text())
    shape, config = CrosscoderConfig(**record["crosscoder"]), TrainingConfig(**record["training"])
    taken = 1e9 * (record["peak_gb"]["train"] - record["peak_gb"]["open the set"])
    assert 1.0 <= plan.training_need(shape, config, by_hand=True, product_bytes=2).total / taken <= 1.25


def test_a_step_by_hand_is_for_what_it_was_written_for():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, shape, settings, reason in [
        (cpu, SHAPE, SETTINGS, "the device cpu"),
        (gpu, replace(SHAPE, method="l1"), replace(SETTINGS, l1_weight=1.0), "method l1"),
        (gpu, replace(SHAPE, method="dedicated", reserved_share=0.25), SETTINGS, "method dedicated"),
        (gpu, replace(SHAPE, method="stagewise-sae"), SETTINGS, "method stagewise-sae"),
        (gpu, SHAPE, replace(SETTINGS, freeze_decoder=True), "a frozen decoder"),
        (gpu, SHAPE, replace(SETTINGS, difference_weight="equal"), "a difference term"),
        (gpu, SHAPE, replace(SETTINGS, l1_weight=1.0), "an L1 penalty"),
    ]:
        assert not_by_hand(shape, settings, device) == reason
    assert not_by_hand(SHAPE, SETTINGS, gpu) in (None, "no Triton is installed")


def test_a_store_smaller_than_a_batch_still_trains(tmp_path: Path):
    write_store(tmp_path / "small", planted_activations(100, 12, 16))
    run = trainer(ActivationStore(tmp_path / "small"), tmp_path / "run", replace(SETTINGS, batch_size=400, epochs=1))
    run.fit()
    assert run.steps_done == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0}, "--learning-rate must be above 0"),
        ({"held_out_fraction": 1.0}, "--held-out must be at least 0 and below 1"),
        ({"reconstruction": "l1"}, "reconstruction is one of mse, l2"),
        ({"batch_size": 0}, "--step-tokens must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**change)
