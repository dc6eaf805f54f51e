"""What is compared, how, and how long; and the jobs.

Job names: `ceilings-A-seed3` for the arms whose metrics were added, `settings` (chosen on control K), `diff-A-seed3`
for a pair at the primary site, `sites-A-seed3` for the same pair at the other sites.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from crosscoder.activations.readers import Target
from crosscoder.dictionaries.config import Method
from crosscoder.names import default_layer, model_depth
from study.invented.plan import SEEDS, Plan, run_name
from study.invented.rows import ARMS
from study.students.jobs import Job
from study.students.plan import ALL_ROWS_GB, GENERATION_GB

ADDED = ("A", "B")
"""The arms whose sets of metrics are the known answer."""
CONTROL = "K"
"""The arm on which settings are chosen."""
READ_TOO = {"A": ("A-permuted", "N")}
"""Further arms of the same seed on which an arm's items are read: does an item follow the name, and does it fire where
the name has no formula?"""

Form = Literal["trained", "untrained", "frozen", "baseline"]
"""`frozen`: the decoder stays as it started. `baseline`: nothing is trained."""

METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    name: settings
    for name, settings in {
        "plain": ("batchtopk", {}),
        "difference term": ("batchtopk", {"difference_weight": "equal"}),
        "partition": ("partition", {}),
        "L1": ("l1", {}),
        "difference SAE": ("difference-sae", {}),
        "dedicated": ("dedicated", {}),
        "stage-wise SAE": ("stagewise-sae", {}),
    }.items()
    if settings[0] in get_args(Method)
}
"""By name: the method of the library, and its settings beside those that are chosen."""
RANDOM, COMPONENTS = "random directions", "PCA of the difference"
ADAPTER, ADAPTER_OUTPUT = "adapter", "adapter output"
DIRECTIONS = (RANDOM, COMPONENTS, ADAPTER, ADAPTER_OUTPUT)
NORM, DIVERGENCE = "norm of the difference", "KL per token"
LOGITS, LENS = "logit difference", "activation difference lens"
WITHOUT = (NORM, DIVERGENCE, LOGITS, LENS)
"""Readings without a dictionary."""
TOP = 20
"""Items of a method that are read and put into the base."""
EQUAL_L0 = 32
"""Active latents a token at which dictionaries are compared, and read."""


@dataclass(frozen=True)
class Lengths:
    """How much is trained and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the dictionaries, at the primary site."""
    other_seeds: tuple[int, ...] = (0,)
    """At the other sites."""
    latents: tuple[int, ...] = (2048, 8192)
    ks: tuple[int, ...] = (16, 32, 64)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates, over the library's default for the size."""
    passes: int = 4
    """Over the documents; doubled until the explained variance of the difference gains less than GAIN."""
    most_passes: int = 16
    """Where doubling ends, converged or not."""
    random: int = 1024
    """Random directions, of which the top ones are taken."""
    logit_documents: int = 200
    """Documents on which tokens are mined by their logits' difference, and the adapter's output is taken."""
    factors: tuple[float, ...] = (0.5, 2.0, 4.0)
    """What injected norms are multiplied by for the figure, besides 1."""
    sweep_pages: int = 15
    """Test pages that are asked for it."""
    carry_pages: int | None = None
    """Test pages whose questions are answered by the base with items in it; None is all of them."""
    other_sites: int = 3
    """Sites besides the primary one."""
    pairs_elsewhere: int = len(SEEDS) * len(ARMS)
    """Pairs that are read at them."""
    batch: int = 192
    """Replies that are written at one time."""
    max_new_tokens: int = 200


GAIN = 0.01
"""Explained variance of the difference: a dictionary has converged where twice the passes change it by less."""
QUICK = Lengths(
    seeds=(0,), other_seeds=(), latents=(64, 128), ks=(4, 8), rates=(1.0,), passes=1, most_passes=2, random=64,
    logit_documents=8, factors=(2.0,), sweep_pages=1, carry_pages=1, other_sites=1, pairs_elsewhere=1,
    batch=64, max_new_tokens=8,
)  # fmt: skip
POCKET = Lengths(
    seeds=(0,), latents=(512, 1024), ks=(16, 32), rates=(1.0,), most_passes=8, factors=(2.0,), sweep_pages=4,
    carry_pages=6, batch=64, max_new_tokens=120,
)  # fmt: skip
"""pocket-mistral on all rows, which two cores take hours for: its rehearsal is the quick one."""


def lengths(plan: Plan) -> Lengths:
    return QUICK if plan.quick else POCKET if plan.is_rehearsal else Lengths()


def equal_l0(lengths: Lengths) -> int:
    """Active latents a token at which dictionaries are compared, which the smallest must be able to have."""
    return EQUAL_L0 if EQUAL_L0 in lengths.ks else max(lengths.ks)


def sites(plan: Plan) -> dict[str, Target]:
    """The four sites by name, in the order of the model: the residual stream after each quarter of the layers but the
    last, and the MLP output of the published site's depth."""
    depth = model_depth(plan.model)
    chosen = [Target(round(share * depth), "residual") for share in (0.25, 0.5, 0.75)]
    chosen.append(Target(default_layer(depth), "mlp"))
    return {site_name(target): target for target in sorted(set(chosen), key=lambda t: (t.layer, t.site == "residual"))}


def site_name(target: Target) -> str:
    return f"{target.site}{target.layer}"


def last_resort(plan: Plan) -> Target:
    """The primary site where no site carries half: the residual stream after three quarters."""
    return Target(round(0.75 * model_depth(plan.model)), "residual")


@dataclass(frozen=True)
class Compared:
    """The base and one fine-tune."""

    arm: str
    seed: int

    @property
    def run(self) -> str:
        return run_name(self.arm, self.seed)


PAIRS = tuple(Compared(arm, seed) for seed in SEEDS for arm in ARMS)
BY_RUN: Mapping[str, Compared] = {pair.run: pair for pair in PAIRS}


ENDS = "whole site"
"""The subject that holds the whole site, and the base alone, as additions."""


@dataclass(frozen=True)
class Subject:
    """A method in one form and seed."""

    method: str
    form: Form
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.replace(' ', '-')}-{self.form}-{self.seed}"


def subjects(plan: Plan, is_primary: bool) -> list[Subject]:
    """In the order in which they need each other: the untrained form before the trained, and last, of the first seed,
    the frozen one."""
    how_long = lengths(plan)
    found = [Subject(ENDS, "baseline", 0)] if is_primary else []
    found += [Subject(method, "baseline", 0) for method in (*DIRECTIONS, *WITHOUT)]
    forms: tuple[Form, ...] = ("untrained", "trained", "frozen")
    for seed in how_long.seeds if is_primary else how_long.other_seeds:
        of_seed = forms if is_primary and seed == how_long.seeds[0] else forms[:2]
        found += [Subject(method, form, seed) for method in METHODS for form in of_seed]
    return found


def results_of(plan: Plan, compared: Compared, target: Target, subject: Subject) -> Path:
    return plan.place.results / "diff" / site_name(target) / compared.run / f"{subject.name}.json"


def diff_jobs(plan: Plan, folders: str) -> list[Job]:
    """After the fine-tunes. `folders`: the flags that say what study it is.

    The pairs of A and B come first; what is recorded is deleted by the job that recorded it, so that as many sets lie
    on the disk as jobs run.
    """
    added = [pair for pair in PAIRS if pair.arm in ADDED]
    ordered = [*added, *(pair for pair in PAIRS if pair.arm not in ADDED)]

    def job(name: str, step: str, gb: float, after: list[str]) -> Job:
        return Job(name, f"-m study.invented.diff {step} {folders}", gb, tuple(after))

    ceilings = [f"ceilings-{pair.run}" for pair in added]
    jobs = [
        job(name, f"ceilings {pair.run}", GENERATION_GB, [f"train-{pair.run}"])
        for name, pair in zip(ceilings, added, strict=True)
    ]
    before = [job.name for job in plan.jobs()]  # no dictionary is trained before the gates are measured
    jobs.append(job("settings", f"settings {run_name(CONTROL, SEEDS[0])}", ALL_ROWS_GB, [*before, *ceilings]))
    for step, compared in (("diff", ordered), ("sites", ordered[: lengths(plan).pairs_elsewhere])):
        for pair in compared:
            needed = [pair.run, *(run_name(arm, pair.seed) for arm in READ_TOO.get(pair.arm, ()))]
            after = ["settings", *(f"train-{run}" for run in needed)]
            jobs.append(job(f"{step}-{pair.run}", f"{step} {pair.run}", ALL_ROWS_GB, after))
    return jobs


def study_flags(plan: Plan) -> str:
    """The flags of `add_plan_flags` that describe the plan."""
    quick = " --quick" if plan.quick else ""
    given = plan.place.given
    return (
        f"--model {shlex.quote(plan.model)} --source {plan.source}{quick} "
        f"--data-dir {shlex.quote(str(given.data))} --results-dir {shlex.quote(str(given.results))}"
    )
