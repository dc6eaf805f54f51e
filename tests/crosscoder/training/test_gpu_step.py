"""The hand-written step of a GPU is the step that autograd takes, alone and in a whole run.

pytest -m gpu tests/crosscoder/training/test_gpu_step.py
TRITON_INTERPRET=1 pytest tests/crosscoder/training/test_gpu_step.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from made_up_activations import take_steps

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.losses import Weights
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ALONE
from crosscoder.training import step_choice
from crosscoder.training.run_log import StepRecord
from crosscoder.training.step import AutogradStep, StepKind
from crosscoder.training.trainer import Trainer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SETTINGS = TrainingConfig(
    batch_size=20, epochs=0.25, learning_rate=5e-3, seed=3, precision="fp32", threshold_from_step=5,
    dead_after_tokens=60, aux_weight=0.3, anneal_k_from=8, anneal_fraction=0.5, centre=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    if INTERPRETED:  # the kernels run on the CPU as well
        monkeypatch.setattr(step_choice, "not_by_hand", lambda *settings: None)
    return pytest.importorskip("triton")


NO_ROOM = {"CAPACITY": 1}
"""The bound of the step before never does: every step searches its own."""
NO_SEARCH = {**NO_ROOM, "SEARCH_STEPS": 1}
"""Every step selects over all pairs."""


@pytest.mark.parametrize(
    ("reconstruction", "score_norm", "constants", "d_model"),
    [
        ("mse", "sum", {}, 12), ("mse", "l2", NO_ROOM, 12), ("mse", "none", NO_SEARCH, 12), ("mse", "sum", {}, 160),
        ("l2", "sum", {}, 12), ("l2", "l2", NO_SEARCH, 12), ("l2", "none", NO_ROOM, 12),
    ],
)  # fmt: skip
def test_weights_follow_those_of_autograd_with_and_without_dead_latents(
    reconstruction, score_norm, constants, d_model, monkeypatch
):
    """A row of 2 x 160 numbers is the work of several programs, the last of which has less of it."""
    from crosscoder.training.gpu import selection
    from crosscoder.training.gpu.step import GpuStep

    for name, value in constants.items():
        monkeypatch.setattr(selection, name, value)
    settings = TrainingConfig(reconstruction=reconstruction, aux_weight=0.3, aux_k=2, precision="fp32")

    def fresh():
        config = CrosscoderConfig(d_model, n_latents=48, k=4, score_norm=score_norm)
        model = BatchTopKCrosscoder(config, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        model.activation_scales = (0.9, 1.1)
        return model, torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.99))

    (expected, expected_adam), (model, adam) = fresh(), fresh()
    by_autograd = AutogradStep(expected, expected_adam, settings)
    by_hand = GpuStep(model, adam, settings, product_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        raw = torch.randn(40, 2, d_model, generator=generator).to(DEVICE)
        dead = torch.zeros(48, dtype=torch.bool, device=DEVICE)
        dead[[3, 7, 11, 20]] = number > 2
        weights = Weights(k=4 if number else 6, l1=0.0, difference=0.0)

        wanted, done = (step(raw, 1e-2, weights, dead) for step in (by_autograd, by_hand))
        assert (wanted.parts[4] > 0) == (number > 2)
        for name, value in wanted._asdict().items():
            found = getattr(done, name)
            torch.testing.assert_close(found, value.detach(), msg=lambda m, where=name: f"{where}: {m}", **CLOSE)
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, where=(number, name): f"{where}: {m}", **CLOSE)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(adam.state[model.W_enc][name], expected_adam.state[expected.W_enc][name], **CLOSE)


@pytest.mark.skipif(INTERPRETED, reason="it is a GPU that is waited for")
@pytest.mark.parametrize("aux_k", [2, 8])
def test_nothing_in_a_step_waits_for_the_gpu_but_what_was_asked_for_before(aux_k: int):
    from crosscoder.training.gpu.step import GpuStep

    model = BatchTopKCrosscoder(CrosscoderConfig(d_model=12, n_latents=48, k=4)).to(DEVICE)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    step = GpuStep(model, adam, TrainingConfig(aux_weight=0.3, aux_k=aux_k))
    raw, dead = torch.randn(40, 2, 12, device=DEVICE), torch.arange(48, device=DEVICE) < 5
    try:
        for number in range(6):
            if number == 3:  # the first one searches its bound
                torch.cuda.set_sync_debug_mode("error")
            step(raw, 0.0, Weights(k=4, l1=0.0, difference=0.0), dead)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scores_that_are_all_equal_or_all_nothing_are_selected_from():
    from crosscoder.training.gpu.step import GpuStep

    for bias, active in ((1.0, 40 * 4), (-1.0, 0)):
        model = BatchTopKCrosscoder(CrosscoderConfig(d_model=12, n_latents=48, k=4, score_norm="none")).to(DEVICE)
        model.b_enc.data[:] = bias
        step = GpuStep(model, torch.optim.Adam(model.parameters()), SETTINGS, product_dtype=torch.float32)
        dead = torch.zeros(48, dtype=torch.bool, device=DEVICE)
        done = step(torch.zeros(40, 2, 12, device=DEVICE), 1e-3, Weights(k=4, l1=0.0, difference=0.0), dead)
        assert int(done.n_active) == active
        assert float(done.smallest_score) == (1.0 if active else float("inf"))
        assert bool(done.positive.all()) == bool(active)
        assert torch.isfinite(done.gradient_norm)


def test_what_fills_the_room_of_a_selection_up_is_behind_all_pairs_in_either_order():
    """So that no token and no latent has it among its pairs."""
    from crosscoder.training.gpu.selection import Selector, outside

    for tokens, latents in ((1, 1), (3, 5), (40, 48)):
        index = outside(torch.empty(tokens, latents))
        assert index >= tokens * latents == (index % latents) * tokens + index // latents
    product = torch.zeros(40, 48, device=DEVICE)
    product[7, 9] = 1.0
    selector, norms = Selector(torch.zeros(48, device=DEVICE), ALONE), torch.ones(48, device=DEVICE)
    for selected in (selector.select(product, norms, k=2), selector.search(product, norms, k=2)):
        assert selected.index.tolist() == [7 * 48 + 9] + 79 * [outside(product)]
        assert selected.values.tolist() == [1.0] + 79 * [0.0]


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
def test_a_residual_that_is_the_same_for_every_token_has_no_auxiliary_loss(product_dtype: torch.dtype):
    from crosscoder.training.gpu.step import GpuStep

    generator = torch.Generator().manual_seed(0)
    model = BatchTopKCrosscoder(CrosscoderConfig(d_model=12, n_latents=48, k=4), generator=generator).to(DEVICE)
    step = GpuStep(model, torch.optim.Adam(model.parameters()), SETTINGS, product_dtype)
    raw = torch.randn(1, 2, 12, generator=generator).expand(40, 2, 12).to(DEVICE)
    done = step(raw, 1e-3, Weights(k=4, l1=0.0, difference=0.0), torch.ones(48, dtype=torch.bool, device=DEVICE))
    assert float(done.parts[1]) > 0
    assert float(done.parts[4]) == 0.0
    assert torch.isfinite(done.gradient_norm)


def trainer(store: ActivationStore, folder: Path, step: StepKind, log: list[StepRecord]) -> Trainer:
    """Of a dictionary of which six latents are out of reach at the start."""
    shape = CrosscoderConfig(d_model=12, n_latents=20, k=4)
    model = BatchTopKCrosscoder(shape, generator=torch.Generator().manual_seed(3))
    model.b_enc.data[:6] = -1e6
    return Trainer(model, store, SETTINGS, folder, log.append, log_every=1, device=DEVICE, step=step)


def assert_same_run(found: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [record.step for record in found] == [record.step for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        counts = ("tokens", "dead_share", "never_positive_share", "drawn_anew", "learning_rate", "l0")
        assert [getattr(ours, name) for name in counts] == [getattr(theirs, name) for name in counts]
        for name in ("loss", "reconstruction", "auxiliary", "gradient_norm", "threshold", "explained_variance"):
            ours_is, theirs_is = getattr(ours, name), getattr(theirs, name)
            same = ours_is is None if theirs_is is None else ours_is == pytest.approx(theirs_is, rel=1e-3, abs=1e-5)
            assert same, (ours.step, name, ours_is, theirs_is)


def test_a_whole_run_stopped_and_gone_on_with_has_the_losses_of_autograd(store, tmp_path: Path):
    expected: list[StepRecord] = []
    found: list[StepRecord] = []
    wanted = trainer(store, tmp_path / "autograd", "autograd", expected).fit()
    first = trainer(store, tmp_path / "by-hand", "by-hand", found)
    first.begin()
    take_steps(first, 13)
    first.save_state()
    model = trainer(store, tmp_path / "by-hand", "by-hand", found).fit()

    assert len(expected) >= 20
    assert any(record.auxiliary > 0 for record in expected)
    assert expected[-1].drawn_anew >= 6
    assert_same_run(found, expected)
    assert model.threshold == pytest.approx(wanted.threshold, rel=1e-3)
    read_back = load_dictionary(tmp_path / "by-hand")
    for ours, theirs in zip(read_back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.cpu())
