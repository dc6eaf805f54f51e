"""The table of data sets: how each is loaded, its answer rule, its worked examples.

A second data set is one entry in `DATASETS` and a loader: a function from the raw file of a split to the questions
in it and the rows it had to drop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from finqa.runtime.commands import make_data, typed
from finqa.runtime.errors import UserError, nearest
from finqa.runtime.paths import SPLITS, Folders
from finqa.task.answers import Rule, normalise
from finqa.task.program_compiler import ProgramStyle
from finqa.task.prompts import FINQA_INSTRUCTION, INSTRUCTION
from finqa.task.records import Question, Table, cell_text
from finqa.task.stated_answers import label_in
from finqa.task.worked_examples import FINQA_EXAMPLES, FINQA_MINI_EXAMPLES, INVENTED_EXAMPLES, WorkedExample


@dataclass(frozen=True)
class DroppedRow:
    """A raw row that is no usable question."""

    id: str
    reason: str


@dataclass(frozen=True)
class LoadedSplit:
    """The questions of a raw file, in its order, and the rows that were dropped."""

    questions: list[Question]
    dropped: list[DroppedRow] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """What the stages need to know about a data set."""

    name: str
    """Also the name of its folders; in lower case the prefix of its CSV files."""
    load: Callable[[Path], LoadedSplit]
    """Reads the raw file of a split; raises UserError where the file as a whole cannot be used."""
    how_to_get: str
    """The command that makes the raw files."""
    answer_rule: Rule = "strict"
    """The rule by which the filter keeps a teacher's program."""
    worked_examples: tuple[WorkedExample, ...] = FINQA_EXAMPLES
    """The examples of few-shot prompts, for student and teacher."""
    instruction: str = FINQA_INSTRUCTION
    """What a model that was not fine-tuned is told before the prompt."""
    program_style: ProgramStyle = "plain"
    """How compiled programs are written: students learn plain ones better (docs/finqa.md)."""


def load_finqa(path: Path) -> LoadedSplit:
    """Read a file in FinQA's raw schema: a list of {id, pre_text, post_text, table, qa}.

    The label is `exe_ans`, or what `answer` comes to where that is empty or no finite number; `answer` is kept as the
    stated answer. Rows without a question or a label, or of another shape, are dropped with their reason.
    Ids name a row everywhere after this: a row whose id another one has is kept as `<id>#2`, `<id>#3`. Raises UserError
    where the file is missing, is no JSON, or is no list.
    """
    if not path.exists():
        raise UserError(f"{path} is missing")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=lambda not_finite: None)
    except (RecursionError, ValueError) as error:  # no UTF-8, no JSON, nested thousands deep, thousands of digits
        raise UserError(f"{path} is broken JSON ({error}); get it again") from None
    if not isinstance(raw, list):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a list of questions; get it again")
    questions, dropped = [], []
    ids: set[str] = set()
    for index, row in enumerate(raw):
        row_id = str(row.get("id") or f"row {index}") if isinstance(row, dict) else f"row {index}"
        try:
            questions.append(_finqa_question(row, _distinct(row_id, ids)))
            ids.add(questions[-1].id)
        except (KeyError, TypeError, AttributeError):
            dropped.append(DroppedRow(row_id, "not in FinQA's schema"))
        except ValueError as error:
            dropped.append(DroppedRow(row_id, str(error)))
    return LoadedSplit(questions, dropped)


def _distinct(row_id: str, ids: set[str]) -> str:
    name, count = row_id, 1
    while name in ids:
        count += 1
        name = f"{row_id}#{count}"
    return name


def _finqa_question(row: dict[str, Any], row_id: str) -> Question:
    qa = row["qa"]
    question = " ".join((qa.get("question") or "").split())
    if not question:
        raise ValueError("no question")
    pre_text, post_text, table = page_of(row)
    loaded = Question(
        id=row_id,
        pre_text=pre_text,
        post_text=post_text,
        table=table,
        question=question,
        answer=_label(qa.get("exe_ans"), qa.get("answer")),
        program=cell_text((qa.get("program") or "").strip()),  # it may name a row
        stated_answer=str(stated).strip() if isinstance(stated := qa.get("answer"), str | int | float) else "",
        family=_text(qa.get("family")),
        family_kind=_text(qa.get("family_kind")),
    )
    _check_unicode(loaded)
    return loaded


def page_of(row: dict[str, Any]) -> tuple[str, str, Table]:
    """The text before the table, the text after it, and the table of a page in FinQA's raw schema.

    A text is a list of lines, or one string; what is null is empty. Raises TypeError for another shape.
    """
    table = row.get("table") or []
    cells = [cell for line in table for cell in line] if all(isinstance(line, list) for line in table) else [[]]
    if not isinstance(table, list) or any(isinstance(cell, list | dict) for cell in cells):
        raise TypeError("a table that is no list of lists of cells")
    shown = [["" if cell is None else cell_text(str(cell)) for cell in line] for line in table]
    return _lines(row.get("pre_text")), _lines(row.get("post_text")), shown


def _label(result: Any, stated: Any) -> str:
    """The label; raises ValueError where there is none."""
    if isinstance(result, float) and not math.isfinite(result):
        result = None  # JSON's 1e999
    label = _text(result) or label_in(_text(stated))
    if normalise(label) is None:
        raise ValueError("an answer that is no number and no yes or no" if label or stated else "no answer")
    return label


def _check_unicode(question: Question) -> None:
    """JSON can escape half a surrogate pair, which no UTF-8 file can hold."""
    cells = [cell for line in question.table for cell in line]
    texts = [value for value in vars(question).values() if isinstance(value, str)]
    try:
        "".join(texts + cells).encode()
    except UnicodeEncodeError:
        raise ValueError("text that is not Unicode") from None


def _text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise TypeError("a label that is a container")
    return "" if value is None else str(value).strip()


def _lines(text: Any) -> str:
    lines = [text] if isinstance(text, str) else text or []
    if not isinstance(lines, list):
        raise TypeError("a text that is no list of lines")
    return "\n".join(line for line in lines if line is not None)


DATASETS = {
    d.name: d
    for d in (
        Dataset(
            "FinQA",
            load_finqa,
            how_to_get="python -m preprocessing.download_finqa",
        ),
        Dataset(
            "FinQA-mini",
            load_finqa,
            how_to_get="python -m mini.make_finqa_mini",
            instruction=INSTRUCTION,  # as pocket-mistral was pretrained on it; it gives fractions anyway
            worked_examples=FINQA_MINI_EXAMPLES,
            program_style="named",
        ),
    )
}


INVENTED = {name: f"{name}-invented" for name in DATASETS}
"""Data sets of questions that a study makes up on the pages of another (study/invented), by the name of that one."""
DATASETS |= {
    made: replace(
        DATASETS[source],
        name=made,
        how_to_get="python -m study.invented --rows",
        worked_examples=INVENTED_EXAMPLES,
    )
    for source, made in INVENTED.items()
}


def dataset(name: str) -> Dataset:
    """The data set called `name`; raises UserError, with the names there are, for an unknown one."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; one of {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    return DATASETS[name]


RowsFile = Literal["raw", "clean", "generated", "filtered"]
"""The files of a split, by the names that `Folders` has for them."""
MADE_FROM: dict[RowsFile, tuple[RowsFile, str]] = {
    "clean": ("raw", "preprocess_finqa"),
    "generated": ("clean", "process_finqa_code_generation"),
    "filtered": ("generated", "filter_valid_answers"),
}
"""What each file is made from, and the script of `preprocessing` that does it."""


def rows_file(kind: RowsFile, data: Dataset, split: str, folders: Folders) -> Path:
    """Where a file of a split is. Raises UserError, with the command that is next, where it is not there."""
    path: Path = getattr(folders, kind)(data.name, split)
    if not path.is_file():
        raise missing(f"{path} is missing; make it with", kind, data, split, folders)
    return path


def missing(said: str, kind: RowsFile, data: Dataset, split: str, folders: Folders) -> UserError:
    """An error: the text `said`, and after it the command to run next on the way to a file."""
    command, hint = how_to_make(kind, data, split, folders), ""
    if data.name == "FinQA" and command == how_to_get(data, folders):
        mini = typed("main.py", "FinQA-mini", "pocket-mistral", "-P")
        hint = f"FinQA is not here ({make_data(folders)} gets all of it; the shipped data needs nothing: {mini}); "
    return UserError(f"{hint}{said}: {command}")


def how_to_make(kind: RowsFile, data: Dataset, split: str, folders: Folders) -> str:
    """The command that makes a file; where its input is missing, the command that makes that input, and so on."""
    if kind == "raw":
        return how_to_get(data, folders)
    source, script = MADE_FROM[kind]
    read, made = getattr(folders, source), getattr(folders, kind)
    if not read(data.name, split).is_file():
        return how_to_make(source, data, split, folders)
    words = [] if data.name == "FinQA" else ["--dataset", data.name]
    # All splits at once, unless that would stop at one that is not there, or make one again that is.
    if not all(read(data.name, one).is_file() and not made(data.name, one).exists() for one in SPLITS):
        words += ["--split", split]
    # The teacher that costs nothing, unless another one was begun with.
    if kind == "generated" and not made(data.name, split).with_suffix(".journal.jsonl").exists():
        words += ["--teacher", "program"]
    return typed(f"-m preprocessing.{script}", *words, folders=folders)


def how_to_get(data: Dataset, folders: Folders) -> str:
    """How the raw files of a data set are got."""
    script = data.how_to_get.removeprefix("python ")
    return data.how_to_get if script == data.how_to_get else typed(script, folders=folders)
