"""What D1 would say by other rules: a test of whether its cuts make the verdict.

Reads the scores of the items (diff/pairs.py, the .npz files), which stay where the study ran, and gives the lines of
objections.csv: a line a method, form, fine-tune and rule, with the mean hit rate where a metric was added and where it
was not; then the means over fine-tunes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from crosscoder.activations.readers import Target
from study.invented.diff.items import Board, board, item_rows
from study.invented.diff.plan import ADDED, DIRECTIONS, LENS, LOGITS, PAIRS, lengths, results_of, subjects
from study.invented.files import Item, read_items
from study.invented.plan import Plan
from study.invented.verdicts import FALSE_ALARMS, HIT_AUROC, HIT_RECALL, TOLERANCE

Row = dict[str, Any]
ALL = "all"
"""In the place of an arm: the mean over fine-tunes."""


@dataclass(frozen=True)
class Cut:
    """When a metric counts as hit."""

    name: str
    auroc: float = HIT_AUROC
    recall: float = HIT_RECALL
    false_alarms: float = FALSE_ALARMS
    items: int | None = None
    """How many of a method's items, from the first; None is all that it has."""
    exchanged: bool = False
    """The pages that choose and those that score change places."""
    centred: bool = False
    """Each page's mean over the metrics is taken from its scores, which AUROC within pages does not see."""

    def rows(self, found: Board, signed: bool) -> list[Row]:
        """The rows of `item_rows`, with the hits of this cut."""
        scores = found.scores - found.scores.mean(dim=1, keepdim=True) if self.centred else found.scores
        found = replace(found, scores=scores[..., : self.items], choose=found.choose != self.exchanged)
        rows = item_rows(found, signed, range(found.scores.shape[-1]), self.false_alarms)
        return [row | {"hit": self._is_hit(row["auroc"], row["recall"])} for row in rows]

    def _is_hit(self, auroc: float, recall: float) -> bool:
        return auroc >= self.auroc - TOLERANCE and recall >= self.recall - TOLERANCE


CUTS = (
    Cut("as fixed"),
    Cut("AUROC 0.8", auroc=0.8),
    Cut("AUROC 0.95", auroc=0.95),
    Cut("AUROC alone", recall=0.0),
    Cut("AUROC 0.8 alone", auroc=0.8, recall=0.0),
    Cut("1% false alarms", false_alarms=0.01),
    Cut("10% false alarms", false_alarms=0.10),
    Cut("first 5 items", items=5),
    Cut("first 10 items", items=10),
    Cut("halves exchanged", exchanged=True),
    Cut("page means taken out", centred=True),
)


def objection_rows(plan: Plan, primary: Target) -> list[Row]:
    """The lines of objections.csv, from all scores at the primary site that are there."""
    asked = [item for item in read_items(plan.place) if item.split == "test" and item.kind in ADDED]
    hits: dict[tuple[str, str, str, str, int], list[Row]] = {}
    for named, found, signed in _boards(plan, primary, asked):
        for cut in CUTS:
            key = (cut.name, named["method"], named["form"], named["arm"], named["seed"])
            hits.setdefault(key, []).extend(cut.rows(found, signed))
    lines = []
    for key, rows in hits.items():
        line: Row = dict(zip(("rule", "method", "form", "arm", "seed"), key, strict=True))
        for name, added in (("added", True), ("absent", False)):
            its = [row["hit"] for row in rows if (row["kind"] == line["arm"]) == added]
            line[name] = sum(its) / len(its)
        lines.append(line)
    return [*lines, *_means(lines)]


def _means(lines: list[Row]) -> Iterator[Row]:
    """A line a rule, method and form over all fine-tunes, whose arm is `all`."""
    for rule, method, form in dict.fromkeys((line["rule"], line["method"], line["form"]) for line in lines):
        own = [line for line in lines if (line["rule"], line["method"], line["form"]) == (rule, method, form)]
        means = {name: sum(line[name] for line in own) / len(own) for name in ("added", "absent")}
        yield {"rule": rule, "method": method, "form": form, "arm": ALL, "seed": None, **means}


def _boards(plan: Plan, primary: Target, asked: list[Item]) -> Iterator[tuple[Row, Board, bool]]:
    """What names a subject's scores, the scores of its items by energy, and whether their sign counts."""
    for pair in (pair for pair in PAIRS if pair.arm in ADDED and pair.seed in lengths(plan).fine_tunes):
        for subject in [*subjects(plan, pair, "diff"), *subjects(plan, pair, "seeds")]:
            path = results_of(plan, pair, primary, subject).with_suffix(".npz")
            scores = np.load(path).get(f"energy, {pair.arm}") if path.exists() else None
            if scores is not None:
                empty = board(torch.zeros(len(asked), 1, dtype=torch.float64), asked)
                named = {"method": subject.method, "form": subject.form, "arm": pair.arm, "seed": pair.seed}
                signed = subject.method in (*DIRECTIONS, LENS, LOGITS)
                yield named, replace(empty, scores=torch.from_numpy(scores).double()), signed
