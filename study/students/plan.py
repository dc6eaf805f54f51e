"""Every command behind docs/finqa.md, and what must come before it.

Settings are searched on dev with the smaller Qwen: one is changed at a time, from a common middle, whose programs name
their variables. The three students are then trained by the settings that stand in finqa/models/settings.py and the
data set's style of programs, with no flag. The learning curve, and seeds to compare the styles, have named variables.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosscoder.names import DEFAULT_RESULTS
from finqa.models.settings import ATTENTION
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.datasets import dataset
from finqa.task.program_compiler import ProgramStyle
from finqa.task.prompts import FINQA_INSTRUCTION, INSTRUCTION
from study.students.jobs import SHARE, Job

DATASET = "FinQA"
MAIN = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
"""The student with seeds, a vote, a learning curve and a diff."""
SEARCHED = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
STUDENTS = (MAIN, SEARCHED, "HuggingFaceTB/SmolLM2-135M-Instruct")
CURVE = (250, 500, 1000)
"""Training rows, from the top of the file; all of them are the first run of NAMED."""
PLAIN = {"": 3, "again": 3, "seed4": 4, "seed5": 5}
"""Run names and seeds of fine-tunes on the default style of programs, the default first; one seed twice, for what a GPU
adds."""
NAMED = {"named": 3, "named-again": 3, "named-seed4": 4, "named-seed5": 5}
"""Runs of that fine-tune on programs that name their variables, with their seeds."""
SAMPLES = 8
FRACTIONS = "Give ratios and percentages as fractions (0.25, not 25)."
_REPLY = " Reply with one ```python block and nothing else"
WORDINGS = {
    "none": INSTRUCTION,
    "last": f"{INSTRUCTION} {FRACTIONS}",
    "first": f"{FRACTIONS} {INSTRUCTION}",
    "middle": INSTRUCTION.replace(_REPLY, f" {FRACTIONS}{_REPLY}"),
    "inside": INSTRUCTION.replace("variable ans.", "variable ans, ratios and percentages as fractions (0.25, not 25)."),
    "end": INSTRUCTION.replace(f"{_REPLY}.", f" {FRACTIONS}{_REPLY}; its last line sets ans."),
}
"""Instructions tried for zero-shot and few-shot prompts, by where they speak of fractions."""
AMOUNTS = {"1k": "", "all": "--split all --num-samples 10000"}
"""Documents of a diff, and the flags for them: the published number of test rows; all there are, which are fewer."""
SITES = ("mlp", "residual")
METHODS = ("batchtopk", "difference-sae")
LATENTS = 16_384
TRAINING_GB = {MAIN: 68.0, SEARCHED: 30.0}
"""GPU memory of a fine-tune, in 1e9 bytes: the largest planned need of these students, and some more."""
GENERATION_GB = 22.0
"""GPU memory of an engine that only replies."""
CACHE_GB = 10.0
"""Keys and values of an engine, within what its job may take."""
ALL_ROWS_GB = 40.0
"""GPU memory of a dictionary on all rows, whose activations are held on the GPU."""
SMALL_GB = 12.0
"""GPU memory of the smallest student, of a dictionary on a thousand documents, or of an analysis."""


@dataclass(frozen=True)
class Setting:
    """One row of the search: what differs from the middle."""

    name: str
    flags: str = ""
    style: ProgramStyle = "named"
    gb: float = TRAINING_GB[SEARCHED]


MIDDLE = "--lora-r 64 --lora-alpha 128 --lora-dropout 0.05 --learning-rate 2e-4 --NUM_EPOCHS 3 -BS 8 --warmup-steps 20"
"""Where every search begins; a later flag of the same name wins."""
MIDDLE_SETTING = Setting("middle")
SEARCH = (
    Setting("all linear layers", f"-LM {' '.join(ATTENTION)} gate_proj up_proj down_proj", gb=42.0),
    Setting("5 epochs", "--NUM_EPOCHS 5"),
    Setting("16 rows an update", "-BS 16", gb=54.0),
    Setting("rank 256", "--lora-r 256 --lora-alpha 512", gb=34.0),
    Setting("rank 16", "--lora-r 16 --lora-alpha 32"),
    Setting("learning rate 4e-4", "--learning-rate 4e-4"),
    Setting("learning rate 1e-4", "--learning-rate 1e-4"),
    Setting("formula first", style="formula-first"),
    Setting("plain names", style="plain"),
    MIDDLE_SETTING,
)
"""The longest come first."""


@dataclass(frozen=True)
class Plan:
    """Where the study reads and writes, and by what it names things."""

    folders: Folders
    dictionaries: Path = DEFAULT_RESULTS
    """Where train.py and analyse.py write."""

    def styled(self, style: ProgramStyle) -> Folders:
        """A data folder whose training programs are written in a style, which need not be the data set's own."""
        same = style == dataset(DATASET).program_style
        return self.folders if same else Folders(self.folders.data / "styles" / style, self.folders.results)

    def jobs(self) -> list[Job]:
        return [
            *self.search(),
            *self.wordings(),
            *self.accuracy(),
            *self.more_of_the_main_student(),
            *self.diff(),
        ]

    def accuracy(self) -> list[Job]:
        """Train each student and evaluate it in all three ways."""
        return [
            Job(f"student-{short(model)}", self.main(model, "-D -T --VLLM -ET all"), TRAINING_GB.get(model, SMALL_GB))
            for model in STUDENTS
        ]

    def search(self) -> list[Job]:
        return [
            Job(
                job_name(setting),
                self.main(
                    SEARCHED,
                    f"-D --VLLM --enforce-eager {MIDDLE} {setting.flags} --run-name {job_name(setting)}",
                    self.styled(setting.style),
                ),
                setting.gb,
            )
            for setting in SEARCH
        ]

    def more_of_the_main_student(self) -> list[Job]:
        """Seeds, the other style of programs, a learning curve in it, and a vote."""
        trained = TRAINING_GB[MAIN]
        student = f"student-{short(MAIN)}"
        jobs = [
            Job(run, self.main(MAIN, f"-D -T --VLLM -S {seed} --run-name {run}"), trained)
            for run, seed in PLAIN.items()
            if run
        ]
        named = [(run, f"-S {seed} --run-name {run}") for run, seed in NAMED.items()]
        named += [(f"curve-{rows}", f"--max-rows {rows} --run-name rows{rows}") for rows in CURVE]
        jobs += [
            Job(job, self.main(MAIN, f"-D -T --VLLM {flags}", self.styled("named")), trained) for job, flags in named
        ]
        jobs.append(
            Job("vote", self.main(MAIN, f"-NT -T --VLLM --samples {SAMPLES}"), GENERATION_GB, (student,)),
        )
        return jobs

    def wordings(self) -> list[Job]:
        """What the main student is told before it is fine-tuned, in other words than the default."""
        asked = "-NT -D -T --VLLM -ET zero-shot,few-shot"
        return [
            Job(
                run,
                self.main(MAIN, f"{asked} --run-name {run} --instruction {shlex.quote(WORDINGS[name])}"),
                GENERATION_GB,
            )
            for name in WORDINGS
            if (run := wording_run(name))
        ]

    def diff(self) -> list[Job]:
        """Record, train and analyse: both sites, both methods, on the published number of documents and on all."""
        jobs, student = [], f"student-{short(MAIN)}"
        for amount, which in AMOUNTS.items():
            sites = " ".join(SITES)
            collect = self.script("collect_activations.py", f"--no-push {which} --site {sites}")
            jobs.append(Job(f"collect-{amount}", collect, GENERATION_GB, (student,)))
            for site in SITES:
                for method in METHODS:
                    name = dictionary_name(amount, site, method)
                    flags = f"{which} --site {site} --method {method} --name {name}"
                    train = self.script("train.py", f"--no-push {flags} --latents {LATENTS}")
                    gb = SMALL_GB if amount == "1k" else ALL_ROWS_GB
                    jobs.append(Job(f"train-{amount}-{site}-{method}", train, gb, (f"collect-{amount}",)))
                    analyse = self.script("analyse.py", flags)
                    jobs.append(
                        Job(
                            f"analyse-{amount}-{site}-{method}", analyse, SMALL_GB, (f"train-{amount}-{site}-{method}",)
                        )
                    )
        return jobs

    def main(self, model: str, flags: str, folders: Folders | None = None) -> str:
        engine = f" --gpu-memory-utilization {SHARE} --kv-cache-gb {CACHE_GB:g}" if "--VLLM" in flags else ""
        return f"main.py {DATASET} {model} -P {flags}{engine} --no-push {_folder_flags(folders or self.folders)}"

    def script(self, name: str, flags: str) -> str:
        return f"crosscoder-model-diff/{name} {DATASET} {MAIN} {flags} {_folder_flags(self.folders, results=False)}"


def dictionary_name(amount: str, site: str, method: str) -> str:
    """Name of a dictionary of the diff; `amount` is `1k` or `all`."""
    return f"{short(MAIN)}_{amount}_{site}_{method}"


def wording_run(name: str) -> str:
    """Run name of a wording of the instruction; empty for the one that is the default."""
    return "" if WORDINGS[name] == FINQA_INSTRUCTION else f"wording-{name}"


def short(model: str) -> str:
    return model.rpartition("/")[2]


def job_name(setting: Setting) -> str:
    """Name of a setting's job, and of its run."""
    return f"search-{setting.name.replace(' ', '-')}"


def _folder_flags(folders: Folders, results: bool = True) -> str:
    flags = f"--data-dir {shlex.quote(str(folders.data))}"
    return f"{flags} --results-dir {shlex.quote(str(folders.results))}" if results else flags


def chosen(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs whose names begin with one of `names`, and those that they need; all where none is given.

    Raises UserError for a name that is the beginning of none.
    """
    if not names:
        return list(jobs)
    by_name = {job.name: job for job in jobs}
    if unknown := [name for name in names if not any(job.startswith(name) for job in by_name)]:
        kinds = dict.fromkeys(job.partition("-")[0] for job in by_name)
        raise UserError(f"no job is called {', '.join(unknown)}; they begin with {', '.join(kinds)} (--list)")
    wanted = {job.name for job in jobs if job.name.startswith(tuple(names))}
    todo = list(wanted)
    while todo:
        for name in by_name[todo.pop()].after:
            if name not in wanted:
                wanted.add(name)
                todo.append(name)
    return [job for job in jobs if job.name in wanted]


def logs_of(folders: Folders) -> Path:
    return folders.results / DATASET / "logs"
