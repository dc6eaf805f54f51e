"""The plain recipe against the project's on pocket-mistral: whole loss curves, and what comes out of them.

    python -m study.planted.bench_recipes [--seeds 3 4] [--rows 2000] [--data-dir D] [--results-dir R]

For each seed both train the same adapter on the same rows of FinQA-mini in the same batches: main.py as it is, and the
transformers Trainer as anyone would write it (padded batches with a mask, PyTorch's own attention, the model's own loss
over every position). Then main.py evaluates both on all test rows. What is compared: the loss at every record of the
two logs, and the answers to the same questions (McNemar).

Reads D/clean_with_code/FinQA-mini/ (make demo, or the first three stages, write it). The students go to
D/models/FinQA-mini/, their evaluations to R: what is there is not done again, so a run that was killed goes on.
Writes benchmarks/results/recipes.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.evaluation.metrics import compare
from finqa.evaluation.predictions import read_predictions
from finqa.models.settings import settings_for
from finqa.models.students import StudentRun
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import REPOSITORY, Folders, add_folder_flags, write_atomically
from finqa.training.figure import running_mean
from finqa.training.fine_tuning import LOG_FILE, TrainingConfig

DATASET, STUDENT = "FinQA-mini", "pocket-mistral"
RECIPES = ("plain", "project")
COLOURS = {"plain": "tab:orange", "project": "tab:blue"}
LAST_SHARE = 0.1
"""Share of the updates, at the end, over which the final loss is averaged."""


def main() -> None:
    args = parse_arguments()
    folders = Folders.from_args(args)
    results: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        for recipe in RECIPES:
            results.setdefault(str(seed), {})[recipe] = measure(recipe, seed, args, folders)
        if len(results[str(seed)]) == len(RECIPES):
            results[str(seed)]["pair"] = pair(seed, args.rows, folders)
        table = report(results, args)  # after every seed: a run that is cut short has what was measured
    print(table)


def student(recipe: str, seed: int, rows: int) -> StudentRun:
    return StudentRun(DATASET, STUDENT, settings_for(STUDENT), run_name=f"{recipe}-{rows}-rows-seed{seed}")


def measure(recipe: str, seed: int, args: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Train and evaluate a student where that is still to be done; its curve and its accuracy."""
    run = student(recipe, seed, args.rows)
    folder = folders.model(DATASET, run.model_id)
    if recipe == "project":
        main_py(run, args, "--seed", seed, "--max-rows", args.rows, "--no-eval")
    elif not (folder / "run.json").exists():
        train_plainly(run, TrainingConfig(seed=seed, max_rows=args.rows), folders)
    main_py(run, args, "--no-train", "-T", *(["--VLLM"] if find_spec("vllm") else []), *limit(args))
    log = read_log(folder)
    found = json.loads((evaluation(run, folders) / "metrics.json").read_text())
    measured = {
        "updates": log[-1]["step"],
        "training_s": log[-1]["seconds"],
        "loss_at_the_end": round(last_loss(log), 5),
        **{key: found[key] for key in ("n", "accuracy", "accuracy_interval", "accuracy_by_family_kind")},
        "log": [{key: record[key] for key in ("step", "loss", "grad_norm", "tokens_seen")} for record in log],
    }
    print(f"seed {seed}, {recipe}: {measured['training_s']:.0f} s, accuracy {measured['accuracy']:.1%}", flush=True)
    return measured


def main_py(run: StudentRun, args: argparse.Namespace, *flags: object) -> None:
    words = [DATASET, STUDENT, "-P", "--no-push", "--run-name", run.run_name, *flags]
    words += ["--data-dir", args.data_dir, "--results-dir", args.results_dir]
    command = [sys.executable, str(REPOSITORY / "main.py"), *map(str, words)]
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        raise UserError(f"failed: {' '.join(command)}")


def limit(args: argparse.Namespace) -> list[object]:
    return ["--limit", args.test_rows] if args.test_rows else []


def train_plainly(run: StudentRun, config: TrainingConfig, folders: Folders) -> None:
    """Train a student by the plain recipe, and keep it as main.py keeps one; run.json last, which makes it whole."""
    import torch
    from transformers import PrinterCallback

    from benchmarks.bench_lora import plain_trainer
    from finqa.models.students import default_device, load_base, load_tokenizer, resolve_model
    from finqa.models.weights import weights_hash
    from finqa.runtime.manifest import write_manifest
    from finqa.runtime.parallel import multiplies_bf16
    from finqa.training.completion_trainer import TrainingLog
    from finqa.training.rows import read_training_rows, tokenised

    folder, device = folders.model(run.dataset, run.model_id), default_device()
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_training_rows(folders.filtered(run.dataset, "train"), config.families, config.max_rows)
    tokenizer: Any = load_tokenizer(run.model)
    examples, _ = tokenised(rows, tokenizer, run.settings.max_seq_length, folders.tokenised)
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    base = load_base(run.model, dtype, device)
    trainer = plain_trainer(run, config, examples, folder, base, device, tokenizer.pad_token_id)
    trainer.remove_callback(PrinterCallback)
    trainer.args.save_strategy = "no"
    trainer.add_callback(TrainingLog(folder / LOG_FILE, trainer))
    trainer.train()
    model: Any = trainer.model
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    write_manifest(
        folder / "run.json",
        {"recipe": "plain", "student": asdict(run), "training": asdict(config)},
        base_hash=weights_hash(resolve_model(run.model)),
        attention=base.config._attn_implementation,
        rows=len(examples),
    )


def pair(seed: int, rows: int, folders: Folders) -> dict[str, Any]:
    """The two curves record by record, and the two students question by question."""
    plain, project = (read_log(folders.model(DATASET, student(r, seed, rows).model_id)) for r in RECIPES)
    if [(r["step"], r["tokens_seen"]) for r in plain] != [(r["step"], r["tokens_seen"]) for r in project]:
        raise UserError(f"seed {seed}: the two recipes did not see the same rows in the same updates")
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(plain, project, strict=True)]
    ours, theirs = (read_predictions(evaluation(student(r, seed, rows), folders)) for r in RECIPES)
    n, only_plain, only_project, p = compare(ours, theirs)
    return {
        "records": len(apart),
        "first_loss_apart": round(apart[0], 6),
        "mean_loss_apart": round(fmean(apart), 6),
        "largest_loss_apart": round(max(apart), 6),
        "questions": n,
        "only_plain_right": only_plain,
        "only_project_right": only_project,
        "p": p,
    }


def report(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    settings = {"student": STUDENT, "rows": args.rows, "seeds": args.seeds, "settings": asdict(settings_for(STUDENT))}
    write_atomically(args.output_dir / "recipes.png", figure(results, args.rows))
    table = tables(results, args.rows)
    write_record("recipes", {**settings, "by_seed": results}, table, args.output_dir)
    return table


def tables(results: dict[str, dict[str, Any]], rows: int) -> str:
    students, pairs = [], []
    for seed, of_seed in results.items():
        for recipe in RECIPES:
            r = of_seed[recipe]
            low, high = r["accuracy_interval"]
            students.append(
                (
                    f"seed {seed}, {recipe}", r["updates"], f"{r['training_s']:.0f}", f"{r['loss_at_the_end']:.4f}",
                    r["n"], f"{r['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
                )
            )  # fmt: skip
        p = of_seed["pair"]
        apart = [f"{p[f'{which}_loss_apart']:.4f}" for which in ("first", "mean", "largest")]
        pairs.append(
            (f"seed {seed}", p["records"], *apart, p["only_plain_right"], p["only_project_right"], f"{p['p']:.2g}")
        )
    head = (
        "student",
        "updates",
        "training, s",
        "loss of the last tenth",
        "questions",
        "accuracy (strict), 95% interval",
    )
    second = (
        "pair", "records", "first record apart", "mean apart", "most apart", "only plain right", "only project right",
        "McNemar p",
    )  # fmt: skip
    return (
        f"{STUDENT}, {rows:,} rows of FinQA-mini, one epoch, the same batches in the same order; the recipes one after "
        "the other on one machine.\n\n"
        f"{markdown_table(head, students)}\n\n"
        "A record is the mean loss (nats a token) of the ten updates before it; apart is the absolute difference of "
        f"two records.\n\n{markdown_table(second, pairs)}\n\n![loss curves](recipes.png)"
    )


def figure(results: dict[str, dict[str, Any]], rows: int) -> bytes:
    """PNG: the losses of both recipes, and below how far apart they are, a line a seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 5), layout="constrained")
    drawing.suptitle(f"{STUDENT}, {rows:,} rows of FinQA-mini", fontsize=10)
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    styles = ("-", "--", ":", "-.")
    for number, (seed, of_seed) in enumerate(results.items()):
        style = styles[number % len(styles)]
        steps = [record["step"] for record in of_seed["project"]["log"]]
        losses = {recipe: [record["loss"] for record in of_seed[recipe]["log"]] for recipe in RECIPES}
        for recipe in RECIPES:
            upper.plot(
                steps, losses[recipe], style, color=COLOURS[recipe], linewidth=1.2, label=f"{recipe}, seed {seed}"
            )
        apart = [a - b for a, b in zip(losses["plain"], losses["project"], strict=True)]
        lower.plot(steps, apart, style, color="0.6", linewidth=0.9)
        lower.plot(steps, running_mean(apart), style, color="black", linewidth=1.3, label=f"running mean, seed {seed}")
    upper.set_yscale("log")
    upper.set_ylabel("loss, nats a token")
    lower.set_ylabel("plain - project")
    lower.set_xlabel("updates")
    for axis in (upper, lower):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    drawn = BytesIO()
    drawing.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()


def evaluation(run: StudentRun, folders: Folders) -> Path:
    return folders.evaluation(DATASET, run.model_id, "test", "fine-tuned")


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def last_loss(log: list[dict[str, Any]]) -> float:
    return fmean(record["loss"] for record in log[-max(1, round(LAST_SHARE * len(log))) :])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folder_flags(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="default: 3")
    parser.add_argument("--rows", type=int, default=5000, help="training rows (default: %(default)s, all)")
    parser.add_argument("--test-rows", type=int, help="evaluate on the first so many (default: all)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
