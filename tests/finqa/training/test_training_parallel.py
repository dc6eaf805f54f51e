"""Several processes that train together, as torchrun or accelerate starts them."""

from __future__ import annotations

import ast
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import started
from datasets import Dataset
from training_parts import LAUNCHERS, SETTINGS, folders_with_rows, launch, read_log, script

from finqa.models.students import StudentRun
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import REPOSITORY
from finqa.training.fine_tuning import TrainingConfig, _claim, _identity
from finqa.training.rows import NO_ROW, LengthGrouped, SharedRows, collator, example
from finqa.training.trainable import Speed

N_ROWS = 43
EVERY_STEP = (
    "import finqa.training.fine_tuning\n"
    "arguments = finqa.training.fine_tuning.training_arguments\n"
    "def every_step(*a):\n"
    "    made = arguments(*a)\n"
    "    made.logging_steps = 1\n"
    "    return made\n"
    "finqa.training.fine_tuning.training_arguments = every_step\n"
)
"""A record for every update."""
FP32 = EVERY_STEP + "finqa.training.fine_tuning.multiplies_bf16 = lambda device: False\n"
COUNTING = (
    "import atexit\n"
    "from finqa.runtime import parallel\n"
    "from finqa.training import rows as training_rows\n"
    "ids, calls = training_rows.training_ids, []\n"
    "training_rows.training_ids = lambda *a: calls.append(a) or ids(*a)\n"
    "atexit.register(lambda: Path(f'{sys.argv[1]}.{parallel.rank()}').write_text(str(len(calls))))\n"
)
"""Leaves how many rows each process has tokenised, in a file beside the data folder."""


SENT = (
    "from finqa.training.completion_trainer import CompletionTrainer\n"
    "train = CompletionTrainer.train\n"
    "def noted(self, *a, **k):\n"
    "    done = train(self, *a, **k)\n"
    "    if parallel.world_size() > 1:\n"
    "        facts = self.model_wrapped._get_ddp_logging_data()\n"
    "        facts = {k: facts[k] for k in ('bucket_sizes', 'gradient_as_bucket_view')}\n"
    "        facts['buffers'] = self.model_wrapped.will_sync_module_buffers()\n"
    "        Path(f'{sys.argv[1]}.sent').write_text(repr(facts))\n"
    "    return done\n"
    "CompletionTrainer.train = noted\n"
)
"""Leaves what each update exchanges, as torch's DistributedDataParallel says it."""
CAPTURING = (
    "import torch\n"
    "from finqa.training.captured_steps import CapturedSteps\n"
    "from finqa.training.completion_trainer import CompletionTrainer\n"
    "torch.cuda.graph_pool_handle = torch.cuda.Stream = lambda: None\n"
    "CapturedSteps.__call__ = lambda self, *batch: self._take_gradients() or self._step(*batch)\n"
    "train = CompletionTrainer.train\n"
    "CompletionTrainer.train = lambda self, *a, **k: self.capture_steps() or train(self, *a, **k)\n"
)
"""All that recorded steps do but the recording, which needs a GPU."""


@pytest.mark.parametrize("n_rows", [80, 83, 85, 1])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_together_the_batches_of_one_process_with_as_many_rows(n_rows: int, processes: int):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    lengths = [100 + (i * 37) % 200 for i in range(n_rows)]
    alone = LengthGrouped(lengths, batch_size=4 * processes, seed=3, processes=1)
    together = LengthGrouped(lengths, batch_size=4, seed=3, processes=processes)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        together.set_epoch(epoch)
        whole = list(BatchSampler(alone, 4 * processes, drop_last=False))
        batches = BatchSampler(together, 4, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        assert {len(shard) for shard in shards} == {len(whole)}
        for update, wanted in enumerate(whole):
            seen = [row for shard in shards for row in shard[update] if row != NO_ROW]
            assert seen == wanted


def test_a_process_without_a_row_gets_one_token_without_loss():
    rows = SharedRows(Dataset.from_list([example("a", (5, 6, 7, 2), 2)]), pad_id=3)
    assert len(rows) == 1 and rows[0]["id"] == "a" and list(rows["n_tokens"]) == [4]
    batch = collator(pad_id=3)([rows[NO_ROW], rows[NO_ROW]])
    assert batch["input_ids"].tolist() == [[3], [3]]
    assert (batch["labels"] == -100).all()


def train_in(folder: Path, run: StudentRun, processes: int, launcher: str, way: str = SENT) -> Path:
    """The folder of a student that so many processes have trained for two epochs; only one of them spoke."""
    folders = folders_with_rows(folder, N_ROWS)
    config = TrainingConfig(save_steps=5)
    train = script(folder, "train", run, config, FP32 + COUNTING + way)
    done = launch(train, folders.data, processes=processes, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("training on 43 rows", done.stdout)) == 1
    assert len(re.findall("step 12 of 12", done.stdout)) == 1
    tokenised = [int(Path(f"{folders.data}.{rank}").read_text()) for rank in range(processes)]
    assert tokenised == [1 + N_ROWS] + [1] * (processes - 1), "the first one tokenises, the others read"
    trained = folders.model("FinQA-mini", run.model_id)
    manifest = json.loads((trained / "run.json").read_text())
    assert manifest["updates"] == 12 and manifest["processes"] == processes
    assert manifest["precision"] == "fp32"
    return trained


@pytest.fixture(scope="module")
def alone(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudentRun, list[dict]]:
    """A run of one process with eight rows an update, and its log."""
    settings = replace(SETTINGS, lora_dropout=0.0, num_epochs=2, batch_size=8)
    run = StudentRun("FinQA-mini", str(tiny_student), settings)
    return run, read_log(train_in(tmp_path_factory.mktemp("alone"), run, 1, "torchrun"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_have_the_losses_of_one_with_twice_the_rows_and_one_of_them_speaks_and_writes(
    launcher: str, alone: tuple[StudentRun, list[dict]], tmp_path: Path
):
    run, one_log = alone
    run = replace(run, settings=replace(run.settings, batch_size=4))
    have_like_losses(one_log, read_log(train_in(tmp_path, run, 2, launcher)))
    # The gradients alone are sent, from where they are; buffers of the base are not, which never change.
    sent = ast.literal_eval((tmp_path / "data.sent").read_text())
    [manifest] = (tmp_path / "data" / "models" / "FinQA-mini").glob("*/run.json")
    assert json.loads(manifest.read_text())["sent_bytes_an_update"] == sum(map(int, sent["bucket_sizes"].split(", ")))
    assert (sent["buffers"], sent["gradient_as_bucket_view"]) == (False, 1)


def have_like_losses(one_log: list[dict], two_log: list[dict]) -> None:
    assert [record["step"] for record in one_log] == [record["step"] for record in two_log] == list(range(1, 13))
    for one, two in zip(one_log, two_log, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        # A token stands for each row that the last batch of an epoch lacks.
        assert 0 <= two["tokens_seen"] - one["tokens_seen"] <= 2 * (48 - N_ROWS)
    assert one_log[-1]["loss"] < one_log[0]["loss"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_processes_of_recorded_steps_add_up_their_gradients_themselves(
    accumulated: int, alone: tuple[StudentRun, list[dict]], tmp_path: Path
):
    one_run, one_log = alone
    if accumulated > 1:
        one_run = replace(one_run, settings=replace(one_run.settings, batch_size=4), grad_accum=accumulated)
        one_log = read_log(train_in(tmp_path / "one", one_run, 1, "torchrun"))
    settings = replace(one_run.settings, batch_size=one_run.settings.batch_size // 2)
    two_run = replace(one_run, settings=settings)
    have_like_losses(one_log, read_log(train_in(tmp_path / "two", two_run, 2, "torchrun", CAPTURING)))


@pytest.mark.gpu
def test_two_gpus_replay_recorded_steps_and_have_the_losses_of_one_with_twice_the_rows(
    tiny_student: Path, tmp_path: Path
):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    logs = []
    for processes in (1, 2):
        settings = replace(SETTINGS, lora_dropout=0.0, num_epochs=2, learning_rate=1e-3, batch_size=8 // processes)
        run = StudentRun("FinQA-mini", str(tiny_student), settings)
        folders = folders_with_rows(tmp_path / str(processes), N_ROWS)
        config = TrainingConfig(save_steps=12, speed=Speed(compiled=True))
        train = script(tmp_path / str(processes), "train", run, config, EVERY_STEP)
        done = launch(train, folders.data, processes=processes)
        assert done.returncode == 0, done.stderr
        trained = folders.model("FinQA-mini", run.model_id)
        assert json.loads((trained / "run.json").read_text())["speed"]["captured"]
        logs.append(read_log(trained))
    assert len(logs[0]) == len(logs[1]) == 12
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_from_their_checkpoint_to_the_same_weights(
    tiny_student: Path, tmp_path: Path
):
    from safetensors.torch import load_file

    run = StudentRun("FinQA-mini", str(tiny_student), replace(SETTINGS, num_epochs=2))
    config = TrainingConfig(save_steps=4)
    folders = [folders_with_rows(tmp_path / name, N_ROWS) for name in ("whole", "killed")]
    dying = (
        "import os, signal\n"
        "from finqa.training.completion_trainer import CompletionTrainer\n"
        "step = CompletionTrainer.training_step\n"
        "def to_die(self, *a, **k):\n"
        "    if self.state.global_step == 9 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "CompletionTrainer.training_step = to_die\n"
    )
    plain = script(tmp_path, "train", run, config)
    assert launch(plain, folders[0].data, processes=2).returncode == 0
    killed = launch(script(tmp_path, "dying", run, config, dying), folders[1].data, processes=2)
    assert killed.returncode != 0 and str(-signal.SIGKILL) in killed.stderr
    assert killed.stderr.count("error: ") == 1 and "the same command goes on" in killed.stderr
    resumed = launch(plain, folders[1].data, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert started.times_said("going on from checkpoint-8", resumed.stdout) == 1
    whole, again = (load_file(f.model("FinQA-mini", run.model_id) / "adapter_model.safetensors") for f in folders)
    assert whole.keys() == again.keys()
    for name, weight in whole.items():
        assert weight.equal(again[name]), name


@pytest.mark.slow
def test_what_is_wrong_for_all_processes_is_said_by_one(tiny_student: Path, tmp_path: Path):
    folders = folders_with_rows(tmp_path)
    words = ["FinQA-mini", tiny_student, "-P", "-LM", "no_proj", "--no-push", "--data-dir", folders.data]
    done = launch(REPOSITORY / "main.py", *words, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "has no layers called no_proj" in done.stderr


def test_two_processes_do_not_go_on_with_what_one_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = StudentRun("FinQA-mini", "some-model", SETTINGS)
    _claim(tmp_path, _identity(run, TrainingConfig(), "base", "rows"))
    _claim(tmp_path, _identity(run, TrainingConfig(), "base", "rows"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="processes None -> 2"):
        _claim(tmp_path, _identity(run, TrainingConfig(), "base", "rows"))


def test_a_model_that_was_brought_with_its_manifest_is_taken_where_its_settings_are_the_same(tmp_path: Path):
    run = StudentRun("FinQA-mini", "some-model", SETTINGS)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="was not trained here"):
        _claim(tmp_path, _identity(run, TrainingConfig(), "base", "rows"))
    write_json(tmp_path / "run.json", {"config": _identity(run, TrainingConfig(), "base", "rows")})
    _claim(tmp_path, _identity(run, TrainingConfig(), "base", "rows"))
    with pytest.raises(UserError, match="rows_hash rows -> other rows"):
        _claim(tmp_path, _identity(run, TrainingConfig(), "base", "other rows"))
