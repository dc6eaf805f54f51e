"""Checkpoints: which one is gone on from, how many there are, and what a full disk leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_parts import SETTINGS, folders_with_rows, launch, read_log, script

from finqa.models.students import StudentRun
from finqa.training.checkpoints import checkpoints, damage, last_checkpoint
from finqa.training.fine_tuning import TrainingConfig, fine_tune


@pytest.fixture(scope="module")
def trained(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a student with the two checkpoints that a run of 10 updates leaves."""
    run = StudentRun("FinQA-mini", str(tiny_student), SETTINGS)
    folders = folders_with_rows(tmp_path_factory.mktemp("trained"))
    return fine_tune(run, TrainingConfig(save_steps=2), folders)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "student"))


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.slow
def test_two_checkpoints_are_kept_however_many_are_written(folder: Path):
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-10", "checkpoint-8"]
    assert [damage(path) for path in checkpoints(folder)] == [None, None]
    assert last_checkpoint(folder) == folder / "checkpoint-10"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_with_a_file_cut_short_is_left_out_for_the_one_before(folder: Path, name: str, share: float):
    cut(folder / "checkpoint-10" / name, share)
    assert damage(folder / "checkpoint-10") == f"{name} is damaged"
    assert last_checkpoint(folder) == folder / "checkpoint-8"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_a_file_is_left_out_for_the_one_before(folder: Path, name: str):
    (folder / "checkpoint-10" / name).unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-8"
    shutil.rmtree(folder / "checkpoint-8")
    assert last_checkpoint(folder) is None


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_weights(
    trained: Path, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    from safetensors.torch import load_file

    run = StudentRun("FinQA-mini", str(tiny_student), SETTINGS)
    folders = folders_with_rows(tmp_path)
    folder = folders.model("FinQA-mini", run.model_id)
    shutil.copytree(trained, folder)
    for name in ("run.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    cut(folder / "checkpoint-10" / "optimizer.pt")
    fine_tune(run, TrainingConfig(save_steps=2), folders)
    told = capsys.readouterr().out
    assert "checkpoint-10 is left out: optimizer.pt is damaged" in told and "going on from checkpoint-8" in told
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == "checkpoint-8"
    assert damage(folder / "checkpoint-10") is None
    whole, again = (load_file(path / "adapter_model.safetensors") for path in (trained, folder))
    assert all(weight.equal(again[name]) for name, weight in whole.items())


LIMITED = """
import resource
from finqa.training.completion_trainer import CompletionTrainer
before = CompletionTrainer.{method}
def saved(self, *a, **k):
    if self.state.global_step > {after}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    return before(self, *a, **k)
CompletionTrainer.{method} = saved
"""
"""No file may grow over a limit, after some updates: the system answers as if the disk were full."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "after"), [("_save_optimizer_and_scheduler", 4), ("_save_checkpoint", 0)])
def test_a_disk_that_fills_up_is_one_line_and_the_last_whole_checkpoint_stays(
    method: str, after: int, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = StudentRun("FinQA-mini", str(tiny_student), replace(SETTINGS, lora_r=32))
    folders = folders_with_rows(tmp_path)
    config = TrainingConfig(save_steps=2)
    full = launch(script(tmp_path, "full", run, config, LIMITED.format(method=method, after=after)), folders.data)
    folder = folders.model("FinQA-mini", run.model_id)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1:] == [line for line in full.stderr.splitlines() if "error: " in line]
    assert "the disk is full; make room there, then run the command again" in full.stderr
    if not after:
        assert "no checkpoint was written yet" in full.stderr and checkpoints(folder) == []
        return
    assert "it goes on from checkpoint-4" in full.stderr
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-2"]
    fine_tune(run, config, folders)
    assert "going on from checkpoint-4" in capsys.readouterr().out
    assert [record["step"] for record in read_log(folder)] == [1, 10]
