"""All of one pair of models at one site: what every method's items tell and carry, a file for each subject.

R/invented/<model>/diff/<site>/<run>/<method>-<form>-<seed>.json holds `quality` of a dictionary, `items` (a row a
metric and ranking), `carried` (a row a metric and set) and `explored` (so too, but for no verdict). A file that is
there is not made again. Beside it lies <...>.npz with what the rows of `items` were computed from: for each ranking and
arm that was read, such as "energy, A", the scores [pages, metrics, items] fp32; none for "any item". Activations are
recorded only where a file is missing, and deleted when all are there; of the dictionaries the trained ones of the first
seed at the primary site stay where metrics were added.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.readers import Target
from crosscoder.dictionaries.model import random_directions
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.progress import say
from study.adapter_directions import output_directions, strongest, weight_directions
from study.invented.diff import dictionaries as dicts
from study.invented.diff import readings, sources
from study.invented.diff.carrying import Carrier, PutIn
from study.invented.diff.ceilings import asked_of, load_models
from study.invented.diff.items import Board, best_items, board, item_rows, question_means, read_elsewhere
from study.invented.diff.plan import (
    ADAPTER,
    ADDED,
    ANY_ITEM,
    BY_NU,
    COMPONENTS,
    DIVERGENCE,
    ENDS,
    ENERGY,
    LENS,
    LOGITS,
    NORM,
    RANDOM,
    READ_TOO,
    TOP,
    WITHOUT,
    Compared,
    Form,
    Part,
    Subject,
    is_of,
    lengths,
    results_of,
    site_name,
    subjects,
)
from study.invented.files import read_metrics
from study.invented.plan import Plan


def compare(plan: Plan, compared: Compared, target: Target, part: Part, method: str) -> str:
    """Make the files of a part that are missing, of a method or BASELINES or, with an empty name, of all; returns a
    line that says what there is."""
    wanted = [one for one in subjects(plan, compared, part) if is_of(one, method)]
    if missing := _missing(plan, compared, target, wanted):
        under_way = Comparison(plan, compared, target, part)
        for subject in missing:
            say(f"reading {subject.name} of {compared.run} at {site_name(target)}")
            path, found = results_of(plan, compared, target, subject), under_way.results(subject)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path.with_suffix(".npz"), **under_way.scores)
            write_json(path, found)
            print(f"{compared.run} at {site_name(target)}: {subject.name}", flush=True)
    if not _missing(plan, compared, target, _all_subjects(plan, compared, part)):
        dicts.forget(plan, compared, target)
        readings.looks_path(plan, compared, target).unlink(missing_ok=True)
    return f"{compared.run} at {site_name(target)}: {len(wanted)} subjects"


def record(plan: Plan, compared: Compared, target: Target) -> str:
    """Record a pair for the jobs that share it, unless they have nothing left to do; returns a line that says so.

    Raises UserError where a gate does not hold: what is recorded is for dictionaries alone.
    """
    main = compared.arm in ADDED
    if main and not _missing(plan, compared, target, _all_subjects(plan, compared, "diff")):
        return f"{compared.run}: all files are there"
    dicts.check_gates(plan)
    return dicts.recorded(plan, compared, target).name


def look(plan: Plan, compared: Compared, target: Target) -> str:
    """Read the test questions by a pair and by those that its items are read on too, for the jobs that share that."""
    if _missing(plan, compared, target, _all_subjects(plan, compared, "diff")):
        readings.looks(plan, compared, target)
    return f"{compared.run}: the test questions are read"


def train(plan: Plan, compared: Compared, target: Target, method: str) -> str:
    """Train a method's dictionaries of a pair whose files are missing, for the jobs that read them; returns a line."""
    wanted = [one for one in subjects(plan, compared, "diff") if one.method == method]
    if missing := _missing(plan, compared, target, wanted):
        store = dicts.shared_store(plan, compared, target)
        for subject in missing:
            made = dicts.of_pair(plan, store, compared, target, subject)
            folder = dicts.folder_of(plan, compared, target) / subject.name
            sources.ranked(folder, made.model, store, students.default_device())
            print(f"{compared.run} at {site_name(target)}: {subject.name} is trained", flush=True)
    return f"{compared.run} at {site_name(target)}: {method}"


def _all_subjects(plan: Plan, compared: Compared, part: Part) -> list[Subject]:
    """What reads one recording: the subjects of all parts at a site."""
    parts: tuple[Part, ...] = ("sites",) if part == "sites" else ("diff", "seeds")
    return [one for part in parts if part != "seeds" or compared.arm in ADDED for one in subjects(plan, compared, part)]


def _missing(plan: Plan, compared: Compared, target: Target, wanted: Sequence[Subject]) -> list[Subject]:
    return [one for one in wanted if not results_of(plan, compared, target, one).exists()]


class Comparison:
    """One pair at one site, with what its subjects share; each part is made when it is first asked for."""

    def __init__(self, plan: Plan, compared: Compared, target: Target, part: Part):
        self.plan, self.compared, self.target, self.part = plan, compared, target, part
        self.scores: dict[str, Any] = {}
        """Of the subject at hand, by ranking and arm."""
        self.orders: dict[str, list[int]] = {}
        """The items of every source that was ranked; each takes a pass over all activations."""
        self.carries = part == "diff" and compared.arm in ADDED
        self.lengths, self.device = lengths(plan), students.default_device()
        self.folder = dicts.folder_of(plan, compared, target)
        self.questions = asked_of(plan, "test", ("A", "B"))
        self.models = load_models(plan, compared)
        self.looks = readings.looks(plan, compared, target, self.models)

    def results(self, subject: Subject) -> dict[str, Any]:
        """What the file of a subject holds."""
        self.scores = {}
        if subject.method == ENDS:
            return self.carrier.ends()
        if subject.method in WITHOUT and subject.method != LENS:
            return {"items": list(self._rows_of_figures(subject.method))}
        return self._of_directions(subject) if subject.form == "baseline" else self._of_dictionary(subject)

    def _of_directions(self, subject: Subject) -> dict[str, Any]:
        source, reads = self._directions(subject.method)
        if source is None:
            return {"items": []}
        order = self._by_energy(subject.method, source)
        found = {"items": list(self._rows(source, order, ENERGY, [reads[i] if reads else i for i in order]))}
        if self.carries:
            carrier, own = self.carrier, source.addition(order)
            sets = {"carried": [carrier.carried(own, subject.method, "baseline", others=True)]}
            if subject.method in (COMPONENTS, RANDOM):
                sets["carried"] += carrier.sweep(own, subject.method, subject.form)
            if subject.method == COMPONENTS:
                sets["explored"] = list(carrier.explored_components(self.looks.basis))
            found |= carrier.rows(sets)
        return found

    def _of_dictionary(self, subject: Subject) -> dict[str, Any]:
        made = self._dictionary(subject)
        source = sources.OfDictionary(made.model)
        order = self._by_energy(subject.name, source)
        rows = list(self._rows(source, order, ENERGY, order))
        by_nu: list[int] = []
        exclusive = self._ranked(subject.name, source).exclusive
        if exclusive is not None:
            rows += self._rows(source, by_nu := sources.top(exclusive, TOP), BY_NU, by_nu)
        rows += self._rows_of_any(source)
        found = {"quality": made.quality, "items": rows, "carried": []}
        if self.carries:
            told = sorted({row["item"] for row in rows
                           if (row["ranking"], row["kind"]) == (ANY_ITEM, self.compared.arm)})  # fmt: skip
            orders = {ENERGY: self._by_energy(subject.name, source, None), BY_NU: by_nu, ANY_ITEM: told}
            carried = self._carried(subject, source, order) if subject.form == "trained" else ()
            explored = self.carrier.explored_dictionary(source, subject.method, subject.form, orders)
            found |= self.carrier.rows({"carried": carried, "explored": explored})
        if subject.form == "frozen" or (subject.form == "trained" and not self.carries):
            self._delete(subject)
        return found

    # What subjects share

    @cached_property
    def store(self) -> Any:
        return dicts.shared_store(self.plan, self.compared, self.target)

    @cached_property
    def carrier(self) -> Carrier:
        return Carrier(self.models, self.target, self.questions, self.compared.arm)

    @cached_property
    def components(self) -> sources.Directions:
        return sources.Directions(self.looks.basis[:TOP])

    def _ranked(self, name: str, source: sources.OfDictionary) -> sources.Ranked:
        return sources.ranked(self.folder / name, source.model, self.store, self.device)

    # Items

    def _by_energy(self, name: str, source: sources.Source, n: int | None = TOP) -> list[int]:
        if name not in self.orders:
            if isinstance(source, sources.OfDictionary):
                injected = self._ranked(name, source).energies
            elif source is self.components:
                injected = self.looks.energies
            else:
                injected = sources.energies(source, self.store, self.device)
            self.orders[name] = sources.top(injected, len(injected))
        return self.orders[name][:n]

    def _rows(
        self, source: sources.Source, order: Sequence[int], ranking: str, names: Sequence[Any]
    ) -> Iterator[dict[str, Any]]:
        boards = {arm: self._board(looked, source, order) for arm, looked in self.looks.of.items()}
        rows = item_rows(boards[self.compared.arm], source.signed, names, by_recall=ranking == ANY_ITEM)
        return self._with_others(rows, boards, ranking)

    def _rows_of_any(self, source: sources.OfDictionary) -> Iterator[dict[str, Any]]:
        best = best_items(self._board(self.looks.of[self.compared.arm], source, range(source.n)))
        return self._rows(source, best, ANY_ITEM, best)

    @torch.no_grad()
    def _board(self, looked: readings.Looked, source: sources.Source, order: Sequence[int]) -> Board:
        parts = (
            source.values(sources.Reading(part.to(self.device)))[:, list(order)]
            for part in looked.pairs.split(sources.READ_AT_ONCE)
        )
        return self._on_board(looked, parts)

    def _on_board(self, looked: readings.Looked, values: Iterable[Tensor]) -> Board:
        means = question_means(values, looked.question, looked.n)
        return board(means, [item for item, _ in self.questions])

    def _rows_of_figures(self, method: str) -> Iterator[dict[str, Any]]:
        """Rows of methods without directions: one figure per token, or the logits of the mined tokens."""

        def values(looked: readings.Looked) -> Tensor:
            if method == NORM:
                return (looked.pairs[:, 1].float() - looked.pairs[:, 0].float()).norm(dim=-1, keepdim=True)
            return looked.divergence[:, None] if method == DIVERGENCE else looked.logits

        boards = {arm: self._on_board(looked, [values(looked)]) for arm, looked in self.looks.of.items()}
        mined = self.looks.mined.tolist() if method == LOGITS else []
        names = [repr(self.models.tokenizer.decode([i])) for i in mined] or [method]
        return self._with_others(item_rows(boards[self.compared.arm], method == LOGITS, names), boards, ENERGY)

    def _with_others(
        self, rows: Sequence[dict[str, Any]], boards: dict[str, Board], ranking: str
    ) -> Iterator[dict[str, Any]]:
        """The rows with what their items do in the pairs that are read too."""
        if ranking != ANY_ITEM:
            self.scores |= {f"{ranking}, {arm}": board.scores.float().numpy() for arm, board in boards.items()}
        others = {arm: boards[arm] for arm in READ_TOO.get(self.compared.arm, ())}
        return ({"ranking": ranking, **row} for row in read_elsewhere(rows, others, read_metrics(self.plan.place)))

    def _directions(self, method: str) -> tuple[sources.Directions | None, list[str]]:
        """The source of a baseline, None where there is none; and what its items read as, where that is more than a
        number."""
        if method == COMPONENTS:
            return self.components, []
        if method == RANDOM:
            generator = torch.Generator().manual_seed(self.compared.seed)
            drawn = random_directions(self.lengths.random, self.store.config.d_model, 1.0, generator)
            return sources.Directions(drawn), []
        if method == LENS:
            basis = readings.lens_directions(self.models.pair, self.target, self.models.tokenizer)
            return sources.Directions(basis), readings.lens_tokens(self.models.pair, basis, self.models.tokenizer)
        adapted = self.models.adapted
        try:
            documents = readings.some_documents(self.plan, self.models.tokenizer)
            found = weight_directions(adapted) if method == ADAPTER else output_directions(adapted, documents)
            basis = strongest(found, TOP, self.target)
        except UserError as error:  # the adapter does not write there
            print(f"{method}: {error}", flush=True)
            return None, []
        return sources.Directions(basis), []

    # Dictionaries

    def _dictionary(self, subject: Subject) -> dicts.Trained:
        return dicts.of_pair(self.plan, self.store, self.compared, self.target, subject)

    def _delete(self, subject: Subject) -> None:
        """Delete a subject's dictionary, and the untrained form that it was compared with."""
        for one in (subject, replace(subject, form="untrained")):
            shutil.rmtree(self.folder / one.name, ignore_errors=True)

    # Carrying

    def _carried(self, subject: Subject, source: sources.Source, order: Sequence[int]) -> Iterator[PutIn]:
        """A trained subject's own set, components and its untrained form at the same norm, and the sweep of the
        figure."""
        carrier, own = self.carrier, source.addition(order)
        yield carrier.carried(own, subject.method, subject.form, others=True)
        norm = carrier.norm(own)
        its = replace(subject, form="untrained")
        untrained = sources.OfDictionary(self._dictionary(its).model)
        rivals: list[tuple[str, Form, str, sources.Source]] = [
            (COMPONENTS, "baseline", COMPONENTS, self.components),
            (subject.method, "untrained", its.name, untrained),
        ]
        for method, form, name, rival in rivals:
            scaled, factor = carrier.scaled_to(rival.addition(self._by_energy(name, rival)), norm)
            yield carrier.carried(scaled, method, form, scaled_to=subject.method, factor=factor)
        yield from carrier.sweep(own, subject.method, subject.form)
