"""Fine-tune a student to write Python for financial questions, or evaluate it.

    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME -P              # fine-tune with LoRA
    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME -P -NT -D --VLLM   # evaluate on dev
        ... -T                          on test (both: -D -T)
        ... --EVAL_TYPE zero-shot       the base model; also few-shot, or all three with: all
        ... --samples 8                 eight replies to each question and the answer most of them give
    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME -P --preset published -D -T --VLLM -ET all
    python main.py FinQA-mini pocket-mistral -P -T --VLLM -ET all --no-push              # the embedded default
    torchrun --nproc-per-node 2 main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME -P   # on two GPUs

Reads D/clean_with_code/<dataset>/: the filtered training rows, and for evaluation every row that has a label.
Writes D/models/<dataset>/<model-id>/ (adapter, tokenizer, training_log.jsonl with its figure training.png and .svg,
checkpoints, run.json) and R/<dataset>/<model-id>/<dev or test>/<eval type>/ (metrics.json, predictions.jsonl,
run.json), with metrics.md and a figure that compare the eval types; with --samples N the folder is
<eval type>-N-samples/, beside the greedy results. D is --data-dir, R is --results-dir.

A killed run goes on when the same command is given again: training from its last checkpoint, evaluation with the rows
that have no reply yet. What changes training and is no part of <model-id> (rank, learning rate, families, ...) needs a
--run-name of its own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finqa.evaluation.adapter_check import check_adapter, engine_reading
from finqa.evaluation.engines.serving import check_backend
from finqa.evaluation.evaluate import EvaluationConfig, evaluate
from finqa.evaluation.generation import DEFAULT_TEMPERATURE, GenerationConfig
from finqa.evaluation.rows import read_rows
from finqa.models import hub
from finqa.models.model_card import write_student_card
from finqa.models.settings import StudentSettings, published_settings
from finqa.models.students import DEFAULT_MODEL, StudentRun, add_student_flags, is_student, student_from_args
from finqa.runtime import parallel
from finqa.runtime.command_line import add_flags, flag, from_args, given, script_parser
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import Folders, add_folder_flags, check_writable
from finqa.runtime.progress import say
from finqa.task import datasets
from finqa.task.prompts import EVAL_TYPES, EvalType
from finqa.training.fine_tuning import TrainingConfig, fine_tune


def main() -> int:
    args = parse_arguments()
    task, run, folders = from_args(Task, args), student(args), Folders.from_args(args)
    if not task.train and vars(args)["StudentRun.peft"] is None:
        run = as_trained(run, folders)
    training, evaluation = from_args(TrainingConfig, args), evaluation_config(args, run)
    with parallel.first_goes_first():
        check(task, run, folders, evaluation)

    if task.train:
        folder = fine_tune(run, training, folders)
        if not parallel.is_first():
            return 0
        pushed = write_card_and_push(task, run, folder, folders)
        if evaluation:
            # From the start again: the engine finds the memory and the threads that training held.
            then = ["--no-train", "--check-adapter", *(["--push"] if pushed else [])]
            parallel.go_on_alone([sys.executable, __file__, *sys.argv[1:], *then])
    elif evaluation and parallel.is_first():
        if task.check_adapter:
            evaluate_and_check(run, evaluation, folders)
        else:
            evaluate(run, evaluation, folders)
        folder = folders.model(run.dataset, run.model_id)
        if (folder / "run.json").exists():
            # With the accuracies; only what was trained here has a card, and only --push sends it once more.
            write_card_and_push(replace(task, push=task.push or False), run, folder, folders)
        say(f"all evaluations side by side: {folders.results / run.dataset / run.model_id / 'metrics.md'}")
    return 0


def write_card_and_push(task: Task, run: StudentRun, folder: Path, folders: Folders) -> str | None:
    """Write the model card, and push the folder where that is wished; the address, None where nothing was pushed."""
    repository = None if task.push is False else run.hub_id
    write_student_card(run, folder, folders, repository)
    return hub.push_folder(folder, repository, task.push, task.private)


def evaluate_and_check(run: StudentRun, evaluation: EvaluationConfig, folders: Folders) -> None:
    """Evaluate, then check the adapter; the engine that evaluated is asked about it where it can say something."""
    readings = []
    evaluate(run, evaluation, folders, lambda served: readings.append(engine_reading(run, evaluation, folders, served)))
    check_adapter(run, evaluation, folders, readings[0] if readings else None)


@dataclass(frozen=True)
class Task:
    """What to do, beside the configurations of each part."""

    train: bool = flag(True, "-NT", "--NO-TRAIN", "--no-train", help="Evaluate only")
    evaluate: bool = flag(True, "-NE", "--NO-EVAL", "--no-eval", help="Fine-tune only")
    dev: bool = flag(False, "-D", "--DEV_SET", "--dev-set", help="Evaluate on dev")
    test: bool = flag(False, "-T", "--TEST_SET", "--test-set", help="Evaluate on test")
    preset: Literal["published"] | None = flag(None)
    """`published`: the settings of the published run, whatever the model; flags that are given beside it win."""
    eval_type: str = flag("fine-tuned", "-ET", "--EVAL_TYPE", "--eval-type", group="evaluation", metavar="TYPE")
    """fine-tuned, zero-shot, few-shot, several with a comma, or all."""
    check_adapter: bool = flag(False, group="evaluation")
    """Hold base, adapter, merged model and vLLM against each other after evaluating (done by itself where training
    comes first)."""
    push: bool | None = flag(None, group="Hub", both_ways=True, shown="where a token and HF_NAME are there")
    """Push the adapter to the Hub; with --push a failure is an error, and an evaluation's accuracies go there too."""
    private: bool = flag(False, group="Hub", help="Make the repository private")


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_student_flags(parser, peft_default=False)
    add_folder_flags(parser)
    add_flags(parser.add_argument_group("what to do"), Task, group="")
    train = parser.add_argument_group(f"fine-tuning (defaults are those of {DEFAULT_MODEL})")
    add_flags(train, StudentSettings, group="training")
    add_flags(train, TrainingConfig)
    evaluation = parser.add_argument_group("evaluation")
    add_flags(evaluation, Task, group="evaluation")
    for kind in (StudentSettings, EvaluationConfig, GenerationConfig):
        add_flags(evaluation, kind, group="evaluation" if kind is StudentSettings else None)
    add_flags(parser.add_argument_group("Hub"), Task, group="Hub")
    return parser.parse_args()


def student(args: argparse.Namespace) -> StudentRun:
    """The student with the preset, and over it the flags that change its settings, applied."""
    run = student_from_args(args)
    return student_from_args(args, published_settings(run.model)) if from_args(Task, args).preset else run


def as_trained(run: StudentRun, folders: Folders) -> StudentRun:
    """The adapter in the place of a whole fine-tuned model that nobody trained, where an adapter is what was."""
    adapted = replace(run, peft=True)
    whole, adapter = (folders.model(run.dataset, one.model_id) for one in (run, adapted))
    if is_student(whole) or not is_student(adapter):
        return run
    print(f"the fine-tuned model is the adapter in {adapter} (as with -P)", flush=True)
    return adapted


def evaluation_config(args: argparse.Namespace, run: StudentRun) -> EvaluationConfig | None:
    """What to evaluate; None for nothing. Raises UserError for an unknown eval type."""
    task = from_args(Task, args)
    named = EVAL_TYPES if task.eval_type == "all" else task.eval_type.split(",")
    if unknown := [name for name in named if name not in EVAL_TYPES]:
        raise UserError(f"unknown eval type {unknown[0]!r}; one of {', '.join(EVAL_TYPES)}, all")
    types: tuple[EvalType, ...] = tuple(eval_type for eval_type in EVAL_TYPES if eval_type in named)
    splits = tuple(split for split, chosen in (("dev", task.dev), ("test", task.test)) if chosen)
    if not task.evaluate or not splits:
        return None
    asked = given(GenerationConfig, args)
    several = asked.get("samples", 1) > 1
    generation = GenerationConfig(
        **{"vllm": False, "temperature": DEFAULT_TEMPERATURE if several else 0.0} | asked,
        max_new_tokens=run.settings.max_new_tokens,
        batch_size=run.settings.eval_batch_size,
        seed=from_args(TrainingConfig, args).seed,
    )
    return from_args(EvaluationConfig, args, splits=splits, eval_types=types, generation=generation)


def check(task: Task, run: StudentRun, folders: Folders, evaluation: EvaluationConfig | None) -> None:
    """Fail now on what would fail after hours of training."""
    data = datasets.dataset(run.dataset)
    if task.train:
        check_writable(folders.model(run.dataset, run.model_id))
        datasets.rows_file("filtered", data, "train", folders)
    if not task.train and not evaluation:
        raise UserError("nothing to do: no training (-NT) and no split to evaluate on; give -D, -T or both")
    if evaluation:
        check_backend(run, evaluation.generation.vllm)
        check_writable(folders.results / run.dataset / run.model_id)
        for split in evaluation.splits:
            read_rows(folders, data, split)
    if task.push and (missing := hub.why_no_push(run.hub_id)):
        raise UserError(f"--push is not possible: {missing}")


if __name__ == "__main__":
    sys.exit(report_errors(main))
