"""The scripts as a user runs them: help without torch, clear errors, and the whole diff on a tiny student."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import started
import torch
from hub_contents import Account
from hub_server import hub_server

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.checkpoint import load_dictionary
from finqa.runtime.journal import only_run_on
from finqa.runtime.paths import REPOSITORY

FOLDER = REPOSITORY / "crosscoder-model-diff"
INFERENCE = "../inference.py"
SCRIPTS = ("merge_and_push_lora.py", "collect_activations.py", "train.py")


def run(script: str | Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the folder, from that folder, offline."""
    return started.run([script, *words], FOLDER, os.environ | environment)


@pytest.fixture(scope="module")
def diff(data_folder: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory):
    """Output of merge, collect, train on the tiny student, and the results folder."""
    results = tmp_path_factory.mktemp("results")
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder)
    outputs = {
        "merge": run("merge_and_push_lora.py", *names, "--no-push"),
        "collect": run("collect_activations.py", *names, "--layer", "2", "--no-push"),
        "train": run("train.py", *names, "--layer", "2", "--results-dir", results, "--epochs", "20", "--no-push"),
    }
    for output in outputs.values():
        assert output.returncode == 0, output.stderr
    return outputs, results / "tiny-student-FinQA-mini-layer2-mlp_1k_samples_batchtopk"


@pytest.mark.parametrize("script", [*SCRIPTS, INFERENCE])
def test_help_is_quick_and_imports_no_torch(script):
    started = time.monotonic()
    output = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 2
    imported = {line.rsplit("|", 1)[-1].strip() for line in output.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "nnsight", "wandb", "pandas", "matplotlib"})
    assert "DATASET_NAME" in output.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_adapter_or_set_that_is_nowhere_names_both_places_and_the_command(script, tiny_student, tmp_path: Path):
    rows = tmp_path / "clean_with_code" / "FinQA-mini" / "finqa-mini_test_generated_filtered.csv"
    rows.parent.mkdir(parents=True)
    rows.write_text("prompt,generated_code,actual_answer,expected_answer\na,ans = 1,1.0,1\nb,ans = 2,2.0,2\n")
    output = run(script, "FinQA-mini", tiny_student, "someone", "--data-dir", tmp_path)
    assert output.returncode == 1
    error = output.stderr.strip().splitlines()[-1]
    assert error.startswith("error: no ")
    assert str(tmp_path) in error
    assert "on the Hub as someone/" in error
    made_by = "collect_activations.py" if script == "train.py" else "../main.py"
    assert f"make it with: python {made_by} FinQA-mini {tiny_student}" in error


def test_missing_rows_say_what_makes_them(tiny_student, tmp_path: Path):
    output = run("collect_activations.py", "FinQA-mini", tiny_student, "--data-dir", tmp_path)
    assert output.returncode == 1
    assert "is missing; make it with: python -m preprocessing" in output.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_push_that_cannot_be_done_is_refused_before_any_work(script, data_folder, tiny_student):
    names = ("FinQA-mini", tiny_student, "someone", "--data-dir", data_folder)
    output = run(script, *names, "--push", HF_TOKEN="hf_made_up")
    assert output.returncode == 1
    assert output.stderr.startswith("error: cannot push")
    assert "hf_made_up" not in output.stdout + output.stderr


@pytest.mark.slow
def test_a_steered_program_stands_beside_the_one_without(diff, data_folder, tiny_student):
    from crosscoder.interventions.steering import active_means
    from crosscoder.names import crosscoder_folder
    from finqa.runtime.paths import Folders

    dictionary = load_dictionary(crosscoder_folder(Folders(data=data_folder), diff[1].name))
    (folder,) = (data_folder / "activations").glob("*-layer2-mlp-1024")
    store, latents = ActivationStore(folder), range(dictionary.config.n_latents)
    means = active_means(dictionary, [store.read(torch.arange(len(store)))], latents)[1]
    alive = int((means > 0).nonzero()[0])
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--max-new-tokens", "8")

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return run(INFERENCE, *names, *words)

    same = ask("--steer", f"{alive}=0")
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("(the same program)") == 2
    assert f"latent {alive}: mean value {float(means[alive]):.3g} where active" in same.stdout
    other = ask("--steer", f"{alive}=300", "--ablate", str(alive), "--from", "fine-tuned").stdout
    for model in ("base model (zero-shot)", "fine-tuned model (fine-tuned)"):
        without = same.stdout.partition(f"=== {model}\n")[2].partition("\n--> ")[0]
        assert f"=== {model}\n{without}\n--> " in other
        title = f"=== {model}: without | with latents {alive}=300, {alive} ablated, from the fine-tuned model\n"
        code = other.partition(title)[2].partition("\n--> ")[0]
        assert code.startswith("! ") and code[2:].startswith(without.split("\n")[0])
    for words, says in (
        (["--steer", "99999=1"], "error: there is no latent 99999; give one of this dictionary's, 0 to "),
        (["--steer", "1=1", "--method", "l1"], "make it with: python train.py "),
    ):
        error = ask(*words).stderr.strip().splitlines()[-1]
        assert says in error, error


@pytest.mark.slow
def test_the_merged_model_answers_as_the_pair_does(diff, data_folder):
    outputs, _ = diff
    assert "of next tokens agree" in outputs["merge"].stdout
    merged = next((data_folder / "models" / "FinQA-mini").glob("*-merged"))
    manifest = json.loads((merged / "run.json").read_text())
    assert manifest["check"]["merged"] < 0.1 * manifest["check"]["base"]
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and "base_model:" not in card  # a folder is no model of the Hub


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "output"),
    [
        (("collect_activations.py",), ("--layer", "1"), "activations/{student}-layer1-mlp-1024"),
        (("train.py",), ("--layer", "2"), "models/crosscoders/{name}"),
        (("train.py",), ("--layer", "2"), "results/{name}"),
        (("analyse.py",), ("--layer", "2"), "results/{name}"),
        (("-m", "crosscoder.dashboard"), ("--layer", "2"), "results/{name}/dashboard.html"),
    ],
)
def test_a_second_run_on_an_output_is_refused_in_one_line(diff, data_folder, tiny_student, script, words, output):
    results, student = diff[1], "tiny-student-peftq_proj_k_proj_v_proj_o_proj-bs1-ne1-FinQA-mini-test"
    output = output.format(student=student, name=results.name)
    held = results.parents[0] / output[8:] if output.startswith("results/") else data_folder / output
    names = ["FinQA-mini", tiny_student, "--data-dir", data_folder]
    if "collect_activations.py" not in script:
        names += ["--results-dir", results.parent]
    if "train.py" in script:
        names += ["--epochs", "20"]
    with only_run_on(held):
        second = run(*script, *names, *words)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == f"error: another run is writing to {held}; wait for it, or end it first"


@pytest.mark.slow
def test_a_merge_that_strays_is_refused_and_neither_kept_nor_pushed(data_folder, tiny_student, tmp_path: Path):
    shutil.copytree(data_folder, tmp_path, ignore=shutil.ignore_patterns("*-merged", "activations"), dirs_exist_ok=True)
    words = ["FinQA-mini", tiny_student, "writer", "--push", "--data-dir", tmp_path, "--max-kl", "1e-12"]
    with hub_server(tmp_path / "hub") as hub:
        hub.accounts = {"hf_thewriterstoken": Account("writer")}
        there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_thewriterstoken"}
        output = run("merge_and_push_lora.py", *words, **there, HF_HUB_OFFLINE="0", NO_PROXY="*")
        assert hub.asked("GET", "/api/whoami-v2") and not hub.repositories
    assert output.returncode == 1
    assert "the merged model is" in output.stderr.splitlines()[-1]
    (adapter,) = (tmp_path / "models" / "FinQA-mini").iterdir()
    assert not adapter.name.endswith(("-merged", ".partial"))


@pytest.mark.slow
def test_a_set_is_collected_once_and_replaced_only_when_asked(diff, data_folder, tiny_student):
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2")
    again = run("collect_activations.py", *names)
    assert (again.returncode, "is complete" in again.stdout) == (0, True)
    other = run("collect_activations.py", *names, "--dtype", "bf16")
    assert other.returncode == 1
    assert "replace it with --overwrite" in other.stderr


@pytest.mark.slow
def test_the_merged_model_gives_the_activations_of_the_pair(diff, data_folder, tiny_student):
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2")
    assert run("collect_activations.py", *names, "--merged").returncode == 0
    (of_pair,) = (data_folder / "activations").glob("*-mlp-1024")
    (of_merged,) = (data_folder / "activations").glob("*-mlp-1024-merged")
    a, b = (ActivationStore(folder).read(torch.arange(400)).float() for folder in (of_pair, of_merged))
    assert torch.equal(a[:, 0], b[:, 0])
    assert (a[:, 1] - b[:, 1]).norm() < 0.1 * (a[:, 1] - a[:, 0]).norm()


@pytest.mark.slow
def test_training_leaves_a_crosscoder_and_its_figures(diff, data_folder):
    outputs, results = diff
    assert "held-out explained variance: instruct 0." in outputs["train"].stdout
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["held_out"]["l0"] > 0
    assert metrics["n_held_out_documents"] == 1
    assert {"training.png", "training.svg", "log.jsonl", "run.json"} <= {path.name for path in results.iterdir()}
    model = load_dictionary(data_folder / "models" / "crosscoders" / results.name)
    assert model.threshold == metrics["threshold"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("difference-sae", "held-out explained variance: difference "),
        ("partition", "meet latent scaling's conditions for fine-tuned-only: "),
        ("l1", "meet latent scaling's conditions for fine-tuned-only: "),
        ("dedicated --reserved 0.25", "meet latent scaling's conditions for fine-tuned-only: "),
        ("stagewise-sae", "median change of a latent in the second stage: 0."),
        ("stagewise-sae --untrained", "median change of a latent in the second stage: 0.000"),
        ("batchtopk --untrained", "untrained: no step is taken"),
        ("difference-sae --freeze-decoder", "the decoder is frozen"),
    ],
)
def test_every_method_has_a_checkpoint_and_metrics_of_its_own(diff, data_folder, tiny_student, method, said):
    _, results = diff
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--results-dir", results.parent)
    method, *flags = method.split()
    output = run("train.py", *names, "--epochs", "5", "--no-push", "--method", method, *flags)
    assert output.returncode == 0, output.stderr
    assert said in output.stdout
    form = {"--untrained": "-untrained", "--freeze-decoder": "-frozen-decoder"}.get("".join(flags[:1]), "")
    name = f"tiny-student-FinQA-mini-layer2-mlp_1k_samples_{method}{form}"
    metrics = json.loads((results.parent / name / "metrics.json").read_text())
    assert metrics["method"] == method
    assert (metrics["latent_scaling"] is None) == (method in ("difference-sae", "stagewise-sae"))
    model = load_dictionary(data_folder / "models" / "crosscoders" / name)
    assert model.config.method == method
    if form:  # found by the same flags, and not taken for the trained one
        done = run("analyse.py", *names, "--method", method, *flags, "--no-dashboard")
        assert (done.returncode, name in done.stdout) == (0, True), done.stderr


@pytest.mark.slow
def test_the_published_settings_say_what_they_do_not_reproduce(diff, data_folder, tiny_student):
    _, results = diff
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--results-dir", results.parent)
    small = ("--latents", "64", "--k", "4", "--step-tokens", "128", "--name", "as-published", "--no-push")
    output = run("train.py", *names, "--preset", "published", *small)
    assert output.returncode == 0, output.stderr
    assert "not as in the published run: rows of train" in output.stdout
    training = json.loads((results.parent / "as-published" / "run.json").read_text())["training"]
    kept = ("learning_rate", "seed", "decoder_norm", "directions", "aux_weight", "l1_weight")
    assert [training[name] for name in kept] == [5e-5, 49, 0.08, "apart", 0.0, 2.0]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(diff, data_folder, tiny_student, tmp_path: Path):
    _, results = diff
    command = ["train.py", "FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--epochs", "20"]
    command += ["--name", "killed", "--results-dir", tmp_path, "--checkpoint-every", "0", "--log-every", "1"]
    checkpoint = data_folder / "models" / "crosscoders" / "killed"
    started.killed_when((checkpoint / "training_state.safetensors").exists, command, FOLDER)
    assert not (checkpoint / "config.json").exists()
    assert run(*command).returncode == 0
    whole = data_folder / "models" / "crosscoders" / results.name
    assert (checkpoint / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, whole))
    assert config == expected


@pytest.mark.slow
def test_where_one_process_is_killed_the_other_ends_and_the_same_command_goes_on_as_one_process_would(
    diff, data_folder, tiny_student, tmp_path: Path
):
    _, results = diff
    command = ["train.py", "FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--epochs", "20"]
    command += ["--name", "by-two", "--results-dir", tmp_path, "--checkpoint-every", "0", "--no-push"]
    checkpoint = data_folder / "models" / "crosscoders" / "by-two"
    state = checkpoint / "training_state.safetensors"
    seconds, said = started.kill_one_of_two(command, FOLDER, 0, state.exists)
    assert seconds < 60 and said.count("error: ") == 1 and "the same command goes on" in said
    assert state.exists() and not (checkpoint / "config.json").exists()
    output = run(*started.TORCHRUN, *command)
    assert output.returncode == 0, output.stderr
    # The first process alone speaks, of the plan too.
    assert [output.stdout.count(part) for part in (" documents from ", "plan: ", ", 2 processes", "held-out")] == [
        1
    ] * 4
    by_two, by_one = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "by-two", results))
    assert by_two["held_out"]["instruct"] == pytest.approx(by_one["held_out"]["instruct"], rel=1e-3)


@pytest.mark.slow
def test_what_is_wrong_for_all_processes_is_said_by_one(data_folder, tiny_student):
    command = ["train.py", "FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "1", "--no-push"]
    output = run(*started.TORCHRUN, *command)
    assert output.returncode != 0
    assert output.stderr.count("error: no activation set in ") == 1


@pytest.mark.slow
def test_a_finished_crosscoder_is_evaluated_again_and_other_settings_are_refused(diff, data_folder, tiny_student):
    _, results = diff
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--results-dir", results.parent)
    metrics = (results / "metrics.json").read_text()
    again = run("train.py", *names, "--epochs", "20")
    assert (again.returncode, "is trained with these settings already" in again.stdout) == (0, True)
    assert (results / "metrics.json").read_text() == metrics
    other = run("train.py", *names, "--epochs", "20", "--seed", "1")
    assert other.returncode == 1
    assert "holds a crosscoder of other settings or data; give --name, or --overwrite it" in other.stderr


@pytest.mark.slow
def test_what_is_read_from_a_crosscoder_is_what_training_reported(diff, data_folder, tiny_student):
    _, results = diff
    names = ("FinQA-mini", tiny_student, "--data-dir", data_folder, "--layer", "2", "--results-dir", results.parent)
    output = run("analyse.py", *names)
    assert output.returncode == 0, output.stderr
    metrics = json.loads((results / "metrics.json").read_text())
    numbers = json.loads((results / "analysis.json").read_text())
    assert numbers["explained_variance"] == pytest.approx(metrics["held_out"])
    assert (results / "run.json").exists() and (results / "analysis.run.json").exists()


def test_the_committed_notebook_has_no_outputs():
    cells = json.loads((FOLDER / "analysis_and_dashboard.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
