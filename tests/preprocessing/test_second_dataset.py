"""A second data set is one entry in the table and a loader: a toy one goes through all three stages."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from finqa.runtime.paths import Folders
from finqa.task.datasets import DATASETS, Dataset, DroppedRow, LoadedSplit
from finqa.task.records import Question, read_teacher_rows
from preprocessing.filter_valid_answers import filter_split
from preprocessing.preprocess_finqa import preprocess_split
from preprocessing.process_finqa_code_generation import process_finqa_samples
from preprocessing.teacher.teachers import ProgramTeacher


def load_toy(path: Path) -> LoadedSplit:
    """Lines `question;answer;program`."""
    questions, dropped = [], []
    with path.open(newline="") as file:
        for number, (question, answer, program) in enumerate(csv.reader(file, delimiter=";")):
            if answer:
                questions.append(Question(str(number), "before", "after", [], question, answer, program))
            else:
                dropped.append(DroppedRow(str(number), "no answer"))
    return LoadedSplit(questions, dropped)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    toy = Dataset("Toy-QA", load_toy, how_to_get="write it by hand", answer_rule="relaxed")
    monkeypatch.setitem(DATASETS, toy.name, toy)
    return toy


def test_a_toy_data_set_goes_through_all_stages_by_its_own_rule(toy: Dataset, tmp_path: Path) -> None:
    folders = Folders(data=tmp_path)
    raw = folders.raw("Toy-QA", "dev")
    raw.parent.mkdir()
    raw.write_text("in per cent?;0.5;multiply(0.5, const_100)\nno label;;add(1, 1)\nwrong;3;add(1, 1)\n")

    cleaned = preprocess_split(toy, "dev", folders)
    questions = load_toy(raw).questions
    process_finqa_samples(toy, "dev", folders, questions, ProgramTeacher())
    judged = filter_split("Toy-QA", "dev", folders, toy.answer_rule)

    assert dict(cleaned.left_out) == {"no answer": 1}
    assert (judged.kept, dict(judged.left_out)) == (1, {"wrong-answer": 1})
    generated = read_teacher_rows(tmp_path / "clean_with_code/Toy-QA/toy-qa_dev_generated.csv")
    assert [(row.id, row.actual_answer) for row in generated] == [("0", "50.0"), ("2", "2.0")]
