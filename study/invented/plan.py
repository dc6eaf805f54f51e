"""What is fine-tuned and evaluated: five arms in two seeds, and the base under every prompt, as jobs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from finqa.models.settings import settings_for
from finqa.models.students import POCKET, StudentRun, local_model
from finqa.runtime.paths import Folders, add_folder_flags
from finqa.task.datasets import INVENTED
from study.invented.files import DEFINITION, TEST, Place
from study.invented.pages import SOURCES, source_of
from study.invented.rows import ARMS, QUICK, Sizes, teaching
from study.students.jobs import SHARE, Job
from study.students.plan import CACHE_GB, GENERATION_GB, MAIN, SMALL_GB, TRAINING_GB, short

SEEDS = (3, 4)
EPOCHS = 1
"""Every row is seen once, in every arm."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation that the gates read."""

    name: str
    """Name of the model and of how it is asked."""
    run_name: str
    split: str
    eval_type: str
    part: str = TEST
    """Whose questions."""


BASE = (
    Evaluation("base, zero-shot", "base", "test", "zero-shot"),
    Evaluation("base, few-shot", "base", "test", "few-shot"),
    Evaluation("base, fine-tuning prompt", "base-bare", "test", "zero-shot"),
)
DEFINED = (
    Evaluation("base, zero-shot, definition", "base-defined", "test", "zero-shot", DEFINITION),
    Evaluation("base, few-shot, definition", "base-defined", "test", "few-shot", DEFINITION),
)


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def fine_tuned(arm: str, seed: int, split: str = "test") -> Evaluation:
    return Evaluation(run_name(arm, seed), run_name(arm, seed), split, "fine-tuned")


FINE_TUNED = tuple(fine_tuned(arm, seed) for seed in SEEDS for arm in ARMS)
DEFINED_BY_K = tuple(
    replace(fine_tuned("K", seed), name=f"{run_name('K', seed)}, definition", part=DEFINITION) for seed in SEEDS
)
EVALUATIONS = (*BASE, *DEFINED, *DEFINED_BY_K, *FINE_TUNED)


@dataclass(frozen=True)
class Plan:
    """The study of one model on one source of pages."""

    place: Place
    model: str
    """As main.py takes it."""
    source: str
    """Whose pages (pages.SOURCES)."""
    quick: bool = False
    """A few rows of everything."""
    definitions: bool = False
    """Every arm also learns to follow definitions of other metrics."""

    @property
    def dataset(self) -> str:
        """Name of the data set that its rows are."""
        return INVENTED[self.source]

    @property
    def sizes(self) -> Sizes:
        sizes = QUICK if self.quick else Sizes()
        return teaching(sizes) if self.definitions else sizes

    @property
    def is_rehearsal(self) -> bool:
        """No verdict is given on it, and its gates need not hold."""
        return self.quick or self.model == POCKET

    def student(self, run: str) -> StudentRun:
        return StudentRun(self.dataset, self.model, replace(settings_for(self.model), num_epochs=EPOCHS), run_name=run)

    def predictions(self, evaluation: Evaluation) -> Path:
        """Folder of an evaluation."""
        model_id = self.student(evaluation.run_name).model_id
        folders = self.place.part(evaluation.part)
        return folders.evaluation(self.dataset, model_id, evaluation.split, evaluation.eval_type)

    def jobs(self) -> list[Job]:
        """The base first: what it can do needs no fine-tune, and may end the study."""
        return [*self.of_the_base(), *(job for seed in SEEDS for arm in ARMS for job in self.of_an_arm(arm, seed))]

    def of_the_base(self) -> list[Job]:
        asked = "-NT -T"
        return [
            self.job("base", f"{asked} -ET zero-shot,few-shot", TEST, "base"),
            self.job("base-bare", f"{asked} -ET zero-shot --instruction ''", TEST, "base-bare"),
            self.job("base-defined", f"{asked} -ET zero-shot,few-shot", DEFINITION, "base-defined"),
        ]

    def of_an_arm(self, arm: str, seed: int) -> list[Job]:
        run, chosen = run_name(arm, seed), f"-S {seed}"
        asked = [("", f"-NT -D -T --check-adapter {chosen}", TEST)]
        if arm == "K":
            asked.append(("-definition", f"-NT -T {chosen}", DEFINITION))
        return [
            self.job(f"train-{run}", f"-NE {chosen}", arm, run, self.training_gb),
            *(
                self.job(f"evaluate-{run}{of}", flags, part, run, GENERATION_GB, (f"train-{run}",))
                for of, flags, part in asked
            ),
        ]

    def job(
        self, name: str, flags: str, part: str, run: str, gb: float = GENERATION_GB, after: Sequence[str] = ()
    ) -> Job:
        folders = self.place.part(part)
        words = f"main.py {self.dataset} {shlex.quote(self.model)} -P {flags} --NUM_EPOCHS {EPOCHS} --run-name {run}"
        engine = "" if "-NE" in flags.split() else self.engine_flags()
        places = f"--data-dir {shlex.quote(str(folders.data))} --results-dir {shlex.quote(str(folders.results))}"
        return Job(name, f"{words}{engine} --no-push {places}", gb, tuple(after))

    def engine_flags(self) -> str:
        """vLLM where it is installed, with its part of a GPU but for pocket-mistral, which needs hardly any. The few
        questions of the quick rehearsal are answered before an engine has started."""
        if self.quick or not find_spec("vllm"):
            return ""
        return " --VLLM" + (
            "" if self.model == POCKET else f" --gpu-memory-utilization {SHARE} --kv-cache-gb {CACHE_GB:g}"
        )

    @property
    def training_gb(self) -> float:
        """GPU memory, in 1e9 bytes, of a fine-tune of this student (docs/finqa.md), whatever folder the model is in."""
        by_name = {short(model): gb for model, gb in TRAINING_GB.items()}
        return by_name.get(Path(self.model).name, SMALL_GB)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, whose pages, how much, where."""
    parser.add_argument("--model", default=MAIN, help="an instruct model, by its name or folder (default: %(default)s)")
    parser.add_argument("--source", choices=SOURCES, help="whose pages (default: FinQA where it is there)")
    parser.add_argument("--quick", action="store_true", help="a few rows of everything: shows that the commands work")
    parser.add_argument(
        "--teach-definitions",
        action="store_true",
        help="every arm also learns from rows that give the definition of a metric that occurs once: for a model whose "
        "base does not follow one (the gate 'computable when defined')",
    )
    add_folder_flags(parser)


def plan_from(args: argparse.Namespace) -> Plan:
    """The plan that the flags of `add_plan_flags` describe."""
    given = Folders(args.data_dir.resolve(), args.results_dir.resolve())
    local = local_model(args.model)
    name = local.name if local else short(args.model)
    name += "-definitions" * args.teach_definitions + "-quick" * args.quick
    model = args.model if args.model == POCKET or not local else str(local)
    return Plan(Place(given, name), model, args.source or source_of(given), args.quick, args.teach_definitions)
