"""The evaluations of one student that are on disk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finqa.prompts import EVAL_TYPES
from finqa.scoring.predictions import Prediction, read_predictions

ORDER = ("zero-shot", "few-shot", "fine-tuned")
assert set(ORDER) == set(EVAL_TYPES)
SAMPLED = re.compile(rf"({'|'.join(ORDER)})-(\d+)-samples")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation as its folder has it."""

    name: str
    """Of its folder: the eval type, and after it `-<n>-samples` where answers were voted on."""
    metrics: dict[str, Any]
    predictions: list[Prediction]

    @property
    def eval_type(self) -> str:
        sampled = SAMPLED.fullmatch(self.name)
        return sampled[1] if sampled else self.name

    @property
    def sampled(self) -> bool:
        return self.name != self.eval_type


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The finished evaluations in the folder of a split, in the order in which they are shown."""
    return [
        Evaluation(name, json.loads((folder / name / "metrics.json").read_text()), read_predictions(folder / name))
        for name in _names(folder)
        # run.json is written last: without it the others may be of two evaluations.
        if (folder / name / "metrics.json").exists() and (folder / name / "run.json").exists()
    ]


def _names(folder: Path) -> list[str]:
    """Greedy evaluations, each followed by those with samples, the fewest first."""
    found = [match for path in folder.glob("*-samples") if (match := SAMPLED.fullmatch(path.name))]
    names: list[str] = []
    for eval_type in ORDER:
        names.append(eval_type)
        names += [match[0] for match in sorted(found, key=lambda match: int(match[2])) if match[1] == eval_type]
    return names


def families(evaluations: list[Evaluation]) -> list[str]:
    """Known families before new ones, each in the order of names."""
    kinds: dict[str, str] = {}
    for e in evaluations:
        kinds |= {family: group.get("kind", "") for family, group in e.metrics.get("by_family", {}).items()}
    return sorted(kinds, key=lambda family: (kinds[family], family))
