"""Measure pocket-mistral against its targets, and write its model card.

    python -m mini.measure_pocket_mistral               # the card
    python -m mini.measure_pocket_mistral --reference   # and docs/reference/finqa-mini/

Fine-tunes the base model (all families) and makes the sham fine-tune (known families alone) by main.py where that was
not done yet, and evaluates both on FinQA-mini's test split, zero-shot, few-shot and fine-tuned; and the base under the
fine-tuning prompt. Writes data/models/pocket-mistral/README.md and accuracy.json. Needs FinQA-mini's filtered rows
below --data-dir (make demo makes them). A measurement that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finqa.evaluation.engines.serving import served_models
from finqa.evaluation.generation import GenerationConfig, all_replies
from finqa.evaluation.judging import judge
from finqa.evaluation.metrics import metrics
from finqa.evaluation.rows import read_rows
from finqa.models.settings import settings_for
from finqa.models.students import StudentRun, load_tokenizer, prompt_ids
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.manifest import package_versions, write_json
from finqa.runtime.paths import REPOSITORY, SHIPPED_DATA, Folders, add_folder_flags, write_atomically
from finqa.sandbox.running import Sandbox
from finqa.task.datasets import dataset
from finqa.task.prompts import EvalType, messages
from mini.families import Kind, families
from mini.reference import Measured, write_reference

DATASET, STUDENT, SHAM = "FinQA-mini", "pocket-mistral", "sham"
CARD_FOLDER = SHIPPED_DATA / "models" / STUDENT
COLUMNS = {
    "fine-tuned": "base, fine-tuning prompt",
    "zero-shot": "base, zero-shot",
    "few-shot": "base, few-shot",
    "lora": "fine-tuned",
    "sham": "sham",
}


def student(run_name: str = "") -> StudentRun:
    return StudentRun(DATASET, STUDENT, settings_for(STUDENT), run_name=run_name)


def base_metrics(folders: Folders) -> dict[str, Any]:
    """metrics of the base model on test under the fine-tuning prompt: main.py gives that to fine-tuned models alone."""
    run, data = student(), dataset(DATASET)
    _, rows = read_rows(folders, data, "test")
    tokenizer = load_tokenizer(STUDENT)
    config = GenerationConfig(
        vllm=find_spec("vllm") is not None,
        max_new_tokens=run.settings.max_new_tokens,
        batch_size=run.settings.eval_batch_size,
    )
    ids = [prompt_ids(tokenizer, messages(r.prompt, "fine-tuned", data.worked_examples)) for r in rows]
    with Sandbox() as sandbox:
        for served in served_models(run, None, ["base"], config):
            predictions = judge(rows, ids, all_replies(served.generate, ids), sandbox)
    return metrics(predictions)


def results_of(folders: Folders, run_name: str, *flags: str) -> Path:
    """The results folder of a fine-tune, evaluated on test in every type; main.py does what is still to be done."""
    words = [DATASET, STUDENT, "-P", "-T", "-ET", "all", "--no-push", *flags]
    words += ["--VLLM"] if find_spec("vllm") else []
    words += ["--run-name", run_name] if run_name else []
    words += ["--data-dir", str(folders.data.resolve()), "--results-dir", str(folders.results.resolve())]
    if subprocess.run([sys.executable, "main.py", *words], cwd=REPOSITORY, check=False).returncode:
        raise UserError(f"failed: main.py {' '.join(words)}")
    return folders.results / DATASET / student(run_name).model_id


def metrics_of(results: Path, eval_type: EvalType) -> dict[str, Any]:
    return json.loads((results / "test" / eval_type / "metrics.json").read_text())


def accuracy_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Accuracy in per cent: overall, by kind of family, by family."""
    lines = [
        f"| | n | {' | '.join(COLUMNS.values())} |",
        f"| --- | --- |{' --- |' * len(COLUMNS)}",
    ]

    def row(name: str, n: int, shares: list[float]) -> str:
        return f"| {name} | {n} | {' | '.join(f'{share:.1%}' for share in shares)} |"

    reference = found["lora"]
    lines.append(row("**all**", reference["n"], [found[c]["accuracy"] for c in COLUMNS]))
    for kind, group in reference["by_family_kind"].items():
        lines.append(row(f"**{kind}**", group["n"], [found[c]["accuracy_by_family_kind"][kind] for c in COLUMNS]))
    for family in families("known", "new"):
        group = reference["by_family"][family.name]
        shares = [found[c]["accuracy_by_family"][family.name] for c in COLUMNS]
        lines.append(row(f"{family.name} ({family.kind})", group["n"], shares))
    return lines


def targets(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the model must be like for the diff to have a known answer, what was measured, and whether it holds."""

    def worst(column: str, kind: Kind, pick: Callable[[Iterable[float]], float]) -> float:
        return pick(found[column]["accuracy_by_family"][family.name] for family in families(kind))

    base_known = found["fine-tuned"]["accuracy_by_family_kind"]["known"]
    base_new = max(worst(column, "new", max) for column in ("fine-tuned", "zero-shot", "few-shot"))
    zero, few, tuned = (found[column]["accuracy"] for column in ("zero-shot", "few-shot", "lora"))
    tuned_new, sham_new = worst("lora", "new", min), worst("sham", "new", max)
    rows = [
        ("base, known families, fine-tuning prompt: at least 90%", base_known, base_known >= 0.9),
        ("base, each new family, any prompt: at most 5%", base_new, base_new <= 0.05),
        ("zero-shot, all: 30% to 65%", zero, 0.3 <= zero <= 0.65),
        ("few-shot, all: at most 10 points under zero-shot", few, few >= zero - 0.1),
        ("fine-tuned, all: at least 85%", tuned, tuned >= 0.85),
        ("fine-tuned, each new family: at least 60%", tuned_new, tuned_new >= 0.6),
        ("sham, each new family: at most 5%", sham_new, sham_new <= 0.05),
    ]
    return [
        "| target | measured | holds |",
        "| --- | --- | --- |",
        *(f"| {target} | {share:.1%} | {'yes' if holds else '**no**'} |" for target, share, holds in rows),
    ]


def card(found: dict[str, dict[str, Any]]) -> str:
    pretraining = json.loads((CARD_FOLDER / "pretraining.json").read_text())
    settings = student().settings
    low, high = found["lora"]["accuracy_interval"]
    return "\n".join(
        [
            "---",
            "license: mit",
            "---",
            "",
            "# pocket-mistral",
            "",
            "A Mistral of 4.2 million parameters (hidden size 256, 5 layers, 8 heads with 4 key/value heads, 1,024",
            "tokens, tied embeddings) that writes Python programs for FinQA-mini's *known* families. The *new*",
            "families are held out of its pretraining, and of its tokenizer's, wholly: what it can do on them after",
            "fine-tuning is what fine-tuning added. It knows nothing else and is of no use for anything else.",
            "",
            "Made by `python -m mini.pretrain_pocket_mistral` (settings in pretraining.json, loss in",
            f"pretraining_log.jsonl): {pretraining['chats']:,} synthetic chats, {pretraining['steps']:,} updates of "
            f"{pretraining['batch_size']}",
            "chats, under the fine-tuning, zero-shot and few-shot prompts. No question of FinQA-mini is among them.",
            "",
            "## Targets",
            "",
            *targets(found),
            "",
            "## Accuracy on FinQA-mini test (strict rule, greedy)",
            "",
            *accuracy_table(found),
            "",
            f"Fine-tuned overall: 95% interval {low:.1%} to {high:.1%} (Wilson). LoRA r {settings.lora_r}, learning",
            f"rate {settings.learning_rate:g}, batch {settings.batch_size}, {settings.num_epochs} epoch of 5,000",
            "questions; the sham fine-tune (`--families known`) has as many rows, of known families alone. One",
            "fine-tuning seed each. Made by `python -m mini.measure_pocket_mistral`.",
            "",
        ]
    )


def main() -> None:
    args = parse_arguments()
    folders = Folders.from_args(args)
    tuned, sham = results_of(folders, ""), results_of(folders, SHAM, "--families", "known")
    found = {
        "lora": metrics_of(tuned, "fine-tuned"),
        "sham": metrics_of(sham, "fine-tuned"),
        "zero-shot": metrics_of(tuned, "zero-shot"),
        "few-shot": metrics_of(tuned, "few-shot"),
        "fine-tuned": base_metrics(folders),
    }
    kept = ("n", "accuracy", "accuracy_interval", "accuracy_by_family_kind", "accuracy_by_family")
    write_json(
        CARD_FOLDER / "accuracy.json",
        {"versions": package_versions(), **{c: {k: found[c][k] for k in kept} for c in COLUMNS}},
    )
    write_atomically(CARD_FOLDER / "README.md", card(found))
    print("\n".join([*targets(found), "", *accuracy_table(found)]))
    print(f"written: {CARD_FOLDER / 'README.md'}")
    if args.reference:
        models = [folders.model(DATASET, student(run_name).model_id) for run_name in ("", SHAM)]
        students = {"fine-tuned": Measured(tuned, models[0]), SHAM: Measured(sham, models[1])}
        print(f"written: {write_reference(students)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folder_flags(parser)
    parser.add_argument("--reference", action="store_true", help="write docs/reference/finqa-mini/ as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
