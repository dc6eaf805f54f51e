"""The worked examples of few-shot prompts, invented pages in worked_examples.json: one list for each kind of data set.

FinQA's show what its questions ask most (percentage change, portions, averages, yes/no). FinQA-mini's use families
that pocket-mistral knows from pretraining alone, so that no prompt teaches what fine-tuning is to add. Those for
invented metrics (study/invented) show how a definition is followed, by formulas of one step that no metric has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finqa.task.records import Question


@dataclass(frozen=True)
class WorkedExample:
    """A question and the program that a good teacher writes for it."""

    question: Question
    code: str


def _example(pre_text: list[str], post_text: list[str], code: list[str], **others: Any) -> WorkedExample:
    """An entry of the file, where a text is a list of its lines, as in FinQA's raw schema."""
    return WorkedExample(Question("", "\n".join(pre_text), "\n".join(post_text), **others), "\n".join(code))


_FILE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FINQA_EXAMPLES, FINQA_MINI_EXAMPLES, INVENTED_EXAMPLES = (
    tuple(_example(**entry) for entry in _FILE[name]) for name in ("FinQA", "FinQA-mini", "invented")
)
