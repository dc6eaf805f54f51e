"""Fine-tuning, recording activations, a crosscoder and evaluation on 1, 2, 4 GPUs: the project's own commands.

    python -m benchmarks.bench_processes [--processes 1 2 4]              # default: as many as GPUs are there
    python -m benchmarks.bench_processes --small --processes 1 2          # pocket-mistral's shapes, on a CPU too
    python -m benchmarks.bench_processes --stages engines --name processes_engines        # evaluation by vLLM alone
    python -m benchmarks.bench_processes --stages steps --name processes_steps            # a crosscoder's steps alone

A model of Mistral-7B's shapes with random weights is written to disk, with a tokenizer made on the spot; its data are
FinQA-mini's pages. Each number of processes runs main.py (the published recipe: one row an update and process),
collect_activations.py (layer 17, base and fine-tuned model, written to disk) and train.py (the first number of
--latents) as a user would, by torchrun, and the rates are those that the commands write down:

    fine-tuning     tokens/s over the second half of the updates (training_log.jsonl): compiling is left out
    recording       tokens/s of both models, from the first batch to the last shard (run.json); loading is left out
    crosscoder      tokens/s from the first step on (run.json): the same batch whatever the number of processes
    a step          tokens/s of its steps alone, of every number of --latents, and with a tenth of the latents dead
                    (bench_crosscoder; on GPUs by hand, elsewhere through autograd and none of them dead)
    evaluation      replies/s of the base by vLLM with as many engines (--data-parallel), on GPUs alone and where it is
                    installed; and with one engine over as many GPUs (--tensor-parallel)

Beside each rate stand its efficiency (the rate over that of the first number of processes, over how many times as many
there are), the memory that the first process held, and the bytes that a process sends in an update or step.

More processes see more rows in an update, which is another recipe: what is compared is how fast rows pass. So the
efficiency of fine-tuning is that of the time an update takes: its tokens/s also follow which rows an update has. Where
bitsandbytes is missing, torch's fused AdamW takes the place of the recipe's 8-bit one, and the record says so.

Needs 60 GB of disk below --scratch. Writes benchmarks/results/processes.json and .md (--name) after every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bench_crosscoder import AUTOGRAD, AUXILIARY, BY_HAND
from benchmarks.bench_evaluation import shapes_of
from benchmarks.parts.made_up_model import write_model
from benchmarks.parts.mistral_7b import SHAPES, random_mistral_7b
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.models.students import default_device
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import REPOSITORY, Folders

DATASET = "FinQA-mini"
REPLY_TOKENS = 131
"""As FinQA's programs have on average; random weights never end one."""
ENGINES = {"evaluation": "--data-parallel", "evaluation, one engine": "--tensor-parallel"}
"""The flag that gives vLLM its GPUs, by the stage's name in the record."""
PREPARATION = ("preprocess_finqa", "process_finqa_code_generation --teacher program", "filter_valid_answers")
COLLECT, TRAIN = (REPOSITORY / "crosscoder-model-diff" / name for name in ("collect_activations.py", "train.py"))


def main() -> None:
    import torch

    args = parse_arguments()
    check_gpus(args.processes)
    if not stages(args):
        raise UserError("--stages engines needs a GPU and vLLM")
    runs: dict[int, dict[str, Any]] = {processes: {} for processes in args.processes}
    table = ""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folders = Folders(data=Path(scratch) / "data", results=Path(scratch) / "results")
        model = write_model(random_model(args), Path(scratch) / "model")
        torch.cuda.empty_cache()  # the made-up model was on a GPU that the commands need
        for words in PREPARATION:
            command([sys.executable, "-m", *f"preprocessing.{words}".split(), "--dataset", DATASET], folders, 1)
        for name, measure in stages(args).items():
            for processes, run in runs.items():
                run[name] = measure(model, folders, processes, args)
                print(name, processes, run[name], flush=True)
            table = report(runs, args)
    print(table)


def stages(args: argparse.Namespace) -> dict[str, Callable[..., dict[str, Any]]]:
    """What measures each stage, by its name, in an order in which each finds what it needs."""
    steps = {
        f"a step, {n:,} latents{', a tenth dead' * (way == AUXILIARY)}": partial(a_step, n_latents=n, way=way)
        for n in args.latents
        for way in step_ways()
    }
    with_vllm = default_device() == "cuda" and find_spec("vllm") is not None
    engines = {name: partial(replies, name=name) for name in ENGINES} if with_vllm else {}
    every = {name: {name: measure} for name, measure in TRAINED.items()} | {"steps": steps, "engines": engines}
    return {name: measure for kind in STAGES if kind in args.stages for name, measure in every[kind].items()}


def step_ways() -> tuple[str, ...]:
    return (BY_HAND, AUXILIARY) if default_device() == "cuda" else (AUTOGRAD,)


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def check_gpus(processes: list[int]) -> None:
    """UserError where a process would have no GPU of its own. (On a CPU they share the cores.)"""
    if default_device() == "cuda" and max(processes) > gpus():
        raise UserError(f"--processes {max(processes)} needs as many GPUs, and {gpus()} are here")


def random_model(args: argparse.Namespace) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**shapes_of(args))) if args.small else random_mistral_7b(args.layers)


def student(model: Path, processes: int) -> list[str]:
    return [DATASET, str(model), "-P", "--run-name", f"by-{processes}", "--no-push"]


def fine_tuning(model: Path, folders: Folders, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train; returns ms an update and tokens/s of the second half, and what run.json says of it."""
    rows = args.updates * processes
    recipe = ["--preset", "published", "--compile", "--max-rows", str(rows), "--save-steps", str(args.updates)]
    recipe += [] if find_spec("bitsandbytes") else ["--optim", "adamw_torch_fused"]
    command(launched("main.py", processes, [*student(model, processes), *recipe]), folders, processes)
    [folder] = (folders.data / "models" / DATASET).glob(f"*-by-{processes}")
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    first, last = next(record for record in log if record["step"] >= args.updates // 2), log[-1]
    seconds, updates = last["seconds"] - first["seconds"], last["step"] - first["step"]
    if updates < 1:
        raise UserError("--updates is too small: no two records of the second half")
    manifest = json.loads((folder / "run.json").read_text())
    return {
        "updates": updates,
        "ms_an_update": round(1000 * seconds / updates, 1),
        "tokens_per_second": round((last["tokens_seen"] - first["tokens_seen"]) / seconds),
        "first_update_s": log[0]["seconds"],
        "memory_gb": manifest["memory_gb"],
        "sent_bytes": manifest["sent_bytes_an_update"],
        "speed": manifest["speed"],
        "optim": manifest["student"]["settings"]["optim"],
        "whole_command_s": manifest["seconds"],
    }


def recording(model: Path, folders: Folders, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Record with the first student, so that all numbers of processes do the same."""
    shutil.rmtree(folders.data / "activations", ignore_errors=True)
    which = [*student(model, args.processes[0]), *recorded(args)]
    command(launched(str(COLLECT), processes, [*which, "--reader", "hooks"]), folders, processes)
    [folder] = (folders.data / "activations").iterdir()
    config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", "run.json"))
    return {
        "tokens": config["n_tokens"],
        "tokens_per_second": 2 * manifest["tokens_per_second"],
        "memory_gb": manifest["memory_gb"],
        "sent_bytes": 0,
        "whole_command_s": manifest["seconds"],
    }


def recorded(args: argparse.Namespace) -> list[str]:
    """The set that is recorded and then learnt from."""
    return ["--split", "train", "--num-samples", str(args.documents), "--layer", str(args.layer)]


def crosscoder(model: Path, folders: Folders, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a dictionary on the set that was recorded last."""
    which = [*student(model, args.processes[0]), *recorded(args), "--latents", str(args.latents[0]), "--epochs", "1"]
    name = f"crosscoder-by-{processes}"
    own = ["--name", name, "--results-dir", str(folders.results)]
    command(launched(str(TRAIN), processes, [*which, *own]), folders, processes)
    manifest = json.loads((folders.results / name / "run.json").read_text())
    steps = manifest["sent"].get("bytes", 0) and -(-manifest["tokens"] // manifest["training"]["batch_size"])
    return {
        "tokens_per_second": manifest["tokens_per_second"],
        "memory_gb": manifest["memory_gb"],
        "sent_bytes": round(manifest["sent"].get("bytes", 0) / max(1, steps)),
        "whole_command_s": manifest["seconds"],
    }


def a_step(
    model: Path, folders: Folders, processes: int, args: argparse.Namespace, n_latents: int, way: str
) -> dict[str, Any]:
    """Time the steps of a dictionary that trains on made-up activations, by bench_crosscoder: all ways in one go."""
    out = folders.results / f"{n_latents}-latents-by-{processes}"
    if not out.exists():
        words = ["--latents", str(n_latents), "--ways", *step_ways(), "--ev-steps", "0", "--output-dir", str(out)]
        words += ["--d-model", str(shapes_of(args)["hidden_size"])] + ["--cpu"] * (default_device() == "cpu")
        command(launched("benchmarks.bench_crosscoder", processes, words, module=True), None, processes)
    record = json.loads((out / "crosscoder_step.json").read_text())
    step = record["steps"][str(n_latents)][way]
    if isinstance(step, str):
        raise UserError(f"a step of {n_latents:,} latents, {way}: {step}")
    rate = round(1000 * record["settings"]["batch"] / step["ms"])
    ms, memory = round(step["ms"], 2), step.get("peak_gb")
    return {"tokens_per_second": rate, "ms_a_step": ms, "memory_gb": memory, "sent_bytes": None}


def replies(model: Path, folders: Folders, processes: int, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Replies/s of the base in one of the ways of ENGINES, which are the same thing with one GPU and run once there."""
    results = folders.results / (f"{name} {processes}" if processes > 1 else "one GPU")
    words = [*student(model, args.processes[0]), "-NT", "-T", "-ET", "zero-shot", "--max-new-tokens", str(REPLY_TOKENS)]
    words += ["--VLLM", ENGINES[name], str(processes)]
    if not results.exists():
        command([sys.executable, "main.py", *words, "--results-dir", str(results)], folders, 1)
    [path] = results.rglob("metrics.json")
    metrics = json.loads(path.read_text())
    rate = metrics["n"] / metrics["seconds"]["generate"]
    return {"replies_per_second": round(rate, 2), "sent_bytes": None, "memory_gb": None}


TRAINED = {"fine-tuning": fine_tuning, "recording": recording, "crosscoder": crosscoder}
"""Each needs what those before it made."""
STAGES = (*TRAINED, "steps", "engines")


def launched(script: str, processes: int, words: list[str], module: bool = False) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *(["-m"] if module else []), script, *words]


def command(words: list[str], folders: Folders | None, processes: int) -> None:
    """Run one of the project's commands, on the scratch folders if it has any. Raises UserError with its output where
    it fails."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    words = [*words, *(["--data-dir", str(folders.data)] if folders else [])]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")


def report(runs: dict[int, dict[str, Any]], args: argparse.Namespace) -> str:
    """Write the record of what was measured so far; returns its table."""
    first, rows = min(runs), []
    for stage in runs[first]:
        unit = "replies/s" if "replies_per_second" in runs[first][stage] else "tokens/s"
        for processes, run in sorted(runs.items()):
            rate, before = (of[stage][unit.replace("/s", "_per_second")] for of in (run, runs[first]))
            ms, ms_before = (of[stage].get("ms_an_update") for of in (run, runs[first]))
            run[stage]["efficiency"] = round(ms_before / ms if ms else rate / before * first / processes, 3)
            memory, sent = run[stage]["memory_gb"], run[stage]["sent_bytes"]
            rows.append(
                (
                    stage, processes, f"{rate:,} {unit}", f"{run[stage]['efficiency']:.2f}",
                    "" if memory is None else f"{memory:.1f}", "" if sent is None else f"{sent / 1e6:,.1f}",
                )
            )  # fmt: skip
    head = ("stage", "processes", "rate", "efficiency", "GB of the first", "MB sent an update or step")
    table = markdown_table(head, rows)
    settings = {name: getattr(args, name) for name in ("updates", "documents", "layer", "latents")}
    shapes = "pocket-mistral" if args.small else f"Mistral-7B, {args.layers} layers"
    record = {"shapes": shapes, **settings, "processes": {str(n): run for n, run in runs.items()}}
    write_record(args.name, record, table, args.output_dir)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", help="one after the other (default: those of 1 2 4 that have a GPU each)")
    add("--small", action="store_true", help="pocket-mistral's shapes")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="(default: all; a crosscoder needs the two before)")
    add("--updates", type=int, default=80, help="of fine-tuning (default: %(default)s)")
    add("--documents", type=int, default=2048, help="that are recorded (default: %(default)s)")
    add("--layer", type=int, default=17, help="whose MLP output is recorded (default: %(default)s)")
    add("--latents", type=int, nargs="+", default=[16_384, 65_536], help="of the crosscoders (default: %(default)s)")
    add("--layers", type=int, default=SHAPES["num_hidden_layers"], help="of the 7B shapes (default: %(default)s)")
    add("--scratch", type=Path, help="folder for the model and what is made of it (default: the system's)")
    add("--name", help="of the record (default: processes, or processes_small)")
    add("--output-dir", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    args = parser.parse_args()
    args.name = args.name or ("processes_small" if args.small else "processes")
    args.processes = args.processes or [n for n in (1, 2, 4) if n <= max(1, gpus())]
    if min(args.processes) < 1:
        parser.error("--processes must be at least 1 each")
    asked = [stage for stage in TRAINED if stage in args.stages]
    if asked != list(TRAINED)[: len(asked)]:
        parser.error("--stages: recording needs fine-tuning, and a crosscoder both")
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
