"""What a whole site carries, measured before any dictionary is trained; layer and site follow from it.

The rule. The published site, the MLP output of the layer at 17/32 of the depth, is read where putting the whole of its
fine-tuned activation into the base closes at least ENOUGH of the KL on programs of the added families. Else no set of
latents of that site could do more, and the residual stream is read, after the first layer, the last one left out, that
closes at least MOST of it (after the last but one where none does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from crosscoder.names import SITES, default_layer, model_depth
from finqa.models import students
from finqa.runtime.manifest import write_json
from finqa.task.records import TeacherRow, read_teacher_rows
from study.pocket.models import adapter
from study.pocket.pairs import site_name
from study.pocket.plan import DATASET, STUDENT, Model
from study.work import Work, read_json, step

if TYPE_CHECKING:
    from crosscoder.activations.collection import Document

ENOUGH, MOST = 0.2, 0.8
Row = dict[str, Any]


def published_target() -> Target:
    return Target(default_layer(model_depth(STUDENT)), "mlp")


def measure_ceilings(work: Work, model: Model) -> list[Row]:
    """Ceilings of base -> `model` at every layer and site: a row per direction and carrier."""
    path = results_path(work)
    if not path.exists():
        with step(f"ceilings: base -> {model.name}") as say:
            write_json(path, {"rows": _ceilings(work, model)})
            best = max(_sufficient(read_json(path)["rows"], "mlp").values())
            say(f"the best MLP output closes {best:.0%} of the KL")
    return read_json(path)["rows"]


def _ceilings(work: Work, model: Model) -> list[Row]:
    from study.site_ceilings import ceilings

    documents = added_documents(work, model, work.plan.ceiling_questions)
    targets = [Target(layer, site) for layer in range(1, model_depth(STUDENT) + 1) for site in SITES]
    found = ceilings(load_pair(work, model), None, documents, targets)
    return [{**asdict(c), "target": site_name(c.target), "layer": c.target.layer, "site": c.target.site} for c in found]


def load_pair(work: Work, model: Model) -> Any:
    """The base with a fine-tune's adapter, in fp32: a PeftModel, in eval mode."""
    import torch

    base = students.load_base(STUDENT, torch.float32)
    return students.load_adapter(base, adapter(work, model)).eval()


def added_documents(work: Work, model: Model, n: int) -> list[Document]:
    """Token ids of the first `n` test rows of the families that the model has learnt."""
    from crosscoder.activations.collection import documents_from_rows

    rows = [row for row in test_rows(work) if row.family_kind in model.added][:n]
    return documents_from_rows(rows, students.load_tokenizer(STUDENT))


def test_rows(work: Work) -> list[TeacherRow]:
    """The filtered test rows, in the order of every activation set's documents."""
    return read_teacher_rows(work.folders.filtered(DATASET, "test"))


def choose_site(rows: Sequence[Row]) -> tuple[Target, str]:
    """The site that is read, by the rule above, and a sentence that says why."""
    published = published_target()
    closed = _sufficient(rows, published.site)[published.layer]
    said = f"the MLP output of layer {published.layer} closes {closed:.0%} of the KL"
    if closed >= ENOUGH:
        return published, f"{said}, at least {ENOUGH:.0%}: the published site is read"
    residual = _sufficient(rows, "residual")
    candidates = sorted(residual)[:-1]
    layer = next((layer for layer in candidates if residual[layer] >= MOST), candidates[-1])
    return Target(layer, "residual"), (
        f"{said}, under {ENOUGH:.0%}: the residual stream after layer {layer} is read, which closes "
        f"{residual[layer]:.0%}"
    )


def _sufficient(rows: Sequence[Row], site: str) -> dict[int, float]:
    """Layer -> share of the KL that its site closes in the base model with its own layers above."""
    return {
        row["layer"]: row["divergence_closed"]
        for row in rows
        if (row["site"], row["direction"], row["carrier"]) == (site, "sufficiency", "own")
    }


def csv_rows(rows: Sequence[Row]) -> list[Row]:
    names = ("layer", "site", "direction", "carrier", "divergence_closed", "exact", "exact_recovered", "n")
    return [{name: row[name] for name in names} for row in rows]


def results_path(work: Work) -> Path:
    return work.folders.results / "ceilings.json"
