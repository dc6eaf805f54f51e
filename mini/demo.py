"""Every stage of the project once, on FinQA-mini and pocket-mistral; what `make demo` runs.

    python -m mini.demo

Each stage is the command that a user would type; its output goes to results/demo/<stage>.log. Prints a line a stage
with its time and its main figure, and at the end where tables, figures and the dashboard are. A stage that fails stops
the demo with the end of its log. Evaluation goes through vLLM where it is installed, else through Hugging Face's
generate. On a CPU of two cores or more the evaluation and the diff, which both follow the fine-tune, run side by side:
much of either is a single thread that imports and loads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from typing import Any

from finqa.models.settings import settings_for
from finqa.models.students import StudentRun
from finqa.runtime import commands
from finqa.runtime.commands import CROSSCODER_FOLDER, failure, run_into, start_into, told_to_end
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.datasets import dataset
from finqa.task.records import read_teacher_rows

DATASET, STUDENT = "FinQA-mini", "pocket-mistral"
FOLDERS = Folders()
LOGS = FOLDERS.results / "demo"
CROSSCODER_RESULTS = CROSSCODER_FOLDER / "results" / f"{STUDENT}-FinQA-mini-layer3-mlp_1k_samples_batchtopk"


SIDE_BY_SIDE = (("evaluate", "inference", "merge"), ("activations", "crosscoder", "analysis"))
"""Two lines of stages, of like length, of which neither needs what the other writes."""


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline."""

    name: str
    command: str
    figure: Callable[[], str]
    """The stage's main figure, read from what it wrote."""
    folder: Path = REPOSITORY


def stages() -> list[Stage]:
    vllm = " --VLLM" if find_spec("vllm") else ""
    names = f"{DATASET} {STUDENT}"
    return [
        Stage("preprocess", f"-m preprocessing.preprocess_finqa --dataset {DATASET}", questions),
        Stage(
            "teacher",
            f"-m preprocessing.process_finqa_code_generation --dataset {DATASET} --teacher program",
            programs,
        ),
        Stage("filter", f"-m preprocessing.filter_valid_answers --dataset {DATASET}", kept),
        Stage("fine-tune", f"main.py {names} -P --no-push", training_loss),
        Stage("evaluate", f"main.py {names} -P -NT -T -ET all --no-push{vllm}", accuracies),
        Stage("inference", f"inference.py {names}", both_answers),
        Stage("merge", f"merge_and_push_lora.py {names} --no-push", last_line("merge"), CROSSCODER_FOLDER),
        Stage("activations", f"collect_activations.py {names} --no-push", last_line("activations"), CROSSCODER_FOLDER),
        Stage("crosscoder", f"train.py {names} --no-push", explained_variance, CROSSCODER_FOLDER),
        Stage("analysis", f"analyse.py {names}", latents, CROSSCODER_FOLDER),
    ]


def run_stage(stage: Stage) -> float:
    """Run a stage's command, its output in its log; returns the seconds it took. Raises UserError where it fails."""
    return run_into(LOGS / f"{stage.name}.log", f"stage {stage.name}", stage.command, stage.folder)


def run_lines(lines: Sequence[Sequence[Stage]]) -> Iterator[tuple[Stage, float]]:
    """Run lines of stages side by side; gives every stage, and its seconds, as it ends. Raises UserError where one
    fails, and ends the others."""
    # A thread that waits for another one leaves its core to the other line. The number of threads stays as it is: the
    # order in which they add up is the figures' own.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    processes: dict[Future[int], tuple[Popen[bytes], Sequence[Stage], float]] = {}

    def start(line: Sequence[Stage]) -> None:
        log, started = LOGS / f"{line[0].name}.log", time.perf_counter()
        process = start_into(log, line[0].command, line[0].folder, environment)
        processes[pool.submit(process.wait)] = process, line, started

    with ThreadPoolExecutor(len(lines)) as pool, told_to_end():
        try:
            for line in lines:
                start(line)
            while processes:
                for done in wait(processes, return_when=FIRST_COMPLETED).done:
                    _, (stage, *following), started = processes.pop(done)
                    if code := done.result():
                        raise UserError(failure(f"stage {stage.name}", code, LOGS / f"{stage.name}.log"))
                    if following:
                        start(following)
                    yield stage, time.perf_counter() - started
        finally:
            for process, *_ in processes.values():
                process.terminate()


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_a_cpu() -> bool:
    """Whether the fine-tune was on a CPU, as its manifest says."""
    return _json(FOLDERS.model(DATASET, student().model_id) / "run.json")["device"].startswith("CPU")


def questions() -> str:
    splits = ("train", "dev", "test")
    counts = {s: len(dataset(DATASET).load(FOLDERS.raw(DATASET, s)).questions) for s in splits}
    return ", ".join(f"{count} {split}" for split, count in counts.items()) + " questions"


def programs() -> str:
    rows = read_teacher_rows(FOLDERS.generated(DATASET, "train"))
    return f"{sum(bool(row.generated_code) for row in rows)} of {len(rows)} training questions have a program"


def kept() -> str:
    n_kept, n_rejected = (
        len(read_teacher_rows(path))
        for path in (FOLDERS.filtered(DATASET, "train"), FOLDERS.rejected(DATASET, "train"))
    )
    return f"{n_kept} programs give their label, {n_rejected} do not"


def student() -> StudentRun:
    return StudentRun(DATASET, STUDENT, settings_for(STUDENT))


def training_loss() -> str:
    log = (FOLDERS.model(DATASET, student().model_id) / "training_log.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, log) if "loss" in record]
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def accuracies() -> str:
    shown = []
    for eval_type in ("zero-shot", "few-shot", "fine-tuned"):
        metrics = _json(FOLDERS.evaluation(DATASET, student().model_id, "test", eval_type) / "metrics.json")
        shown.append(f"{eval_type} {metrics['accuracy']:.1%}")
    return "accuracy " + ", ".join(shown)


def both_answers() -> str:
    log = (LOGS / "inference.log").read_text().splitlines()
    label = next(line.rpartition(": ")[2] for line in log if line.startswith("answer in the data set"))
    base, fine_tuned = (line.removeprefix("--> ") for line in log if line.startswith("--> "))
    return f"base {base}, fine-tuned {fine_tuned}, label {label}"


def explained_variance() -> str:
    held_out = _json(CROSSCODER_RESULTS / "metrics.json")["held_out"]
    return (
        f"held-out explained variance: instruct {held_out['instruct']:.3f}, fine-tuned {held_out['fine_tuned']:.3f}, "
        f"difference {held_out['difference']:.3f}"
    )


def latents() -> str:
    numbers = _json(CROSSCODER_RESULTS / "analysis.json")
    classes = [f"{numbers['classes'][kind]:,} {kind}" for kind in ("shared", "instruct-only", "fine-tuned-only")]
    size = dashboard().stat().st_size
    return f"{numbers['latents']['alive']:,} latents alive, {', '.join(classes)}; dashboard {size / 1e6:.1f} MB"


def dashboard() -> Path:
    return CROSSCODER_RESULTS / "dashboard.html"


def where() -> str:
    """Where what the demo has made is to be looked at."""
    results = FOLDERS.results / DATASET / student().model_id
    return "\n".join(
        (
            f"accuracy, side by side:   {results / 'metrics.md'}",
            f"figures and tables:       {CROSSCODER_RESULTS}",
            f"every latent, to look up: {dashboard()}",
        )
    )


def last_line(stage: str) -> Callable[[], str]:
    return lambda: commands.last_line(LOGS / f"{stage}.log")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    later = {stage.name: stage for stage in stages()}
    while later and not (next(iter(later)) == SIDE_BY_SIDE[0][0] and n_cores() > 1 and on_a_cpu()):
        stage = later.pop(next(iter(later)))
        print(f"{stage.name:<12}", end="", flush=True)
        seconds = run_stage(stage)
        print(f"{seconds:6.0f} s  {stage.figure()}", flush=True)
    if later:
        for stage, seconds in run_lines([[later[name] for name in line] for line in SIDE_BY_SIDE]):
            print(f"{stage.name:<12}{seconds:6.0f} s  {stage.figure()}", flush=True)
    print(f"\nthe whole pipeline in {time.perf_counter() - started:.0f} s; logs in {LOGS}")
    print(where())


if __name__ == "__main__":
    sys.exit(report_errors(main))
