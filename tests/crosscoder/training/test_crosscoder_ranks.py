"""Two processes train as one would at the same batch, and a killed run of every method ends bitwise as a whole one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import started
import torch
from made_up_activations import planted_activations, write_store

from crosscoder.dictionaries.ranks import Ranks
from crosscoder.dictionaries.selection import batch_topk
from crosscoder.training.trainer import LONGEST_PAUSE, Trainer
from finqa.runtime.paths import REPOSITORY

METHODS = ("batchtopk", "l1", "partition", "dedicated", "difference-sae", "stagewise-sae")

WORKER = '''
"""Trains a dictionary of each method, one after the other: worker.py STORE FOLDER EPOCHS METHOD..."""
import atexit, json, sys
from pathlib import Path

@atexit.register  # before the group's own: it runs after it
def note_threads():
    if ranks.world > 1:
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        (root / f"threads-{ranks.rank}.json").write_text(json.dumps(threads))

import torch
from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.ranks import ranks_from_environment
from crosscoder.training.sizing import sized_configs
from crosscoder.training.trainer import Trainer

import torch.distributed as dist
from crosscoder.training.step import AutogradStep

exchanged, in_last_step, call = [], [], AutogradStep.__call__

def noted(name, take):
    def exchange(*tensors, **named):
        exchanged.append([name, tensors[-1].nbytes if name == "all_gather" else tensors[0].nbytes, "async_op" in named])
        return take(*tensors, **named)
    return exchange

def counted(self, *of_step):
    exchanged.clear()
    step = call(self, *of_step)
    in_last_step[:] = exchanged
    return step

for name in ("all_reduce", "all_gather", "broadcast"):
    setattr(dist, name, noted(name, getattr(dist, name)))
AutogradStep.__call__ = counted
saved, save = [], Trainer.save_state

def noted_save(self):
    saved.append(self.steps_done)
    save(self)

Trainer.save_state = noted_save

torch.set_num_threads(1)
store, root, epochs = ActivationStore(Path(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3])
ranks = ranks_from_environment("cpu")
for method in sys.argv[4:]:
    folder = root / method
    crosscoder, training = sized_configs(
        store.config.d_model, len(store), method, n_latents=64, k=3, batch_size=100, epochs=epochs,
        learning_rate=2e-3, dead_after_tokens=100, seed=5,
    )
    folder.mkdir(parents=True, exist_ok=True)

    def log(record):
        with (folder / f"log-{ranks.rank}.jsonl").open("a") as file:
            file.write(json.dumps(record._asdict()) + "\\n")

    model = new_dictionary(crosscoder, generator=torch.Generator().manual_seed(5 + 100 * ranks.rank))
    trainer = Trainer(model, store, training, folder, log, log_every=1, checkpoint_every_s=0.0, ranks=ranks)
    trainer.fit()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(parameters, folder / f"parameters-{ranks.rank}.pt")
    (root / f"exchanged-{method}.json").write_text(json.dumps(in_last_step))
    (root / f"saved-{method}-{ranks.rank}.json").write_text(json.dumps(saved))
    saved.clear()
'''.replace("\\\\", "\\")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The script, and a store for it."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    write_store(folder / "store", planted_activations(2000, 12, 16))
    return folder / "worker.py", folder / "store"


def command(worker: tuple[Path, Path], folder: Path, epochs: float, methods: Sequence[str] = METHODS) -> list[object]:
    return [worker[0], worker[1], folder, epochs, *methods]


def run(words: list[object]) -> None:
    output = started.run(words, REPOSITORY, os.environ | {"OMP_NUM_THREADS": "1"})
    assert output.returncode == 0, output.stderr


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log-0.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_and_two(worker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of runs of every method, by one process and by two."""
    root = tmp_path_factory.mktemp("processes")
    run(command(worker, root / "one", epochs=0.5))
    run([*started.TORCHRUN, *command(worker, root / "two", epochs=0.5)])
    return root / "one", root / "two"


@pytest.mark.parametrize(
    ("seconds", "seconds_a_step", "pause"),
    [(60.0, 0.001, LONGEST_PAUSE), (60.0, 10.0, 3), (60.0, 100.0, 1), (0.1, 1.0, 1), (0.0, 1.0, 0), (-5.0, 1.0, 0)],
)
def test_processes_ask_the_first_sooner_where_steps_are_slow(seconds: float, seconds_a_step: float, pause: int):
    def asked(world: int) -> int:
        ranks: Any = SimpleNamespace(world=world, number_of_first=lambda own, device: own)
        trainer: Any = SimpleNamespace(ranks=ranks, device=torch.device("cpu"))
        return Trainer._pause(trainer, seconds, seconds_a_step)

    assert (asked(2), asked(1)) == (pause, min(1, pause))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_loss_of_one(one_and_two: tuple[Path, Path], method: str):
    one, two = (folder / method for folder in one_and_two)
    alone, together = log(one), log(two)
    assert len(alone) == len(together) == (18 if method == "stagewise-sae" else 9)  # it has two stages
    for a, b in zip(alone, together, strict=True):
        parts = ("loss", "reconstruction", "difference", "l1", "auxiliary", "gradient_norm")
        assert {part: b[part] for part in parts} == pytest.approx({part: a[part] for part in parts}, rel=1e-5)
        assert b["explained_variance"] == pytest.approx(a["explained_variance"], rel=1e-4)
        same = ("l0", "dead_share", "never_positive_share", "drawn_anew", "learning_rate", "tokens")
        assert {name: b[name] for name in same} == {name: a[name] for name in same}
    if method != "l1":
        assert any(record["auxiliary"] > 0 for record in alone)
    # No time may pass between two checkpoints: there is one after every step, which all processes have a part in.
    parts = (one.parent / f"saved-{method}-0.json", *(two.parent / f"saved-{method}-{rank}.json" for rank in range(2)))
    assert [json.loads(path.read_text()) for path in parts] == 3 * [list(range(1, len(alone) + 1))]
    # Both processes hold the same parameters to the last bit, and the first alone has written.
    mine, other = (torch.load(two / f"parameters-{rank}.pt") for rank in range(2))
    assert torch.equal(mine, other)
    names = {path.name for path in two.iterdir()}
    assert names == {"config.json", "model.safetensors", "log-0.jsonl", "parameters-0.pt", "parameters-1.pt"}
    thresholds = [json.loads((folder / "config.json").read_text())["threshold"] for folder in (one, two)]
    assert thresholds[1] == pytest.approx(thresholds[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_step_sends_each_gradient_once_while_it_computes_and_waits_for_little_else(one_and_two, method: str):
    """Beside the gradients: the scores of the selection (4 bytes for each of at most four pairs a token), what
    the log and the counts of live latents say of the batch in one message, and two of the auxiliary loss."""
    one, two = one_and_two
    assert json.loads((one / f"exchanged-{method}.json").read_text()) == []
    sent = json.loads((two / f"exchanged-{method}.json").read_text())
    trained = 2 * 12 + 1 if method == "difference-sae" else 4 * 12 + 1
    gradients = [size for _, size, overlapped in sent if overlapped]
    assert len(gradients) == 4 and sum(gradients) == 4 * (64 * trained + (trained - 1) // 2)
    waited = [size for _, size, overlapped in sent if not overlapped]
    assert len(waited) <= {"partition": 5, "dedicated": 6}.get(method, 4), "those select in two and three groups"
    assert sum(waited) <= 4 * (4 * 100 + 6 + 2 * 64 + 2 * 12 + 1)


@pytest.mark.slow
def test_no_process_leaves_a_thread_of_the_group_behind_which_would_abort_it_once_in_a_while(one_and_two):
    threads = [json.loads((one_and_two[1] / f"threads-{rank}.json").read_text()) for rank in range(2)]
    assert all(threads)
    assert not [name for of_rank in threads for name in of_rank if "gloo" in name]


@pytest.mark.slow
def test_a_run_of_every_method_killed_at_any_moment_ends_bitwise_as_a_whole_one(worker, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(worker, whole, epochs=10))
    for method in METHODS:
        kill_under_way(command(worker, killed, 10, [method]), killed / method)
    run(command(worker, killed, epochs=10))
    for method in METHODS:
        for name in ("model.safetensors", "config.json"):
            assert (killed / method / name).read_bytes() == (whole / method / name).read_bytes(), method
        steps = {record["step"]: record for record in log(killed / method)}
        assert [steps[record["step"]] for record in log(whole / method)] == log(whole / method)


def kill_under_way(words: list[object], folder: Path) -> None:
    """Start a run and kill it once it has written a state."""
    written, environment = folder / "training_state.safetensors", os.environ | {"OMP_NUM_THREADS": "1"}
    assert started.killed_when(written.exists, words, REPOSITORY, environment).returncode == -signal.SIGKILL
    assert not (folder / "config.json").exists()


class TwoInOne(Ranks):
    """The other process's best scores, as if it had sent them."""

    def __init__(self, rank: int, everyone: torch.Tensor) -> None:
        super().__init__(rank, len(everyone))
        object.__setattr__(self, "everyone", everyone)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.everyone

    def smallest(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("n_keep", [1, 5, 7, 8, 12])
@pytest.mark.parametrize("ties", [False, True])
def test_a_selection_over_two_processes_is_that_over_all_rows(n_keep: int, ties: bool):
    generator = torch.Generator().manual_seed(n_keep)
    scores = torch.rand(4, 6, generator=generator)
    if ties:
        scores = (3 * scores).ceil()
    best = torch.stack(
        [scores[rows].flatten().sort(descending=True).values[:n_keep] for rows in (slice(2), slice(2, 4))]
    )
    halves = [
        batch_topk(scores[rows], scores[rows], n_keep, TwoInOne(rank, best))
        for rank, rows in enumerate((slice(2), slice(2, 4)))
    ]
    together = torch.cat([half.values for half in halves])
    alone = batch_topk(scores, scores, n_keep).values
    assert int((together > 0).sum()) == n_keep
    assert torch.equal(together[together > 0].sort().values, alone[alone > 0].sort().values)
    if not ties:
        assert torch.equal(together, alone)
