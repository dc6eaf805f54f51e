"""What an evaluation leaves of each row, and its file: predictions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finqa.answers import Rule
from finqa.paths import write_atomically

FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One question, what the model wrote for it, and whether that is right."""

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
    """From the sandbox, or `prompt-too-long`; None where the code ran."""
    error_message: str
    n_prompt_tokens: int
    n_new_tokens: int
    finish_reason: str
    program_steps: int | None
    """Steps of the gold program; None where there is none."""
    teacher_solved: bool | None
    """Whether the teacher's program gave the label; None where no teacher was asked."""
    family: str = ""
    family_kind: str = ""


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl, one row a line."""
    # Escaped to ASCII: a reply can hold half a surrogate pair, which no UTF-8 file can.
    write_atomically(folder / FILE, "".join(json.dumps(asdict(row)) + "\n" for row in predictions))


def read_predictions(folder: Path) -> list[Prediction]:
    """The inverse of `write_predictions`."""
    return [Prediction(**json.loads(line)) for line in (folder / FILE).read_text().split("\n") if line]
