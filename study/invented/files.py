"""The study's files: the CSVs that main.py reads, a data folder for each part, and what the gates read.

D/invented/<model>/<arm>/        training rows of an arm
D/invented/<model>/test/         dev and test; items.csv says what each question is
D/invented/<model>/definition/   the test questions for invented metrics, the definition before each
D/invented/<model>/documents/    what dictionaries read, as filtered test rows
D/invented/<model>/adapters/     every arm's adapter; the `models` of each part is a link to it
D/invented/<model>/metrics.csv   names, sets and formulas
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_manifest
from finqa.runtime.paths import Folders, write_atomically
from finqa.task.answers import match
from finqa.task.records import TeacherRow, write_teacher_rows
from preprocessing.run_programs import with_answers
from study.invented.metrics import Metrics
from study.invented.rows import ARMS, Row, Rows, label

TEST, DEFINITION, DOCUMENTS = "test", "definition", "documents"
PARTS = (*ARMS, TEST, DEFINITION, DOCUMENTS)
REMEDY = "make the rows with: python -m study.invented --rows"


@dataclass(frozen=True)
class Item:
    """What a question of dev or test is."""

    id: str
    split: str
    page: int
    half: str
    """`choose` or `score`: what is chosen on one half of the pages is scored on the other."""
    phrasing: int
    family: str
    kind: str
    """A, B or known."""
    answer: str
    permuted: str
    """The answer by the formula that arm A' gives the name; empty for what is no metric of A."""


@dataclass(frozen=True)
class Place:
    """Where the study of one model reads and writes."""

    given: Folders
    """The folders that the user gave; FinQA's files are below the data folder."""
    model: str
    """Short name."""

    @property
    def root(self) -> Path:
        return self.given.data / "invented" / self.model

    @property
    def results(self) -> Path:
        return self.given.results / "invented" / self.model

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    def part(self, name: str) -> Folders:
        """The data folder of an arm, of test, definition or documents, and the results folder: that of `definition`,
        whose questions have the ids of test's, is its own."""
        return Folders(self.root / name, self.results / name if name == DEFINITION else self.results)


def write_rows(place: Place, rows: Rows, config: Mapping[str, Any]) -> str:
    """Write every part, unless these very rows are there; returns a line that says what there is.

    Every program is run once. Raises UserError where one does not give its label, and where other rows are there: what
    was trained on them would pass for trained on these.
    """
    for part in PARTS:
        link_adapters(place.part(part).data / "models", place.adapters)
    stamp, digest = place.root / "rows.sha256", digest_of(rows)
    said = f"{len(rows.test)} test and {len(rows.dev)} dev questions, {len(rows.documents)} documents in {place.root}"
    said = f"{len(rows.arms)} arms of {len(rows.arms[ARMS[0]])} rows, {said}"
    if stamp.exists():
        if stamp.read_text() != digest:
            raise UserError(
                f"{place.root} has other rows (of another seed, source or tokenizer, or of other code), and what was "
                f"trained on them; move it and {place.results} away, or give another --data-dir and --results-dir"
            )
        return f"{said} (there already)"
    checked = checked_rows(chain(rows.test, rows.dev, rows.documents, rows.definition, *rows.arms.values()))

    def write(part: str, split: str, those: Sequence[Row]) -> None:
        teacher_rows, folders = [checked[key(row)] for row in those], place.part(part)
        write_teacher_rows(folders.filtered(rows.dataset, split), teacher_rows)
        if part in (TEST, DEFINITION):
            write_teacher_rows(folders.generated(rows.dataset, split), teacher_rows)

    for arm, those in rows.arms.items():
        write(arm, "train", those)
    write(TEST, "dev", rows.dev)
    write(TEST, "test", rows.test)
    write(DEFINITION, "test", rows.definition)
    write(DOCUMENTS, "test", rows.documents)
    write_table(place.root / TEST / "items.csv", [asdict(item) for item in items_of(rows)])
    write_table(place.root / "metrics.csv", metric_lines(rows.metrics))
    write_manifest(place.root / "rows.json", config, sha256=digest)
    write_atomically(stamp, digest)  # last: what is there is whole
    return said


def link_adapters(link: Path, adapters: Path) -> None:
    """Make the `models` of a part a link to the adapters' folder. Where it is a folder, as of adapters that were
    brought from another machine, what is in it is moved there first. UserError where an adapter is in both."""
    adapters.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        for model in link.glob("*/*"):
            there = adapters / model.parent.name / model.name
            if there.exists():
                raise UserError(f"{model} and {there} are both there; delete one of them")
            there.parent.mkdir(exist_ok=True)
            model.rename(there)
        shutil.rmtree(link)
    if not link.is_symlink():
        link.symlink_to(Path("..") / adapters.name, target_is_directory=True)


def checked_rows(rows: Iterable[Row]) -> dict[tuple[str, str, str], TeacherRow]:
    """Every distinct row with what its program gives, by `key`."""
    distinct = {key(row): row for row in rows}
    run = with_answers([row.teacher_row() for row in distinct.values()])
    wrong = [row for row in run if not match(row.actual_answer, row.expected_answer, "strict")]
    for row in wrong[:1]:
        raise UserError(
            f"the program of {row.id} gives {row.actual_answer or row.error_message}, not {row.expected_answer}"
        )
    return dict(zip(distinct, run, strict=True))


def key(row: Row) -> tuple[str, str, str]:
    return row.question.id, row.prompt, row.code


def digest_of(rows: Rows) -> str:
    """sha256 of all prompts, programs and answers, part by part."""
    digest = sha256()
    parts = {**rows.arms, "dev": rows.dev, TEST: rows.test, DEFINITION: rows.definition, DOCUMENTS: rows.documents}
    for name, part in parts.items():
        for row in part:
            digest.update("\0".join((name, *key(row), row.question.answer)).encode())
    return digest.hexdigest()


def items_of(rows: Rows) -> list[Item]:
    """The items of the test rows, then those of the dev rows."""
    return [_item(row, split, rows.metrics) for split, part in (("test", rows.test), ("dev", rows.dev)) for row in part]


def _item(row: Row, split: str, metrics: Metrics) -> Item:
    assert row.draw, row
    q, permuted = row.question, metrics.permuted_formula(row.question.family)
    half = "choose" if row.number // 2 % 2 == 0 else "score"  # by two, as test pages take two phrasings in turn
    other = label(permuted, row.draw) if permuted else ""
    return Item(q.id, split, row.number, half, row.draw.phrasing, q.family, q.family_kind, q.answer, other)


def metric_lines(metrics: Metrics) -> list[dict[str, str]]:
    """The lines of metrics.csv."""
    return [
        {
            "name": metric.name,
            "kind": metric.kind,
            "formula": metric.formula.text,
            "formula_permuted": formula.text if (formula := metrics.permuted_formula(metric.name)) else "",
        }
        for metric in metrics.all
    ]


def read_items(place: Place) -> list[Item]:
    """Raises UserError where the rows are not there."""
    path = place.root / TEST / "items.csv"
    if not path.exists():
        raise UserError(f"{path} is missing; {REMEDY}")
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    for line in lines:
        line |= {name: int(line[name]) for name in ("page", "phrasing")}
    return [Item(**line) for line in lines]


def read_metrics(place: Place) -> list[dict[str, str]]:
    """The lines of metrics.csv; UserError where it is not there."""
    path = place.root / "metrics.csv"
    if not path.exists():
        raise UserError(f"{path} is missing; {REMEDY}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A CSV with the first line's keys as its columns; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue())
