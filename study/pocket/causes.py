"""What latents cause: sets of them put into the base model.

Only that way: whatever is taken out of a fine-tuned model does harm, which would count as recovered.

Every set is held against others of the same injected norm, the root mean square length of what is added over the
questions that are scored: random sets of the same dictionary, random directions, principal components of the
difference, the dictionary's untrained and frozen-decoder forms, and the same method's latents of base to sham.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target
from finqa.models import students
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.manifest import write_json
from study.pocket.ceilings import load_pair, test_rows
from study.pocket.dictionaries import Dictionary, load
from study.pocket.measures import all_documents
from study.pocket.plan import BASE, FINE_TUNED, SHAM, STUDENT, Pair
from study.work import Work, in_parallel, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.collection import Document
    from crosscoder.interventions.sets import Addition, Reading

METHODS = ("plain", "difference SAE")
SIZES, CONTROL_SIZE = (1, 4, 16, 64), 16
"""Latents in a set; those of the controls, of which there are many."""
COMPONENTS = (4, 16)
"""Principal components in a set."""
EQUAL_NORM = ", equal norm"
MAX_NEW_TOKENS = 160
GROUPS = ("all", "known", "new", "other")
COLUMNS = (
    "kind", "n_latents", "seed", "direction", "carrier", "positions", "group", "measure", "n", "value", "none",
    "ceiling", "recovered", "injected_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One report on a dictionary."""

    dictionary: Dictionary
    rivals: tuple[tuple[str, Dictionary], ...]
    """Whose latents are patched beside its own, by what they are called."""
    replies: bool
    """Whether replies are written and their programs run, on fewer questions; else gold programs, teacher-forced."""

    @property
    def name(self) -> str:
        how = "replies" if self.replies else "teacher-forced"
        return f"{self.dictionary.pair.name}, {self.dictionary.method}, {how}"

    def file(self, work: Work) -> Path:
        folder = "causal-replies" if self.replies else "causal"
        return work.measure(self.dictionary.name) / folder / "causal.json"


class Matched:
    """An addition times one number, which gives it the injected norm of another one."""

    def __init__(self, addition: Addition, factor: float, kind: str):
        self.addition, self.factor, self.reads = addition, factor, addition.reads
        self.label = {**addition.label, "kind": kind, "factor": float(f"{factor:.6g}")}

    def __call__(self, reading: Reading) -> Tensor:
        return self.factor * self.addition(reading)


def experiments(trained: Sequence[Dictionary], target: Target) -> list[Experiment]:
    """The causal experiments of the pairs that ask for them, the longest first; one fine-tune has replies."""
    chosen = [
        d
        for d in trained
        if d.pair.causal and d.target == target and d.form == "trained" and d.method in METHODS
    ]  # fmt: skip
    return [
        Experiment(d, _rivals(d, trained), replies)
        for replies in (False, True)
        for d in chosen
        if not replies or d.pair.fine_tuned == FINE_TUNED
    ]


def _rivals(dictionary: Dictionary, trained: Sequence[Dictionary]) -> tuple[tuple[str, Dictionary], ...]:
    """The other forms of the same dictionary, and what the sham gives by the same method."""
    alike = [d for d in trained if (d.target, d.method) == (dictionary.target, dictionary.method)]
    forms = [(d.form, d) for d in alike if d.pair == dictionary.pair and d.form != "trained"]
    shams = [d for d in alike if (d.pair.instruct, d.pair.fine_tuned, d.form) == (BASE, SHAM, "trained")]
    return (*forms, *(("sham", d) for d in shams))


def causal_all(work: Work, trained: Sequence[Dictionary], target: Target) -> None:
    """Every experiment that is not there; one that was killed goes on with the patches that are missing."""
    missing = [e for e in experiments(trained, target) if not e.file(work).exists()]
    in_parallel(work, "causal", measure_one, missing, lambda found: found["shown"])


def measure_one(work: Work, experiment: Experiment) -> dict[str, Any]:
    """Nothing, the whole site, sets of rising size and their controls."""
    from crosscoder.interventions import causal_rows
    from crosscoder.interventions.causal import Cell, experiment_key, measure_missing
    from crosscoder.interventions.halves import pair_of

    started = time.perf_counter()
    dictionary = experiment.dictionary
    n = work.plan.reply_questions if experiment.replies else work.plan.causal_questions
    asked, choose_on = _questions(work, dictionary.pair, n, only_added=experiment.replies)
    documents = [one.document for one in asked]
    pair, target = pair_of(load_pair(work, dictionary.pair.fine_tuned)), dictionary.target
    folder = experiment.file(work).parent
    folder.mkdir(parents=True, exist_ok=True)
    additions = _sets(work, experiment, pair, documents, choose_on, folder)
    carriers: tuple[Any, ...] = ("own", "other")
    cells = [Cell(addition, "sufficiency", carrier) for addition in additions for carrier in carriers]
    key = experiment_key(pair, target, documents, "gold programs")
    with KeyedJournal(folder / "cells.jsonl") as journal:
        measured = measure_missing(pair, target, documents, cells, journal, key)
        replies: dict[int, dict[str, list[int]]] = {}
        if experiment.replies:
            replies = generated(pair, target, asked, cells, journal, key)
    report = causal_rows.rows_of(asked, cells, measured, replies, seed=0)
    write_json(experiment.file(work), {"n_questions": len(asked), "n_choosing": len(choose_on), **report})
    measure = "accuracy" if experiment.replies else "divergence"
    place = ("ranked", "sufficiency", "own", "all", measure)
    names = ("kind", "direction", "carrier", "group", "measure")
    shares = [row["recovered"] for row in report["rows"] if tuple(row[name] for name in names) == place]
    shown = ", ".join("-" if value is None else f"{value:.0%}" for value in shares)
    return {"shown": f"recovered ({measure}): {shown}", "seconds": time.perf_counter() - started}


def generated(
    pair: Any, target: Target, asked: Sequence[Any], cells: Sequence[Any], journal: KeyedJournal, experiment: str
) -> dict[int, dict[str, list[int]]]:
    """`right` and `runs` of each question, by number of the cell; from the journal where they are there.

    Nothing, the whole site, the sets of CONTROL_SIZE and their controls write replies; random ones do not.
    """
    from crosscoder.interventions.causal import cell_key
    from crosscoder.interventions.patched_generation import answered, patched_replies
    from finqa.sandbox.running import Sandbox

    tokenizer = students.load_tokenizer(STUDENT)
    prompts = [list(one.document.ids[: one.document.n_prompt]) for one in asked]
    results = {}
    for number, cell in enumerate(cells):
        how = {**cell.label, "max_new_tokens": MAX_NEW_TOKENS}
        if how["n"] not in (0, CONTROL_SIZE) or how["kind"].startswith("random"):
            continue
        key = cell_key(experiment, "generated", how)
        if key not in journal.found:
            replies = patched_replies(pair, target, cell, prompts, tokenizer, MAX_NEW_TOKENS)
            with Sandbox() as sandbox:
                verdicts = answered(replies, [one.expected for one in asked], sandbox)
            as_numbers = {name: [int(v) for v in values] for name, values in asdict(verdicts).items()}
            journal.add(key, {"what": "generated", **how, **as_numbers})
        results[number] = {name: journal.found[key][name] for name in ("right", "runs")}
    return results


def _sets(
    work: Work, experiment: Experiment, pair: Any, documents: list[Document], choose_on: list[Document], folder: Path
) -> list[Addition]:
    """The sets, chosen on other questions, and their controls at the injected norm of the set of CONTROL_SIZE."""
    from crosscoder.interventions import ranking
    from crosscoder.interventions.causal_report import kept_survey
    from crosscoder.interventions.sets import (
        Components,
        Constant,
        Latents,
        Nothing,
        RandomDirections,
        Whole,
        matched_set,
    )

    target = experiment.dictionary.target

    def survey(of: Any) -> ranking.Survey:
        return kept_survey(folder, of, pair, choose_on, target)

    dictionary = load(work, experiment.dictionary)
    found = survey(dictionary)
    order = ranking.by_effect(found)
    chosen = order[:CONTROL_SIZE]
    ranked = [Latents(dictionary, order[:n], "ranked") for n in ((CONTROL_SIZE,) if experiment.replies else SIZES)]
    others: list[Addition] = [Components(found.components(n).float()) for n in COMPONENTS]
    for name, rival in experiment.rivals:
        of = load(work, rival)
        others.append(Latents(of, ranking.by_effect(survey(of))[:CONTROL_SIZE], name))
    random_sets: list[Addition] = []
    directions: list[Addition] = []
    if not experiment.replies:
        others.append(Constant("mean difference", found.mean_difference.float()))
        for seed in range(work.plan.random_sets):
            drawn = matched_set(chosen, found.frequency, found.injected, found.alive, seed)
            random_sets += [Latents(dictionary, drawn, "random sets", seed)] if drawn else []
            directions.append(RandomDirections(dictionary, chosen, seed))
    wanted, *norms = injected_norms(pair, target, documents, [Latents(dictionary, chosen), *others, *random_sets])
    matched = [
        Matched(addition, wanted / norm, kind if kind == "random sets" else kind + EQUAL_NORM)
        for addition, norm in zip([*others, *random_sets], norms, strict=True)
        if norm > 0
        for kind in [str(addition.label["kind"])]
    ]
    return [Nothing(), Whole(), *ranked, *others, *matched, *directions]


def injected_norms(
    pair: Any, target: Target, documents: Sequence[Document], additions: Sequence[Addition]
) -> list[float]:
    """The root mean square length of what each adds, over the positions that a patch of these documents changes."""
    import torch

    from crosscoder.interventions.patching import BATCH_TOKENS, batches, run_halves
    from crosscoder.interventions.ranking import reading_of

    squares, n = torch.zeros(len(additions), dtype=torch.float64), 0
    with torch.no_grad():
        for _, batch in batches(documents, pair.instruct.device, BATCH_TOKENS):
            reading = reading_of(run_halves(pair, batch, [target.layer]), target)
            n += len(reading.pairs)
            squares += torch.stack([addition(reading).double().square().sum().cpu() for addition in additions])
    return (squares / n).sqrt().tolist()


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
        described |= {"compared": experiment.dictionary.pair.compared}
        # The teacher-forced figures are those of the experiment with more questions.
        wanted = ("accuracy", "share_runs") if experiment.replies else ("divergence", "exact")
        kept = [
            row
            for row in report["rows"]
            # Random sets are many: of the families that were added alone.
            if row["group"] in (experiment.dictionary.pair.added if row["kind"].startswith("random") else GROUPS)
            and row["measure"] in wanted
        ]
        rows += [described | {name: row[name] for name in COLUMNS} | _interval(row) for row in kept]
        among += [described | row for row in report["random"] if row["group"] in GROUPS and row["measure"] in wanted]
    return rows, among


def _interval(row: dict[str, Any]) -> dict[str, float | None]:
    low, high = row["interval"] or (None, None)
    return {"recovered_low": low, "recovered_high": high}
