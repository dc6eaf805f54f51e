"""Fine-tune a student to write Python for financial questions, or evaluate it.

    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> -P              # fine-tune with LoRA
    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> -P -NT -D --VLLM   # evaluate on dev
        ... -T                          on test (both: -D -T)
        ... --EVAL_TYPE zero-shot       the base model; also few-shot, or all three with: all
        ... --samples 8                 eight replies to each question and the answer most of them give
    python main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> -P --preset published -D -T --VLLM -ET all
    python main.py FinQA-mini pocket-mistral -P -T --VLLM -ET all --no-push              # the embedded default
    torchrun --nproc-per-node 2 main.py FinQA mistralai/Mistral-7B-Instruct-v0.3 <HF_NAME> -P   # on two GPUs

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
from dataclasses import replace

from finqa.evaluation.adapter_check import check_adapter, engine_reading
from finqa.evaluation.engines.serving import check_backend
from finqa.evaluation.evaluate import EvaluationConfig, evaluate
from finqa.evaluation.generation import DEFAULT_TEMPERATURE, GenerationConfig
from finqa.evaluation.rows import read_rows
from finqa.models import hub
from finqa.models.model_card import write_student_card
from finqa.models.presets import PRESETS, with_preset
from finqa.models.students import StudentRun, add_student_flags, student_from_args
from finqa.runtime import parallel
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import Folders, add_folder_flags
from finqa.runtime.memory.plan import plan_evaluation
from finqa.task import datasets
from finqa.task.prompts import EVAL_TYPES, EvalType
from finqa.training.fine_tuning import TrainingConfig, fine_tune
from finqa.training.rows import FAMILIES
from finqa.training.trainable import Speed


def main() -> int:
    args = parse_arguments()
    run, folders = student(args), Folders.from_args(args)
    training, evaluation = training_config(args), evaluation_config(args, run)
    with parallel.first_goes_first():
        check(args, run, folders, evaluation)

    if args.train:
        folder = fine_tune(run, training, folders)
        if not parallel.is_first():
            return 0
        write_student_card(run, folder)
        hub.push_folder(folder, None if args.push is False else run.hub_id, args.push, args.private)
        if evaluation:
            # From the start again: the engine finds the memory and the threads that training held.
            parallel.go_on_alone([sys.executable, __file__, *sys.argv[1:], "--no-train", "--check-adapter"])
    elif evaluation and parallel.is_first():
        if not args.vllm:
            plan_evaluation(run, evaluation.generation)
        if args.check_adapter:
            evaluate_and_check(run, evaluation, folders)
        else:
            evaluate(run, evaluation, folders)
    return 0


def evaluate_and_check(run: StudentRun, evaluation: EvaluationConfig, folders: Folders) -> None:
    """Evaluate, then check the adapter; the engine that evaluated is asked about it where it can say something."""
    readings = []
    evaluate(run, evaluation, folders, lambda served: readings.append(engine_reading(run, evaluation, folders, served)))
    check_adapter(run, evaluation, folders, readings[0] if readings else None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_student_flags(parser, peft_default=False)
    add_folder_flags(parser)

    what = parser.add_argument_group("what to do")
    add = what.add_argument
    add("-NT", "--NO-TRAIN", "--no-train", dest="train", action="store_false", help="evaluate only")
    add("-NE", "--NO-EVAL", "--no-eval", dest="evaluate", action="store_false", help="fine-tune only")
    add("-D", "--DEV_SET", "--dev-set", dest="dev", action="store_true", help="evaluate on dev")
    add("-T", "--TEST_SET", "--test-set", dest="test", action="store_true", help="evaluate on test")
    add("--preset", choices=PRESETS, help="published: the settings of the published run, whatever the model; flags "
        "that are given beside it win")  # fmt: skip
    add("-S", "--SEED", "--seed", dest="seed", type=int, default=TrainingConfig.seed, help="default: %(default)s")

    train = parser.add_argument_group("fine-tuning (defaults: the student's settings)")
    add = train.add_argument
    add(
        "-MSL", "--MAX_SEQ_LENGTH", "--max-seq-length", dest="max_seq_length", type=int, help="longer rows are left out"
    )
    add("--learning-rate", type=float)
    add("--lr-scheduler", help="name of a transformers scheduler")
    add("--warmup-steps", type=int)
    add("--weight-decay", type=float)
    add("--optim", help="name of a transformers optimiser")
    add("--lora-r", type=int)
    add("--lora-alpha", type=int)
    add("--lora-dropout", type=float)
    add("--families", choices=FAMILIES, default="all", help="known: the sham fine-tune (data sets that have families)")
    add("--max-rows", type=int, help="train on the first so many rows")
    add("--save-steps", type=int, help="updates between checkpoints (default: ten checkpoints a run)")
    add("--gradient-checkpointing", choices=CHECKPOINTING, default="auto",
        help="compute activations twice to save memory (auto: where they would not fit)")  # fmt: skip
    add("--fp8-base", action="store_true", help="the frozen base in 8-bit floats: faster on recent GPUs")
    add("--no-compile", action="store_true", help="do not compile the decoder layers (GPU)")
    add("--no-packing", action="store_true", help="pad the rows of a batch in place of packing them (GPU)")
    add("--no-cuda-graphs", action="store_true", help="do not record short steps as CUDA graphs (GPU)")
    add("--wandb-project", default=TrainingConfig.wandb_project)
    add("--wandb-entity")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("-ET", "--EVAL_TYPE", "--eval-type", dest="eval_type", default="fine-tuned", metavar="TYPE",
        help="fine-tuned (default), zero-shot, few-shot, several with a comma, or all")  # fmt: skip
    add("--VLLM", "--vllm", dest="vllm", action="store_true", help="generate by vLLM, not by Hugging Face")
    add("-EBS", "--EVAL_BATCH_SIZE", "--eval-batch-size", dest="eval_batch_size", type=int)
    add("--max-new-tokens", type=int)
    add("--instruction", metavar="TEXT", help="what is said before a zero-shot or few-shot prompt (default: the data "
        "set's own)")  # fmt: skip
    add("--limit", type=int, help="evaluate on the first so many rows")
    add("--max-model-len", type=int, help="longest prompt and reply together, in tokens")
    add("--gpu-memory-utilization", type=float, default=GenerationConfig.gpu_memory_utilization)
    add("--kv-cache-gb", type=float, metavar="GB", help="memory of vLLM's keys and values: for a GPU that other "
        "processes use, whose memory vLLM would take for its own (default: what its share leaves)")  # fmt: skip
    add("--enforce-eager", action="store_true", help="vLLM compiles nothing: a shorter start, slower replies")
    add("--tensor-parallel", type=int, default=1, help="GPUs that share the model (vLLM)")
    add("--data-parallel", type=int, default=1, help="engines that share the rows, each with GPUs of its own (vLLM)")
    add("--samples", type=int, default=1, help="replies to each question, whose answers are voted on")
    add("--temperature", type=float, help=f"0 is greedy (default: 0, with several samples {DEFAULT_TEMPERATURE})")
    add("--check-adapter", action="store_true", help="hold base, adapter, merged model and vLLM against each other "
        "after evaluating (done by itself where training comes first)")  # fmt: skip

    push = parser.add_argument_group("Hub (default: push after training where a token and HF_NAME are there)")
    push.add_argument("--push", action="store_true", default=None, help="a push that fails is an error")
    push.add_argument("--no-push", dest="push", action="store_false")
    push.add_argument("--private", action="store_true", help="make the repository private")
    return parser.parse_args()


CHECKPOINTING: dict[str, bool | None] = {"auto": None, "yes": True, "no": False}
SETTINGS_FLAGS = (
    "max_seq_length", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "optim",
    "lora_r", "lora_alpha", "lora_dropout", "eval_batch_size", "max_new_tokens",
)  # fmt: skip


def student(args: argparse.Namespace) -> StudentRun:
    """The student with the preset, and over it the flags that change its settings, applied."""
    run = with_preset(args.preset, student_from_args(args), args)
    given = {name: value for name in SETTINGS_FLAGS if (value := getattr(args, name)) is not None}
    return replace(run, settings=replace(run.settings, **given))


def training_config(args: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        seed=args.seed,
        families=args.families,
        max_rows=args.max_rows,
        save_steps=args.save_steps,
        speed=Speed(
            packed=not args.no_packing,
            compiled=not args.no_compile,
            captured=not args.no_cuda_graphs,
            fp8_base=args.fp8_base,
            checkpointing=CHECKPOINTING[args.gradient_checkpointing],
        ),
        wandb_project=args.wandb_project,
        wandb_entity=args.wandb_entity,
    )


def evaluation_config(args: argparse.Namespace, run: StudentRun) -> EvaluationConfig | None:
    """What to evaluate; None for nothing. Raises UserError for an unknown eval type."""
    named = EVAL_TYPES if args.eval_type == "all" else args.eval_type.split(",")
    if unknown := [name for name in named if name not in EVAL_TYPES]:
        raise UserError(f"unknown eval type {unknown[0]!r}; one of {', '.join(EVAL_TYPES)}, all")
    types: tuple[EvalType, ...] = tuple(eval_type for eval_type in EVAL_TYPES if eval_type in named)
    splits = tuple(split for split, chosen in (("dev", args.dev), ("test", args.test)) if chosen)
    if not args.evaluate or not splits:
        return None
    temperature = args.temperature
    if temperature is None:
        temperature = DEFAULT_TEMPERATURE if args.samples > 1 else 0.0
    generation = GenerationConfig(
        vllm=args.vllm,
        max_new_tokens=run.settings.max_new_tokens,
        batch_size=run.settings.eval_batch_size,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_gb=args.kv_cache_gb,
        enforce_eager=args.enforce_eager,
        tensor_parallel=args.tensor_parallel,
        data_parallel=args.data_parallel,
        samples=args.samples,
        temperature=temperature,
        seed=args.seed,
    )
    return EvaluationConfig(splits, types, generation, args.limit, args.instruction)


def check(args: argparse.Namespace, run: StudentRun, folders: Folders, evaluation: EvaluationConfig | None) -> None:
    """Fail now on what would fail after hours of training."""
    data = datasets.dataset(run.dataset)
    if not args.train and not evaluation:
        raise UserError("nothing to do: no training (-NT) and no split to evaluate on; give -D, -T or both")
    if evaluation:
        check_backend(run, evaluation.generation.vllm)
        for split in evaluation.splits:
            read_rows(folders, data, split)
    if args.train and args.push and (missing := hub.why_no_push(run.hub_id)):
        raise UserError(f"--push is not possible: {missing}")


if __name__ == "__main__":
    sys.exit(report_errors(main))
