"""What is compared, how, and how long; and the jobs.

Job names: `ceilings-A-seed3` for the arms whose metrics were added, `record-K-seed3` and `settings-<method>` (chosen on
that control), `diff-K-seed3` for a pair at the primary site with dictionaries of the first seed, `seeds-A-seed3` with
the further ones and with frozen decoders, `sites-A-seed3` for the pair at the other sites. Where metrics were added, a
pair is recorded by a job of its own, `record-A-seed3`, and read on the test's questions by another, `look-A-seed3`. Its
dictionaries are trained by a job a method, `dictionaries-A-seed3-<method>`, and read by one, `diff-A-seed3-<method>`;
what needs no dictionary is read by `diff-A-seed3-baselines`. What the verdicts need comes first.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from crosscoder.activations.readers import Target
from crosscoder.dictionaries.config import Method
from crosscoder.names import default_layer, model_depth
from study.invented.plan import SEEDS, Plan, run_name
from study.invented.rows import ARMS
from study.students.jobs import Job
from study.students.plan import ALL_ROWS_GB, GENERATION_GB, MAIN, short

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
"""Methods by name: the library's method, and its settings beside those that are chosen."""
RANDOM, COMPONENTS = "random directions", "PCA of the difference"
ADAPTER, ADAPTER_OUTPUT = "adapter", "adapter output"
DIRECTIONS = (RANDOM, COMPONENTS, ADAPTER, ADAPTER_OUTPUT)
NORM, DIVERGENCE = "norm of the difference", "KL per token"
LOGITS, LENS = "logit difference", "activation difference lens"
WITHOUT = (NORM, DIVERGENCE, LOGITS, LENS)
"""Readings without a dictionary."""
TOP = 20
"""Items of a method that are read and put into the base."""
ENERGY, BY_NU, ANY_ITEM = "energy", "1 - nu", "any item"
"""Rankings: the first gives verdicts. By the last, which is no ranking, a metric's item is chosen among all."""
FIRST = (100, 400)
"""How many items by energy are put into the base too, where a method has more."""
TOLD, TOP_BY_NU, ALL, DECODED = "told best", f"top {TOP} by {BY_NU}", "all", "all and bias"
EXPLORED = (TOLD, TOP_BY_NU, *(f"first {n}" for n in FIRST), ALL, DECODED)
"""Sets that are put into the base without a verdict; the first takes labels: the items that tell the arm's own metrics
best of all. The bias is what a dictionary adds where no latent is active."""
DICTIONARY_GB = 5.0
"""Memory of a GPU, in 1e9 bytes, for a job that trains a dictionary: 17.3 were measured with 14.1 of activations."""
CARRY_GB = 28.0
"""For a job that has the base write `Lengths.batch` replies: keys and values take 18 of it, the models 4."""
BASELINES = "baselines"
"""In the place of a method: everything without a dictionary."""
EQUAL_L0 = 32
"""Active latents a token at which dictionaries are compared, and read."""


@dataclass(frozen=True)
class Lengths:
    """How much is trained and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the dictionaries: the first in every pair, the others where metrics were added, at the primary site."""
    latents: tuple[int, ...] = (8192,)
    ks: tuple[int, ...] = (32,)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates, over the library's default for the size."""
    passes: int = 4
    """Over the documents, while rate, size and k are chosen; then doubled until the explained variance of the
    difference gains less than GAIN."""
    most_passes: int = 16
    """Where doubling ends, converged or not."""
    random: int = 1024
    """Random directions, of which the top ones are taken."""
    logit_documents: int = 200
    """Documents on which tokens are mined by their logits' difference, and the adapter's output is taken."""
    factors: tuple[float, ...] = (0.5, 2.0)
    """What injected norms are multiplied by for the figure, besides 1."""
    sweep_pages: int = 15
    """Test pages that are asked for it, and for what is explored."""
    carry_pages: int | None = None
    """Test pages whose questions are answered by the base with items in it; None is all of them."""
    fine_tunes: tuple[int, ...] = SEEDS
    """Seeds of the fine-tunes that are compared with the base."""
    controls: bool = True
    """The pairs of A', K and N too."""
    other_sites: int = 3
    """Sites besides the primary one."""
    pairs_elsewhere: int = len(ADDED)
    """Pairs that are read at them: both arms, one fine-tuning seed."""
    batch: int = 480
    """Replies that are written at one time: as many as there are questions of an arm. More would be hardly slower a
    step, but five jobs of CARRY_GB would not fit on a GPU of 141 GB."""
    max_new_tokens: int = 96
    """A gold program has at most 53 of the main model's."""


GAIN = 0.01
"""Explained variance of the difference: a method has converged where twice the passes change it by less."""
SHORT = Lengths(seeds=(0,), controls=False, pairs_elsewhere=0)
"""For another model than the main one: the pairs of A and B, at the primary site."""
QUICK = Lengths(
    fine_tunes=SEEDS[:1], seeds=(0, 1), latents=(64, 128), ks=(4, 8), rates=(1.0,), passes=1, most_passes=2, random=64,
    logit_documents=8, factors=(2.0,), sweep_pages=1, carry_pages=1, other_sites=1, pairs_elsewhere=1,
    batch=64, max_new_tokens=8,
)  # fmt: skip
POCKET = Lengths(
    seeds=(0,), latents=(512, 1024), ks=(16, 32), rates=(1.0,), most_passes=8, factors=(2.0,), sweep_pages=4,
    carry_pages=6, batch=64, max_new_tokens=120,
)  # fmt: skip
"""pocket-mistral on all rows, which two cores take hours for: its rehearsal is the quick one."""


def lengths(plan: Plan) -> Lengths:
    if plan.is_rehearsal:
        return QUICK if plan.quick else POCKET
    return Lengths() if plan.place.model == short(MAIN) else SHORT


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
    """A method in one form and dictionary seed."""

    method: str
    form: Form
    seed: int

    @property
    def name(self) -> str:
        return f"{slug(self.method)}-{self.form}-{self.seed}"


def slug(method: str) -> str:
    return method.replace(" ", "-")


Part = Literal["diff", "seeds", "sites"]
"""Which subjects of a pair: at the primary site those of the first seed, or of the further ones and with a frozen
decoder; or at other sites."""


def subjects(plan: Plan, compared: Compared, part: Part) -> list[Subject]:
    """In the order in which they need each other: the untrained form before the trained. No verdict needs the frozen
    one, which comes with the further seeds."""
    first, *further = lengths(plan).seeds
    is_main = part == "diff" and compared.arm in ADDED
    found = [] if part == "seeds" else [Subject(method, "baseline", 0) for method in (*DIRECTIONS, *WITHOUT)]
    if is_main:
        found.insert(0, Subject(ENDS, "baseline", 0))
    for seed in further if part == "seeds" else [first]:
        found += [Subject(method, form, seed) for method in METHODS for form in ("untrained", "trained")]
    return found + ([Subject(method, "frozen", first) for method in METHODS] if part == "seeds" else [])


def is_of(subject: Subject, methods: str) -> bool:
    """Whether a job reads a subject that reads this method, BASELINES, or with an empty name all."""
    return methods in ("", subject.method if subject.method in METHODS else BASELINES)


def results_of(plan: Plan, compared: Compared, target: Target, subject: Subject) -> Path:
    return plan.place.results / "diff" / site_name(target) / compared.run / f"{subject.name}.json"


def diff_jobs(plan: Plan, folders: str) -> list[Job]:
    """After the fine-tunes. `folders`: the flags that say what study it is.

    The job that makes a pair's last file deletes what was recorded of it, so that few sets lie on the disk at one time.
    """
    how_long = lengths(plan)
    compared = [pair for pair in PAIRS if pair.seed in how_long.fine_tunes]
    added = [pair for pair in compared if pair.arm in ADDED]
    control = run_name(CONTROL, SEEDS[0])

    def job(step: str, run: str, gb: float, after: Sequence[str], method: str = "") -> Job:
        words = " ".join(filter(None, [step, run, slug(method), folders]))
        name = "-".join(filter(None, [step, run if step != "settings" else "", slug(method)]))
        return Job(name, f"-m study.invented.diff {words}", gb, tuple(after))

    jobs = [job("ceilings", pair.run, GENERATION_GB, [f"train-{pair.run}"]) for pair in PAIRS if pair.arm in ADDED]
    before = [job.name for job in (*plan.jobs(), *jobs)]  # no dictionary is trained before the gates are measured
    jobs.append(job("record", control, GENERATION_GB, before))
    settings = [job("settings", control, DICTIONARY_GB, [f"record-{control}"], method) for method in METHODS]
    jobs += settings
    chosen = [job.name for job in settings]

    def needed(pair: Compared) -> list[str]:
        return [f"train-{run}" for run in (pair.run, *(run_name(arm, pair.seed) for arm in READ_TOO.get(pair.arm, ())))]

    trained_before: list[str] = []
    read_before: list[str] = []
    for pair in added:
        # Programs are written in small steps, each of which would wait for a step of every dictionary under way.
        jobs.append(job("record", pair.run, GENERATION_GB, [*before, *trained_before]))
        trained = [
            job("dictionaries", pair.run, DICTIONARY_GB,
                [f"record-{pair.run}", f"settings-{slug(method)}", *read_before], method) for method in METHODS
        ]  # fmt: skip
        trained_before = [job.name for job in trained]
        look = job("look", pair.run, ALL_ROWS_GB, [f"record-{pair.run}", *needed(pair)])
        after = [*trained_before, look.name]
        # Writing programs leaves much of a GPU idle.
        reading = [job("diff", pair.run, CARRY_GB, after, method) for method in (BASELINES, *METHODS)]
        read_before = [job.name for job in reading]
        jobs += [look, *trained, *reading]
    for pair in (pair for pair in added if subjects(plan, pair, "seeds")):
        jobs += [
            job("seeds", pair.run, GENERATION_GB, [f"diff-{pair.run}-{slug(method)}"], method) for method in METHODS
        ]
    others = [pair for pair in compared if how_long.controls and pair not in added]
    jobs += [job("diff", pair.run, ALL_ROWS_GB, [*chosen, *needed(pair)]) for pair in others]
    elsewhere = added[: how_long.pairs_elsewhere]
    return jobs + [job("sites", pair.run, ALL_ROWS_GB, [*chosen, *needed(pair)]) for pair in elsewhere]


def study_flags(plan: Plan) -> str:
    """The flags of `add_plan_flags` that describe the plan."""
    how = " --teach-definitions" * plan.definitions + " --quick" * plan.quick
    given = plan.place.given
    return (
        f"--model {shlex.quote(plan.model)} --source {plan.source}{how} "
        f"--data-dir {shlex.quote(str(given.data))} --results-dir {shlex.quote(str(given.results))}"
    )
