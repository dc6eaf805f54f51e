"""The evaluations of one student that are on disk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finqa.evaluation.predictions import AGAIN, Prediction, read_predictions
from finqa.runtime.errors import UserError
from finqa.task.prompts import EVAL_TYPES

NAME = re.compile(rf"({'|'.join(EVAL_TYPES)})(?:-(\d+)-samples)?")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation as its folder has it."""

    name: str
    """Name of its folder: the eval type, and after it `-<n>-samples` where answers were voted on."""
    metrics: dict[str, Any]
    predictions: list[Prediction]

    @property
    def eval_type(self) -> str:
        return next(eval_type for eval_type in EVAL_TYPES if self.name.startswith(eval_type))

    @property
    def sampled(self) -> bool:
        return self.name != self.eval_type


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The finished evaluations in the folder of a split: by eval type, greedy ones before those with samples.

    Raises UserError where one is damaged.
    """
    # run.json is written last: without it the others may be of two evaluations.
    whole = [path.parent for path in folder.glob("*/run.json") if path.with_name("metrics.json").exists()]
    found = {path: name for path in whole if (name := NAME.fullmatch(path.name))}
    shown = sorted(found, key=lambda path: (EVAL_TYPES.index(found[path][1]), int(found[path][2] or 0)))
    return [_read(path) for path in shown]


def _read(folder: Path) -> Evaluation:
    predictions = read_predictions(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except ValueError:
        raise UserError(f"{folder / 'metrics.json'} is damaged; {AGAIN}") from None
    if metrics["n"] != len(predictions):
        raise UserError(f"{folder} has {len(predictions)} predictions of {metrics['n']}; {AGAIN}")
    return Evaluation(folder.name, metrics, predictions)


@dataclass(frozen=True)
class Grouping:
    """One way in which metrics.json divides the questions."""

    key: str
    """Its key in metrics.json."""
    column: str
    title: str
    note: str = ""

    def of(self, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
        """The figures of each group by its name; empty where the evaluation has none."""
        return evaluation.metrics.get(self.key, {})

    def names(self, evaluations: list[Evaluation]) -> list[str]:
        """The groups that any evaluation has: known families before new ones, each in the order of names."""
        names = {name for e in evaluations for name in self.of(e)}
        return sorted(names, key=lambda name: (self.kind(evaluations, name), len(name) if name.isdigit() else 0, name))

    def kind(self, evaluations: list[Evaluation], name: str) -> str:
        """`known` or `new` for a question family; else empty."""
        if self.key != "by_family":
            return ""
        return next((group.get("kind", "") for e in evaluations if (group := self.of(e).get(name))), "")


FAMILIES = Grouping(
    "by_family",
    "family",
    "By question family",
    "The base model knows the *known* families from its pretraining; the *new* ones are what fine-tuning adds.",
)
ANSWER_KINDS = Grouping("by_answer_kind", "answer", "By the kind of answer that is asked for")
STEPS = Grouping("by_steps", "steps", "By the number of steps of the gold program")
GROUPINGS = (FAMILIES, ANSWER_KINDS, STEPS)
