"""collect_activations.py as a user runs it: several sets at once, killed, by several processes, to the Hub and back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import started
import torch
from hub_contents import Account
from hub_server import hub_server
from safetensors.torch import load_file, save_file

from crosscoder.activations.recorded_inputs import check_every_split_is_reached
from crosscoder.activations.store import ActivationStore
from crosscoder.names import ActivationChoice
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders

FOLDER = REPOSITORY / "crosscoder-model-diff"
SCRIPT = "collect_activations.py"
SMALL_SHARDS = ("--shard-tokens", "300", "--batch-tokens", "200")
"""A shard a document or two, so that there is something to resume and to share."""


def run(*words: str | Path, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return started.run([*launcher, SCRIPT, *words], FOLDER, os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.fixture
def data(data_folder: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own, without what other tests have made."""
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder, ignore=shutil.ignore_patterns("activations", "*-merged", "crosscoders"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set but run.json, which holds the time it took."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "run.json"}


@pytest.fixture(scope="module")
def whole(data_folder: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets of two layers by two sites that one undisturbed process makes."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    shutil.copytree(data_folder, folder, ignore=shutil.ignore_patterns("activations", "*-merged", "crosscoders"))
    output = run(*names(tiny_student, folder), "--layer", "1", "2", "--site", "mlp", "residual", *SMALL_SHARDS)
    assert output.returncode == 0, output.stderr
    return folder / "activations"


def names(student: Path, data: Path) -> tuple[str | Path, ...]:
    return ("FinQA-mini", student, "--no-push", "--data-dir", data)


@pytest.mark.slow
def test_every_layer_and_site_is_a_set_under_its_documented_name(whole, tiny_student):
    stem = "tiny-student-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1-FinQA-mini-test"
    assert {path.name for path in whole.iterdir()} == {
        f"{stem}-layer{layer}-{site}-1024" for layer in (1, 2) for site in ("mlp", "residual")
    }
    for folder in whole.iterdir():
        store = ActivationStore(folder)
        recorded = store.config.recorded
        assert folder.name == f"{stem}-layer{recorded['layer']}-{recorded['site']}-1024"
        assert recorded["fine_tuned"] == "adapter switched on"
        assert len(store.config.shard_tokens) > 3
        assert json.loads((folder / "run.json").read_text())["reader"] == "nnsight"
    first, second = (ActivationStore(path) for path in sorted(whole.glob("*-mlp-*")))
    assert torch.equal(first.document, second.document)
    assert not torch.equal(first.read(torch.arange(50)), second.read(torch.arange(50)))


@pytest.mark.slow
def test_one_set_at_a_time_and_by_plain_hooks_gives_the_same_bytes(whole, data, tiny_student):
    output = run(*names(tiny_student, data), "--layer", "2", "--reader", "hooks", *SMALL_SHARDS)
    assert output.returncode == 0, output.stderr
    (alone,) = (data / "activations").iterdir()
    assert contents(alone) == contents(whole / alone.name)
    assert json.loads((alone / "run.json").read_text())["reader"] == "hooks"


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_bytes_of_an_undisturbed_one(whole, data, tiny_student):
    command = (*names(tiny_student, data), "--layer", "1", "2", "--site", "mlp", "residual", *SMALL_SHARDS)

    def n_shards() -> int:
        return len(list((data / "activations").glob(".*/shard-*")))

    killed = 0
    # Killed at the first shard, then later and later, until a run comes through.
    for _ in range(3):
        n = n_shards()
        process = started.killed_when(lambda n=n: n_shards() > n, [SCRIPT, *command], FOLDER)
        killed += process.returncode == -signal.SIGKILL
    assert killed > 0
    assert list((data / "activations").glob(".*.partial/shard-*"))
    output = run(*command)
    assert output.returncode == 0, output.stderr
    assert "going on: " in output.stdout
    for folder in whole.iterdir():
        assert contents(data / "activations" / folder.name) == contents(folder)
    assert {path.name for path in (data / "activations").iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_the_same_command_goes_on_to_the_set_that_one_makes(
    whole, data, tiny_student
):
    command = (*names(tiny_student, data), "--layer", "1", "2", "--site", "mlp", "residual", *SMALL_SHARDS)
    seconds, said = started.kill_one_of_two(
        [SCRIPT, *command], FOLDER, 1, lambda: list((data / "activations").glob(".*/shard-*"))
    )
    assert seconds < 60 and said.count("error: ") == 1 and "the same command goes on" in said
    output = run(*command, launcher=started.TORCHRUN)
    assert output.returncode == 0, output.stderr
    assert "going on: " in output.stdout
    for folder in whole.iterdir():
        made = data / "activations" / folder.name
        assert contents(made) == contents(folder)
        assert json.loads((made / "run.json").read_text())["processes"] == 2
    assert started.times_said("documents at layer", output.stdout) == 4  # one process speaks


@pytest.mark.slow
def test_an_error_of_several_processes_is_said_once(data, tiny_student):
    output = run(*names(tiny_student, data), "--layer", "7", launcher=started.TORCHRUN)
    assert output.returncode != 0
    assert output.stderr.count("error: --layer 7: the model has layers 1 to 2") == 1


@pytest.mark.slow
def test_a_set_goes_to_the_hub_and_comes_back(data, tiny_student, tmp_path: Path):
    command = ("FinQA-mini", tiny_student, "writer", "--data-dir", data, "--layer", "2", "--run-name", "r", "--push")
    (adapter,) = (data / "models" / "FinQA-mini").iterdir()
    adapter.rename(adapter.with_name(f"{adapter.name}-r"))
    with hub_server(tmp_path / "hub") as hub:
        hub.accounts = {"hf_thewriterstoken": Account("writer")}
        there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_thewriterstoken"}
        there |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
        output = run(*command, **there)
        assert output.returncode == 0, output.stderr
        (local,) = (data / "activations").iterdir()
        pushed = contents(local)
        shutil.rmtree(local)
        fetch = (
            "import sys; from pathlib import Path; from finqa.models import students;"
            "from crosscoder.repositories import find_folder;"
            "run = students.StudentRun('FinQA-mini', sys.argv[1], students.settings_for(sys.argv[1]),"
            " given_hf_name='writer');"
            "print(find_folder(Path(sys.argv[2]), run, 'activation set', 'no command', kinds=('dataset',)))"
        )
        found = subprocess.run(
            [sys.executable, "-c", fetch, str(tiny_student), str(local)],
            env=os.environ | there,
            capture_output=True,
            text=True,
            check=True,
        )
        fetched = Path(found.stdout.strip().splitlines()[-1])
        got = {name: (fetched / name).read_bytes() for name in pushed}
        assert got == pushed
        assert len(ActivationStore(fetched)) > 0


def test_two_fine_tunes_are_compared_with_each_other(data, tiny_student):
    """Index 0 is what the other fine-tune has as its index 1 against the base."""
    adapter = students.find_adapter(fine_tuned(tiny_student, ""), Folders(data=data))
    other = Folders(data=data).model("FinQA-mini", fine_tuned(tiny_student, "other").model_id)
    shutil.copytree(adapter, other)
    weights = {name: tensor * 2 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, other / "adapter_model.safetensors")
    run_names = {"plain": (), "other": ("--run-name", "other"), "pair": ("--run-name", "other", "--against", "")}
    stores = {}
    for name, words in run_names.items():
        output = run(*names(tiny_student, data), *words, "--layer", "2")
        assert output.returncode == 0, output.stderr
        choice = ActivationChoice(fine_tuned(tiny_student, words[1] if words else ""), layer=2)
        choice = replace(choice, against="") if name == "pair" else choice
        stores[name] = ActivationStore(Folders(data=data).activations(choice.name))
    every = torch.arange(len(stores["pair"]))
    pair = stores["pair"].read(every)
    assert torch.equal(pair[:, 0], stores["plain"].read(every)[:, 1])
    assert torch.equal(pair[:, 1], stores["other"].read(every)[:, 1])
    assert stores["pair"].config.recorded["fingerprint"] != stores["other"].config.recorded["fingerprint"]


def fine_tuned(student: Path, run_name: str) -> students.StudentRun:
    return students.StudentRun("FinQA-mini", str(student), students.settings_for(str(student)), run_name=run_name)


def test_samples_that_do_not_reach_every_split_are_refused(tiny_student: Path):
    choice = ActivationChoice(fine_tuned(tiny_student, ""), split="all", num_samples=40)
    with pytest.raises(
        UserError, match=r"--num-samples 40 ends before the last, .* after 40 rows; .* \(45 takes all\)"
    ):
        check_every_split_is_reached(choice, [30, 10, 5])
    check_every_split_is_reached(replace(choice, num_samples=41), [30, 10, 5])
    check_every_split_is_reached(replace(choice, num_samples=20), [30, 10, 0])
    check_every_split_is_reached(replace(choice, split="test"), [5000])


@pytest.mark.slow
def test_all_splits_are_recorded_one_after_the_other(data: Path, tiny_student: Path):
    folders = Folders(data, data)
    test = folders.filtered("FinQA-mini", "test")
    for split in ("train", "dev"):
        shutil.copy(test, folders.filtered("FinQA-mini", split))
    output = run(*names(tiny_student, data), "--split", "all", "--num-samples", "2")
    assert output.returncode == 1 and "ends before the last" in output.stderr
    output = run(*names(tiny_student, data), "--split", "all", "--num-samples", "5000")
    assert output.returncode == 0, output.stderr
    store = ActivationStore(next((data / "activations").glob("*-FinQA-mini-all-layer*-mlp-5000")))
    ids = [document.id for document in store.documents]
    third = len(ids) // 3
    assert third and ids[:third] == ids[third : 2 * third] == ids[2 * third :]
    assert store.config.recorded["split"] == "all"
