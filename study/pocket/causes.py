"""What latents cause: sets of them put into the base model, or taken out of the fine-tuned one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from finqa.models import students
from study.pocket.ceilings import load_pair, test_rows
from study.pocket.dictionaries import Dictionary, load
from study.pocket.measures import all_documents
from study.pocket.plan import BASE, SHAM, STUDENT, Pair
from study.work import Work, in_parallel, read_json

if TYPE_CHECKING:
    from crosscoder.activations.collection import Document
    from crosscoder.interventions.causal_report import CausalConfig

METHODS = ("plain", "difference SAE")
SIZES, CONTROL_SIZES = (1, 4, 16, 64), (16,)
"""Latents in a set; those of the controls, of which there are many."""
GROUPS = ("all", "known", "new", "other")
COLUMNS = (
    "kind", "n_latents", "seed", "direction", "carrier", "positions", "group", "measure", "n", "value", "none",
    "ceiling", "recovered", "injected_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One report on a dictionary."""

    dictionary: Dictionary
    rivals: tuple[Dictionary, ...]
    """Whose latents are patched beside its own."""
    replies: bool
    """Whether replies are written and their programs run, on fewer questions; else gold programs, teacher-forced."""

    @property
    def name(self) -> str:
        return f"{self.dictionary.method}, {'replies' if self.replies else 'teacher-forced'}"

    def file(self, work: Work) -> Path:
        folder = "causal-replies" if self.replies else "causal"
        return work.measure(self.dictionary.name) / folder / "causal.json"


def experiments(trained: Sequence[Dictionary], target: Target) -> list[Experiment]:
    """Of the first seed of the pairs that ask for it; the longer ones first."""
    chosen = [d for d in trained if d.pair.causal and d.target == target and d.seed == 0 and d.method in METHODS]
    return [Experiment(d, _rivals(d, trained), replies) for replies in (False, True) for d in chosen]


def _rivals(dictionary: Dictionary, trained: Sequence[Dictionary]) -> tuple[Dictionary, ...]:
    """The difference SAE of the same pair, and what the sham gives by the same method."""
    same_place = [d for d in trained if d.target == dictionary.target and d.seed == 0 and d != dictionary]
    return tuple(
        d
        for d in same_place
        if (d.pair == dictionary.pair and d.method == "difference SAE")
        or ((d.pair.instruct, d.pair.fine_tuned) == (BASE, SHAM) and d.method == dictionary.method)
    )


def causal_all(work: Work, trained: Sequence[Dictionary], target: Target) -> None:
    """Every experiment that is not there; one that was killed goes on with the patches that are missing."""
    missing = [e for e in experiments(trained, target) if not e.file(work).exists()]
    in_parallel(work, "causal", measure_one, missing, lambda found: found["shown"])


def measure_one(work: Work, experiment: Experiment) -> dict[str, Any]:
    """Nothing, the whole site, sets of rising size and their controls."""
    from crosscoder.interventions.causal_report import causal_report
    from crosscoder.interventions.halves import pair_of

    started = time.perf_counter()
    dictionary = experiment.dictionary
    n = work.plan.reply_questions if experiment.replies else work.plan.causal_questions
    asked, choose_on = _questions(work, dictionary.pair, n, only_added=experiment.replies)
    report = causal_report(
        load(work, dictionary),
        pair_of(load_pair(work, dictionary.pair.fine_tuned)),
        asked,
        choose_on,
        dictionary.target,
        experiment.file(work).parent,
        _config(work, experiment),
        {f"{d.method} of {d.pair.name}": load(work, d) for d in experiment.rivals},
        tokenizer=students.load_tokenizer(STUDENT),
    )
    measure = "accuracy" if experiment.replies else "divergence"
    place = ("ranked", "sufficiency", "other", "all", measure)
    names = ("kind", "direction", "carrier", "group", "measure")
    shares = [row["recovered"] for row in report["rows"] if tuple(row[name] for name in names) == place]
    shown = ", ".join("-" if value is None else f"{value:.0%}" for value in shares)
    return {"shown": f"recovered ({measure}): {shown}", "seconds": time.perf_counter() - started}


def _config(work: Work, experiment: Experiment) -> CausalConfig:
    from crosscoder.interventions.causal_report import CausalConfig

    if experiment.replies:
        return CausalConfig(
            sizes=CONTROL_SIZES,
            directions=("sufficiency",),
            n_random=0,
            generate_sizes=CONTROL_SIZES,
            max_new_tokens=160,
        )
    return CausalConfig(sizes=SIZES, control_sizes=CONTROL_SIZES, n_random=work.plan.random_sets)


def _questions(work: Work, pair: Pair, n: int, only_added: bool) -> tuple[list[Any], list[Document]]:
    """The first `n` of known and added families, which are scored, and later ones of added families to choose on."""
    from crosscoder.interventions.causal_rows import Asked

    kinds = pair.added if only_added else ("known", *pair.added)
    rows, documents = test_rows(work), all_documents(work)
    there = [(row, document) for row, document in zip(rows, documents, strict=True) if row.family_kind in kinds]
    asked = [Asked(document, row.family, row.family_kind, row.expected_answer) for row, document in there[:n]]
    rest = [document for row, document in there[n:] if row.family_kind in pair.added]
    return asked, rest[: work.plan.causal_questions // 2]


def csv_rows(
    work: Work, trained: Sequence[Dictionary], target: Target
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a patch, group of questions and measure; and the ranked sets among their random ones."""
    rows: list[dict[str, Any]] = []
    among: list[dict[str, Any]] = []
    for experiment in experiments(trained, target):
        report = read_json(experiment.file(work))
        described = {name: experiment.dictionary.described[name] for name in ("pair", "site", "method")}
        # The teacher-forced figures are those of the experiment with more questions.
        wanted = ("accuracy", "share_runs") if experiment.replies else ("divergence", "exact")
        # Random sets one by one are in the controls, as their mean and range.
        kept = [
            row
            for row in report["rows"]
            if row["group"] in GROUPS and row["measure"] in wanted and not row["kind"].startswith("random")
        ]
        rows += [described | {name: row[name] for name in COLUMNS} | _interval(row) for row in kept]
        among += [described | row for row in report["random"] if row["group"] in GROUPS and row["measure"] in wanted]
    return rows, among


def _interval(row: dict[str, Any]) -> dict[str, float | None]:
    low, high = row["interval"] or (None, None)
    return {"recovered_low": low, "recovered_high": high}
