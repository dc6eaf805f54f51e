"""The labels of a dictionary on disk: labels.json in the folder of its results, and two columns of latents.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crosscoder.analysis.tables import LatentRow, read_latent_table, write_csv
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_manifest

if TYPE_CHECKING:
    from crosscoder.label.naming import Named
    from crosscoder.opening import OpenedCrosscoder

FILE = "labels.json"
COLUMNS = ("label", "label_score")


def mean_score(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the detection scores of labels, and its 95% interval (a bootstrap over labels)."""
    import torch

    from crosscoder.interventions.causal_rows import INTERVAL, resamples

    table = torch.tensor(list(scores), dtype=torch.float64)
    low, high = (resamples(len(table)) @ table).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return float(table.mean()), low, high


def analysed_rows(opened: OpenedCrosscoder, analyse: str) -> list[LatentRow]:
    """The rows of latents.csv; UserError where there is none of this dictionary, with the command that makes it."""
    path, numbers = opened.results / "latents.csv", opened.results / "analysis.json"
    if not path.exists() or not numbers.exists():
        raise UserError(f"{path} is missing; make it with: {analyse}")
    if not opened.made(json.loads(numbers.read_text()).get("made_of", {})):
        raise UserError(
            f"{path} is of another dictionary than the one that is there now; make it again with: {analyse}"
        )
    return read_latent_table(path)


def label_table(opened: OpenedCrosscoder, named: Sequence[Named], config: Any, **facts: Any) -> None:
    """Write labels.json, a manifest that holds every latent that was asked about, and its labels into latents.csv.

    Both hold the labels of this run alone.
    """
    labels = [vars(each) for each in named]
    write_manifest(opened.results / FILE, config, **facts, **opened.made_of, labels=labels)
    path = opened.results / "latents.csv"
    with path.open(newline="") as file:
        rows = [{name: row[name] for name in row if name not in COLUMNS} for row in csv.DictReader(file)]
    kept = kept_labels(opened)
    write_csv(path, [row | kept.get(int(row["latent"]), {}) for row in rows], list(rows[0]))


def kept_labels(opened: OpenedCrosscoder) -> dict[int, dict[str, Any]]:
    """The columns of the latents that have a label; labels.json of another dictionary is deleted."""
    path = opened.results / FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    if not opened.made(found):
        path.unlink(missing_ok=True)
        return {}
    return {row["latent"]: {name: row[name] for name in COLUMNS} for row in found["labels"] if row["label"]}
