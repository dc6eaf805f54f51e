"""Cards of what is pushed: the real client takes them to a Hub on this machine, finds their metadata, and the lines in
them load what is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_contents import Account
from hub_server import HubServer, hub_server
from made_up_activations import D_MODEL, planted_activations, write_store

from crosscoder.activations.store import ActivationStore
from crosscoder.cards import write_activations_card, write_crosscoder_card
from crosscoder.dictionaries.checkpoint import save_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, TrainingConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.training.report import crosscoder_report
from finqa.models import students
from finqa.models.model_card import metadata, write_student_card
from finqa.runtime.paths import Folders

RECORDED = {
    **{"model": "big/base", "model_id": "big_base-peft", "dataset": "FinQA", "split": "test"},
    **{"layer": 17, "site": "mlp", "num_samples": 40, "dtype": "bf16"},
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import DatasetCard, ModelCard
from finqa.models import hub
folder, name, kind = sys.argv[1:]
hub.push_folder(Path(folder), name, True, kind=kind)
card = (DatasetCard if kind == "dataset" else ModelCard).load(name)
card.validate()
activations = torch.randn(5, 2, int(sys.stdin.read()))
names = dict(activations=activations)
exec(card.text.split("```python")[1].split("```")[0], names)
made = {key: type(value).__name__ for key, value in names.items() if key in ("store", "crosscoder", "values", "model")}
print(json.dumps([card.data.to_dict(), made], default=vars))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as server:
        server.accounts = {"hf_writer": Account("writer")}
        yield server


def pushed(
    hub: HubServer, folder: Path, name: str, home: Path, kind: str = "model"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata of the card as the client reads it from the Hub, and the types of what its lines load."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_writer", "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), name, kind]
    done = subprocess.run(command, env=environment, input=str(D_MODEL), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def activation_set(folder: Path) -> ActivationStore:
    """2,000 planted tokens, said to be of a model on the Hub."""
    write_store(folder, planted_activations(2000, D_MODEL, 16), shard_tokens=800)
    config = json.loads((folder / "config.json").read_text())
    config["recorded"] |= RECORDED
    (folder / "config.json").write_text(json.dumps(config))
    return ActivationStore(folder)


def figures(data: dict[str, Any]) -> dict[str, float]:
    """Those of the model-index, by their names."""
    metrics = [metric for found in data["model-index"][0]["results"] for metric in found["metrics"]]
    return {metric["name"]: metric["value"] for metric in metrics}


def test_activations_are_found_by_their_base_model_and_loaded_by_the_cards_lines(hub, tmp_path: Path):
    activation_set(tmp_path / "activations")
    write_activations_card(tmp_path / "activations", "writer/activations")
    data, made = pushed(hub, tmp_path / "activations", "writer/activations", tmp_path / "home", "dataset")
    assert made == {"store": "ActivationStore"}
    assert data["base_model"] == ["big/base"] and data["datasets"] == ["FinQA"] and "activations" in data["tags"]
    text = hub.read("datasets/writer/activations", "README.md").decode()
    assert "| 17 | mlp | FinQA test | 40 | 2,000 | 0 |" in text


@pytest.mark.parametrize("method", ["batchtopk", "difference-sae"])
def test_a_crosscoders_card_has_the_figures_of_its_report(hub, tmp_path: Path, method):
    store, folder = activation_set(tmp_path / "activations"), tmp_path / "crosscoder"
    model = new_dictionary(CrosscoderConfig(D_MODEL, 12, 3, method=method))
    model.activation_scales = store.config.activation_scales[: model.config.n_inputs]
    model.threshold = 0.5
    save_dictionary(model, folder, training={**vars(TrainingConfig(epochs=4))}, activations=RECORDED)
    report = crosscoder_report(model, store, store.split(0.1, 0), [])
    write_crosscoder_card(folder, report, "writer/crosscoder")
    data, made = pushed(hub, folder, "writer/crosscoder", tmp_path / "home")
    assert made == {"crosscoder": type(model).__name__, "values": "Tensor"}
    assert data["base_model"] == ["big/base"] and data["library_name"] == "finqa-model-diff"
    assert data["metrics"] == ["explained_variance", "l0"]
    assert ("crosscoder" in data["tags"]) == (method == "batchtopk") and method in data["tags"]
    said, held_out = figures(data), report.held_out
    assert said["explained variance, difference"] == pytest.approx(held_out.difference, abs=1e-4)
    assert said["active latents a token"] == pytest.approx(held_out.l0, abs=1e-4)
    assert ("explained variance, instruct" in said) == (method == "batchtopk")


def test_an_adapters_card_has_the_accuracies_of_these_weights_and_of_no_others(
    hub, data_folder, tiny_student, tmp_path
):
    run = students.StudentRun("FinQA-mini", str(tiny_student), students.settings_for(str(tiny_student)))
    folders = Folders(data=tmp_path, results=tmp_path / "results")
    folder = folders.model(run.dataset, run.model_id)
    shutil.copytree(Folders(data=data_folder).model(run.dataset, run.model_id), folder)
    trained = {"rows": 12, "config": {"seed": 3}, "base_hash": "b" * 64, "weights_hash": "w" * 64, "train_loss": 0.25}
    (folder / "run.json").write_text(json.dumps(trained))
    write_student_card(run, folder, folders, "writer/adapter")
    assert "It has not been evaluated yet." in (folder / "README.md").read_text()
    for split, eval_type, hashes, accuracy in (
        ("dev", "fine-tuned", {"student_hash": "other"}, 0.1),
        ("test", "fine-tuned", {"student_hash": "w" * 64}, 0.75),
        ("test", "zero-shot", {"student_hash": None, "base_hash": "b" * 64}, 0.5),
    ):
        where = folders.evaluation(run.dataset, run.model_id, split, eval_type)
        where.mkdir(parents=True)
        (where / "run.json").write_text(json.dumps(hashes))
        metrics = {"n": 800, "accuracy": accuracy, "accuracy_interval": [accuracy - 0.03, accuracy + 0.03]}
        (where / "metrics.json").write_text(json.dumps(metrics))
    write_student_card(run, folder, folders, "writer/adapter")
    data, made = pushed(hub, folder, "writer/adapter", tmp_path / "home")
    assert made == {"model": "PeftModelForCausalLM"}
    assert "base_model" not in data, "a folder is no model of the Hub"
    assert (data["library_name"], data["metrics"], data["tags"][0]) == ("peft", ["accuracy"], "lora")
    assert figures(data) == {"accuracy, strict rule": 0.75}
    text = hub.read("writer/adapter", "README.md").decode()
    assert "| test | this model | 800 | 0.750 | 0.720 to 0.780 |" in text
    assert "| test | the base model, zero-shot | 800 | 0.500 | 0.470 to 0.530 |" in text and "| dev |" not in text


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("pocket-mistral", {"license": "mit"}),
        ("/a/folder/here", {}),
        (
            "big/base",
            {
                **{"base_model": ["big/base"], "base_model_relation": "adapter", "license": "other"},
                **{"license_name": "license-of-the-base-model", "license_link": "https://huggingface.co/big/base"},
            },
        ),
    ],
)
def test_the_base_and_its_licence_are_named_where_others_can_find_them(base: str, wanted: dict[str, Any]):
    found = yaml.safe_load(metadata("name", [base], "peft", ["lora"], "adapter").split("---\n")[1])
    assert found == {"library_name": "peft", "tags": ["lora"], **wanted}


def test_a_pair_of_ones_own_names_both_models_and_no_data_set(tmp_path: Path):
    activation_set(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["recorded"] = {"model": "big/base", "dataset": "mine", "pair": {"models": {"fine_tuned": "big/tuned"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_activations_card(tmp_path, None)
    text = (tmp_path / "README.md").read_text()
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["base_model"] == ["big/base", "big/tuned"] and "datasets" not in found
    assert "`big/base` and `big/tuned`" in text and f'"HF_NAME/{tmp_path.name}"' in text
