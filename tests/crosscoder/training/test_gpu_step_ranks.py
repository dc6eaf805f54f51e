"""Two processes by hand take the steps of one process by hand at the same batches, and a whole run of the trainer.

On two GPUs by nccl, or on the CPU by gloo where Triton is installed, in about three minutes:

pytest -m gpu tests/crosscoder/training/test_gpu_step_ranks.py
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 pytest tests/crosscoder/training/test_gpu_step_ranks.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import started
import torch
from made_up_activations import planted_activations, write_store

from finqa.runtime.paths import REPOSITORY

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

FULL = 16 * 2
"""Pairs that are kept at a step: two for each of 16 tokens."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {"n_steps": 5},
    "l2": {"reconstruction": "l2", "n_steps": 5},
    # A process has room for its own share alone, and one of them has more than that.
    "no room": {"constants": {"CAPACITY": 1}, "bias": 10 * [4.0] + 10 * [0.0], "n_steps": 3},
    "no search": {"constants": {"CAPACITY": 1, "SEARCH_STEPS": 1}, "n_steps": 2},
    "one process has no positive score": {"bias": 10 * [-0.5] + 10 * [-1e6], "n_steps": 3},
    "one process has the dead latents": {"dead": [3, 7, 8], "n_steps": 2},
    "fewer dead latents than are kept": {"dead": [12], "n_steps": 2},
    "fewer positive pairs than are kept": {"bias": -3.0, "n_steps": 2},
    "no positive pair": {"bias": -1e6, "n_steps": 2},
    "bf16": {"product_dtype": "bfloat16", "n_steps": 2},
}

WORKER = '''
"""Takes the steps of each case, then a run of the trainer: worker.py CASES STORE FOLDER"""
import json, sys
from pathlib import Path

import torch
from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.losses import Weights
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.dictionaries.ranks import ranks_from_environment
from crosscoder.training import step_choice
from crosscoder.training.gpu import selection
from crosscoder.training.gpu.step import GpuStep
from crosscoder.training.trainer import Trainer
from finqa.runtime import parallel

step_choice.not_by_hand = lambda *settings: None
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = False
cases, store, root = json.loads(sys.argv[1]), ActivationStore(Path(sys.argv[2])), Path(sys.argv[3])
device = parallel.own_device("cuda" if torch.cuda.is_available() else "cpu")
ranks = ranks_from_environment(device)
constants = {name: getattr(selection, name) for name in ("CAPACITY", "SEARCH_STEPS")}
searched, search = [], selection.Selector.search

def noted(self, *of_step):
    found = search(self, *of_step)
    searched.append("all pairs" if found.least == 0 else "bound")
    return found

selection.Selector.search = noted


def model_of(bias, k):
    config = CrosscoderConfig(d_model=12, n_latents=20, k=k)
    model = BatchTopKCrosscoder(config, generator=torch.Generator().manual_seed(3))
    model.b_enc.data[:] = torch.as_tensor(bias)
    return model


def batch(number):
    """Of all rows. At step 2 their scores are far larger."""
    raw = torch.randn(16, 2, 12, generator=torch.Generator().manual_seed(number))
    return raw * (6.0 if number == 2 else 1.0)


def steps_of(n_steps, reconstruction="mse", constants={}, product_dtype="float32", bias=0.0, dead=(3, 7, 11, 19)):
    for name, value in constants.items():
        setattr(selection, name, value)
    model = model_of(bias, k=2).to(device)
    model.activation_scales = (0.9, 1.1)
    adam = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.99))
    settings = TrainingConfig(reconstruction=reconstruction, aux_weight=0.3, aux_k=2, precision="fp32")
    take, taken = GpuStep(model, adam, settings, getattr(torch, product_dtype), ranks), []
    for number in range(n_steps):
        are_dead = torch.zeros(20, dtype=torch.bool, device=device)
        are_dead[list(dead)] = number in (1, 4)
        searched.clear()
        ranks.sent.clear()
        if number == 4:  # as where latents are drawn anew
            model.W_dec.data[3] *= 2
            take.refresh()
        step = take(ranks.rows(batch(number)).to(device), 1e-2, Weights(2, 0.0, 0.0), are_dead)
        sent = dict(ranks.sent)
        take.gather()
        moments = [adam.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]
        taken.append({
            "step": {name: value.cpu() for name, value in step._asdict().items()},
            "weights": [p.detach().cpu().clone() for p in model.parameters()],
            "moments": [moment.cpu().clone() for moment in moments],
            "searched": list(searched),
            "sent": sent,
        })
    return taken


def trainer(log):
    settings = TrainingConfig(
        batch_size=20, epochs=0.25, learning_rate=5e-3, seed=3, precision="fp32", threshold_from_step=5,
        dead_after_tokens=60, aux_weight=0.3, anneal_k_from=8, anneal_fraction=0.5, centre=True,
    )
    model = model_of(torch.tensor(6 * [-1e6] + 14 * [0.0]), k=4)
    return Trainer(model, store, settings, root, log, log_every=1, device=device, ranks=ranks, step="by-hand")


found = {}
for name, case in cases.items():
    found[name] = steps_of(**case)
    for of in constants.items():
        setattr(selection, *of)
records = []
first = trainer(records.append)
first.begin()
with first.batches() as batches:
    for _, (_, raw) in zip(range(13), batches):
        first.step(raw)
first.save_state()
parallel.wait_for_all()
model = trainer(records.append).fit()
found["trainer"] = {"log": [record._asdict() for record in records], "threshold": model.threshold}
found["trainer"]["weights"] = [p.detach().cpu() for p in model.parameters()]
torch.save(found, root / f"found-{ranks.rank}.pt")
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, dict]:
    """What one process found, and each of two."""
    pytest.importorskip("triton")
    if not INTERPRETED and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    folder = tmp_path_factory.mktemp("by-hand")
    (folder / "worker.py").write_text(WORKER)
    write_store(folder / "store", planted_activations(2000, 12, 16))
    for name, launcher in (("one", []), ("two", started.TORCHRUN)):
        (folder / name).mkdir()
        words = [*launcher, folder / "worker.py", json.dumps(CASES), folder / "store", folder / name]
        output = started.run(words, REPOSITORY, os.environ | {"OMP_NUM_THREADS": "1"})
        assert output.returncode == 0, output.stderr
    one, first, second = (torch.load(folder / path) for path in ("one/found-0.pt", "two/found-0.pt", "two/found-1.pt"))
    return one, first, second


def same(found: Any, expected: Any, *where: object) -> None:
    torch.testing.assert_close(found, expected, msg=lambda m: f"{where}: {m}", **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16"])
def test_two_processes_take_the_steps_of_one(found, case: str):
    for number, (alone, first, second) in enumerate(zip(*(of[case] for of in found), strict=True)):
        for name, expected in alone["step"].items():
            mine, other = first["step"][name], second["step"][name]
            if name in ("x", "error"):
                same(torch.cat((mine, other)), expected, number, name)
            else:
                assert torch.equal(mine, other), (number, name)
                same(mine.to(expected.dtype), expected, number, name)
        for name in ("weights", "moments"):
            for mine, other, expected in zip(first[name], second[name], alone[name], strict=True):
                assert torch.equal(mine, other), (number, name)
                same(mine, expected, number, name)
        assert (alone["step"]["parts"][4] > 0) == (number in (1, 4))


@pytest.mark.slow
def test_the_cases_are_what_they_are_called(found):
    one, first, second = ({name: [step["searched"] for step in of[name]] for name in CASES} for of in found)
    assert first == second, "both decide alike"
    for name in ("plain", "l2"):
        assert first[name][:2] == one[name][:2] == [["bound"], []]
        assert first[name][2] == one[name][2] == ["bound"], "the last step's bound leaves no room"
        assert first[name][4] == one[name][4] == ["bound"], "nothing is known after a refresh"
    assert (first["no room"], one["no room"]) == (3 * [["all pairs"]], 3 * [["bound"]])
    assert set(map(tuple, one["no search"] + first["no search"])) == {("all pairs",)}
    active = {name: [int(step["step"]["n_active"]) for step in found[0][name]] for name in CASES}
    assert set(active["plain"] + active["one process has no positive score"]) == {FULL}
    assert all(0 < count < FULL for count in active["fewer positive pairs than are kept"])
    assert set(active["no positive pair"]) == {0}
    silent = found[0]["one process has no positive score"][2]["step"]["positive"]
    assert silent[:10].any() and not silent[10:].any()


@pytest.mark.slow
def test_what_a_step_sends_is_of_the_size_of_the_batch(found):
    """Its own rows of x and of the error, what its latents decode of the whole batch in two pieces; a count and the
    scores of the selection, what is known of its ten latents, and two sums. With dead latents what these decode, the
    error that they leave, and the two best scores of every token."""
    assert not any(step["sent"] for case in CASES for step in found[0][case])
    for number_bytes, case in ((4, "plain"), (2, "bf16")):
        step = found[1][case][1]
        assert step["searched"] == []
        rows, decoded, few = 8 * 24 * number_bytes, 16 * 24 * 4, 1 + FULL + 3 * 10 + 2 + 2 * 16
        assert step["sent"] == {"messages": 1 + 2 * 2 + 3 + 3, "bytes": 3 * rows + 2 * decoded + 4 * few}


@pytest.mark.slow
def test_products_in_bf16_are_those_of_one_process_to_their_rounding(found):
    one, first, _ = (of["bf16"] for of in found)
    for mine, expected in zip(first[0]["moments"], one[0]["moments"], strict=True):
        assert float((mine - expected).norm()) <= 0.02 * float(expected.norm())
    for mine, alone in zip(first, one, strict=True):
        # Triton's interpreter cuts off where torch rounds: 34.00 is its loss in one process, 34.18 that in fp32.
        rtol = 1e-2 if INTERPRETED else 5e-3
        torch.testing.assert_close(mine["step"]["parts"], alone["step"]["parts"], rtol=rtol, atol=0)


@pytest.mark.slow
def test_a_whole_run_stopped_and_gone_on_with_is_that_of_one_process(found):
    one, first, second = (of["trainer"] for of in found)
    assert second["log"] == [] and len(first["log"]) == len(one["log"]) >= 20
    assert one["log"][-1]["drawn_anew"] >= 6 and any(record["auxiliary"] > 0 for record in one["log"])
    for mine, alone in zip(first["log"], one["log"], strict=True):
        for name, expected in alone.items():
            close = expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-5)
            assert mine[name] == close, (alone["step"], name)
    assert first["threshold"] == pytest.approx(one["threshold"], rel=1e-3)
    for mine, other, expected in zip(first["weights"], second["weights"], one["weights"], strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
