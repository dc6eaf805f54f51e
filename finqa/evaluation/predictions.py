"""The record that an evaluation keeps of each row, and the file of all records: predictions.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finqa.evaluation.generation import FinishReason
from finqa.runtime.errors import UserError
from finqa.runtime.paths import json_line, write_atomically
from finqa.sandbox.results import ERROR_KINDS
from finqa.task.answers import Rule

FILE = "predictions.jsonl"
AGAIN = "delete the run.json beside it and evaluate again"
PROMPT_TOO_LONG = "prompt-too-long"
PREDICTION_ERROR_KINDS = (*ERROR_KINDS, PROMPT_TOO_LONG)
"""Every reason for which a row can be without an answer."""


@dataclass(frozen=True)
class Sample:
    """One of several replies to a prompt."""

    reply: str
    code: str
    answer: float | str | bool | None
    correct: bool
    """Under the strict rule."""
    error_kind: str | None
    n_new_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Prediction:
    """One question, what the model wrote for it, and whether that is right.

    With several samples reply, code, answer and finish reason are those of the first sample that gave the answer most
    of them agree on (of the first sample where none has an answer).
    """

    id: str
    prompt_hash: str
    """sha256 of the prompt's token ids."""
    reply: str
    code: str
    answer: float | str | bool | None
    """What the code gave; None where it gave nothing."""
    expected: str
    correct: dict[Rule, bool]
    """Verdict under each answer rule."""
    error_kind: str | None
    """One of PREDICTION_ERROR_KINDS; None where the code ran."""
    error_message: str
    n_prompt_tokens: int
    n_new_tokens: int
    """Tokens of the reply; of all samples where there are several."""
    finish_reason: FinishReason
    program_steps: int | None
    """Steps of the gold program; None where there is none."""
    teacher_solved: bool | None
    """Whether the teacher's program gave the label; None where no teacher was asked."""
    family: str = ""
    family_kind: str = ""
    answer_kind: str = ""
    """A finqa.task.stated_answers.AnswerKind; empty in files from before it was recorded."""
    label_disputed: bool | None = None
    """Whether the annotator's stated answer contradicts the label; None where there is none, or it was not recorded."""
    samples: tuple[Sample, ...] | None = None
    """None for a greedy reply."""


def prompt_hash(ids: Sequence[int]) -> str:
    """sha256 of a prompt's token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl, one row a line; `samples` is left out where there is but one reply."""
    rows = ({k: v for k, v in asdict(row).items() if k != "samples" or v is not None} for row in predictions)
    write_atomically(folder / FILE, "".join(map(json_line, rows)))


def read_predictions(folder: Path) -> list[Prediction]:
    """The inverse of `write_predictions`. Raises UserError where the file is missing or damaged."""
    path, found = folder / FILE, []
    if not path.exists():
        raise UserError(f"{path} is missing; {AGAIN}")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            found += [_prediction(json.loads(line))] if line else []
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number}: no whole prediction; {AGAIN}") from None
    return found


def _prediction(row: dict) -> Prediction:
    samples = row.pop("samples", None)
    return Prediction(**row, samples=None if samples is None else tuple(Sample(**sample) for sample in samples))
