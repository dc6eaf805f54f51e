"""Cards of an activation set and of a dictionary for the Hub, from what lies in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.models.model_card import loading, metadata, on_the_hub, result, shown, table
from finqa.runtime.paths import write_atomically

if TYPE_CHECKING:
    from crosscoder.training.report import CrosscoderReport

LIBRARY = "finqa-model-diff"
TAGS = ("model-diffing", "mechanistic-interpretability")
READS = "Activations are [token, 2, d_model], raw: index 0 of the base model, 1 of the fine-tuned one."


def write_activations_card(folder: Path, repository: str | None) -> None:
    """README.md of an activation set, from its config.json. `repository`: where it goes; None where not known."""
    config = json.loads((folder / "config.json").read_text())
    recorded = config["recorded"]
    facts = {
        **_place(recorded),
        "documents": recorded.get("num_samples", "not known"),
        "tokens": f"{config['n_tokens']:,}",
        "left out as outliers": config.get("n_dropped", 0),
        "width": config["d_model"],
        "number format": recorded.get("dtype", "not known"),
    }
    load = loading(
        "from crosscoder.activations.store import ActivationStore",
        "from finqa.models.hub import fetch_folder",
        f"store = ActivationStore(fetch_folder({_where(folder, repository)}, kind='dataset'))",
    )
    head = metadata(
        folder.name, _models(recorded), LIBRARY, ["activations", *TAGS], dataset=_dataset(recorded), viewer=False
    )
    what = "Activations of a base model and its fine-tuned form over the same tokens"
    text = f"# {folder.name}\n\n{what}: {_pair(recorded)}.\n\n{table(facts)}\n\n{load}\n\n{READS}\n"
    write_atomically(folder / "README.md", f"{head}\n{text}")


def write_crosscoder_card(folder: Path, report: CrosscoderReport, repository: str | None) -> None:
    """README.md of a dictionary, from its config.json and what was found on held-out documents."""
    config = json.loads((folder / "config.json").read_text())
    shape, recorded, held_out = config["crosscoder"], config.get("activations", {}), report.held_out
    training = config.get("training") or {}
    facts = {
        "method": shape["method"],
        "latents": f"{shape['n_latents']:,}",
        "k": shape["k"] + shape["k_delta"],
        "passes over the data": 0 if training.get("untrained") else training.get("epochs", "not known"),
        **_place(recorded),
    }
    explained = {f"explained variance, {part}": value for part, value in held_out.parts.items()}
    figures = {**explained, "active latents a token": held_out.l0, "dead latents": report.dead_share}
    data, split = str(recorded.get("dataset", "own")), str(recorded.get("split", ""))
    results = [result(data, split, "explained_variance", value, name) for name, value in explained.items()]
    results.append(result(data, split, "l0", held_out.l0, "active latents a token"))
    load = loading(
        "from crosscoder.dictionaries.checkpoint import load_dictionary",
        f"crosscoder = load_dictionary({_where(folder, repository)})",
        "values = crosscoder.encode(crosscoder.scale(activations))",
    )
    kind = "crosscoder" if shape["method"] not in ("difference-sae", "stagewise-sae") else shape["method"]
    tags = [*dict.fromkeys([kind, shape["method"], *TAGS, "sparse-autoencoder"])]
    head = metadata(folder.name, _models(recorded), LIBRARY, tags, dataset=_dataset(recorded), results=results)
    sections = [
        f"# {folder.name}",
        f"What fine-tuning changed, as a dictionary of the activations of two models: {_pair(recorded)}.",
        table(facts),
        f"On {report.n_held_out_documents} held-out documents:",
        table({name: f"{value:.4g}" for name, value in figures.items()}),
        f"Latents by whose decoder vector is the longer one:\n\n{table(report.classes)}" if report.classes else "",
        load,
        READS,
    ]
    write_atomically(folder / "README.md", head + "\n" + "\n\n".join(filter(None, sections)) + "\n")


def _where(folder: Path, repository: str | None) -> str:
    return json.dumps(repository or f"HF_NAME/{folder.name}")


def _models(recorded: Mapping[str, Any]) -> list[str]:
    """The base model, and the fine-tuned one where that is named as one of the Hub."""
    tuned = str(recorded.get("pair", {}).get("models", {}).get("fine_tuned", ""))
    return [str(recorded.get("model", "")), *([tuned] if on_the_hub(tuned) else [])]


def _pair(recorded: Mapping[str, Any]) -> str:
    tuned = recorded.get("pair", {}).get("models", {}).get("fine_tuned") or recorded.get("model_id", "not known")
    other = f", fine-tuned as {recorded['against'] or 'the unnamed run'}," if "against" in recorded else ""
    return f"`{shown(str(recorded.get('model', 'not known')))}`{other} and `{shown(str(tuned))}`"


def _dataset(recorded: Mapping[str, Any]) -> str:
    """The data set; texts of the user's own are none that others could find."""
    return "" if "pair" in recorded else str(recorded.get("dataset", ""))


def _place(recorded: Mapping[str, Any]) -> dict[str, Any]:
    data = f"{recorded.get('dataset', 'not known')} {recorded.get('split', '')}".strip()
    return {"layer": recorded.get("layer", "not known"), "site": recorded.get("site", "not known"), "data": data}
