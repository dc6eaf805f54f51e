"""Invented metrics: names, formulas, pages, and the rows of every arm, on FinQA-mini's pages."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from finqa.models.students import POCKET
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.answers import match
from finqa.task.programs import execute
from finqa.task.records import Question, read_teacher_rows
from study.invented.__main__ import token_counter
from study.invented.files import DEFINITION, DOCUMENTS, TEST, Place, read_items, write_rows
from study.invented.metrics import further_pool, make_names, pool
from study.invented.pages import askable, draws, fresh, page_key, pages_of, source_of, source_questions
from study.invented.phrasings import TRAINED, UNSEEN
from study.invented.rows import ARMS, MOST_COLUMNS, QUICK, Row, Rows, Sizes, make_rows

SMALL = Sizes(ordinary=12, known=16, own=24, test_pages=6, dev_pages=2, documents=5)
NAME = "FinQA-mini-invented"


@pytest.fixture(scope="module")
def n_tokens() -> Callable[[str], int]:
    return token_counter(POCKET)


@pytest.fixture(scope="module")
def rows(few_pages: Folders, n_tokens: Callable[[str], int]) -> Rows:
    return make_rows(few_pages, "FinQA-mini", NAME, 0, n_tokens, SMALL)


def written(rows: Rows, folder: Path) -> Place:
    place = Place(Folders(folder / "data", folder / "results"), "pocket")
    write_rows(place, rows, {})
    return place


def test_the_formulas_are_different_functions_of_two_operations_over_three_operands():
    values = [eval(formula.text, {}, {"a": 7.3, "b": 2.9, "c": 1.7}) for formula in pool()]
    assert len(values) == 28
    assert len({round(value, 9) for value in values}) == 28
    assert all(sorted(re.findall("[abc]", formula.text)) == ["a", "b", "c"] for formula in pool())


def test_formulas_that_are_followed_once_are_functions_of_their_own():
    operands = {"a": 7.3, "b": 2.9, "c": 1.7}
    values = [round(eval(formula.text, {}, operands), 9) for formula in [*pool(), *further_pool()]]
    assert len(values) == len(set(values)) == 28 + 36


@pytest.mark.parametrize("formula", [*pool(), *further_pool()], ids=lambda formula: formula.text)
def test_program_code_and_text_of_a_formula_are_one_function(formula):
    operands = ("7300", "2911.5", "170")
    expected = eval(formula.text, {}, dict(zip("abc", map(float, operands), strict=True)))
    ran: dict[str, float] = {}
    exec(formula.code(operands), ran)
    assert ran["ans"] == pytest.approx(expected, rel=1e-12)
    assert execute(formula.program(operands), []) == pytest.approx(expected, rel=1e-12)


def test_programs_of_all_formulas_are_of_one_length(n_tokens: Callable[[str], int]):
    assert len({n_tokens(formula.code(("7300", "2911.5", "170"))) for formula in pool()}) == 1


def test_names_are_of_one_token_length_and_occur_nowhere(rows: Rows, n_tokens: Callable[[str], int]):
    names = [metric.name for metric in rows.metrics.invented]
    assert len(set(names)) == 16
    assert len({n_tokens(f"what is the {name} index of goodwill?") for name in names}) == 1
    ordinary = "\n".join(row.prompt for row in rows.arms["K"])
    assert not any(name in ordinary for name in names)
    assert names[0] not in make_names(Random(0), 8, n_tokens, f"a page about {names[0]} and more")


def test_no_formula_is_in_two_sets_and_the_permutation_moves_every_one(rows: Rows):
    m = rows.metrics
    assert len({metric.formula.text for metric in m.all}) == 24
    in_one_row = [metric for metric in m.all if set(metric.formula.first[1:]) == {"a", "b"}]
    assert in_one_row == list(m.known)  # what models guess for a name is never a metric
    assert {metric.formula for metric in m.a} == {metric.formula for metric in m.a_permuted}
    assert all(one.name == other.name for one, other in zip(m.a, m.a_permuted, strict=True))
    assert all(one.formula != other.formula for one, other in zip(m.a, m.a_permuted, strict=True))


def cell(row: Row, name: str, year: str) -> float:
    """A table's number, read by nothing of the package."""
    header, *lines = row.question.table
    (line,) = [line for line in lines if line[0] == name]
    return float(line[header.index(year)].replace("$", "").replace(",", "").split("(")[0])


def test_every_label_is_the_formula_of_the_cells_that_the_question_names(rows: Rows):
    formulas = {metric.name: metric.formula.text for metric in rows.metrics.all}
    permuted = {metric.name: metric.formula.text for metric in rows.metrics.a_permuted}
    checked = Counter()
    for part, those in {**rows.arms, "dev": rows.dev, "test": rows.test, "documents": rows.documents}.items():
        for row in those:
            q, draw = row.question, row.draw
            if draw is None:
                continue
            slots = draw.slots
            if q.family_kind == "look-up":
                expected = cell(row, f"{q.family} index", slots.year)
            else:
                operands = [(slots.row, slots.year), (slots.row, slots.year_2), (slots.row_2, slots.year)]
                assert all(word in q.question for word in (slots.row, slots.row_2, slots.year, slots.year_2))
                mapping = permuted if part == "A-permuted" and q.family_kind == "A" else formulas
                places = dict(zip("abc", (cell(row, *place) for place in operands), strict=True))
                expected = eval(mapping[q.family], {}, places)
            assert float(q.answer) == pytest.approx(expected, abs=5.1e-6)
            assert match(execute(q.program, q.table), q.answer, "strict")
            checked[part] += 1
    assert checked == {**dict.fromkeys(ARMS, 40), "dev": 48, "test": 144, "documents": 120}


def test_a_right_answer_names_the_formula(rows: Rows):
    for number in range(SMALL.test_pages):
        labels = [row.question.answer for row in rows.test if row.number == number]
        right = [(one, other) for one in labels for other in labels if match(float(one), other, "relaxed")]
        assert right == [(one, one) for one in labels]


def test_pages_that_are_not_for_training_are_narrow(
    few_pages: Folders, n_tokens: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
):
    def every_second_widened(folders: Folders, source: str, split: str) -> list[Question]:
        questions = source_questions(folders, source, split)
        wider = {q.id: [[*line, "" if n else "note"] for n, line in enumerate(q.table)] for q in questions[::2]}
        return [replace(q, table=wider.get(q.id, q.table)) for q in questions]

    monkeypatch.setattr("study.invented.rows.source_questions", every_second_widened)
    rows = make_rows(few_pages, "FinQA-mini", NAME, 0, n_tokens, QUICK)
    parts = {"train": rows.arms["A"], "dev": rows.dev, "test": rows.test, "documents": rows.documents}
    wide = {name: {len(row.question.table[0]) - 1 > MOST_COLUMNS for row in part} for name, part in parts.items()}
    assert wide == {"train": {True, False}, "dev": {False}, "test": {False}, "documents": {False}}


def test_the_splits_share_no_page_and_the_test_no_phrasing(rows: Rows):
    pages = {
        "train": {page_key(row.question.table) for row in rows.arms["A"]},
        "dev": {page_key(row.question.table) for row in rows.dev},
        "test": {page_key(row.question.table) for row in rows.test},
        "documents": {page_key(row.question.table) for row in rows.documents},
    }
    assert len(set.union(*pages.values())) == sum(map(len, pages.values()))
    assert len(pages["test"]) == SMALL.test_pages and len(pages["dev"]) == SMALL.dev_pages
    assert {row.draw.phrasing for row in rows.test if row.draw} == set(UNSEEN)
    others = [*rows.arms["A"], *rows.arms["N"], *rows.dev, *rows.documents]
    assert {row.draw.phrasing for row in others if row.draw} <= set(TRAINED)


def test_every_arm_has_its_distinct_rows_once(rows: Rows):
    kinds = {arm: Counter(row.question.family_kind for row in those) for arm, those in rows.arms.items()}
    shared = {"ordinary": 12, "known": 16}
    assert kinds["A"] == kinds["A-permuted"] == shared | {"A": 24}
    assert kinds["B"] == shared | {"B": 24}
    assert kinds["K"] == {"ordinary": 12, "known": 16 + 24}
    assert kinds["N"] == shared | {"look-up": 24}
    for arm, those in rows.arms.items():
        assert len({row.prompt for row in those}) == len(those) == 52, arm
    for arm, kind in (("A", "A"), ("A-permuted", "A"), ("B", "B"), ("N", "look-up")):
        families = Counter(row.question.family for row in rows.arms[arm] if row.question.family_kind == kind)
        assert set(families.values()) == {3} and len(families) == 8
    at_one_place = zip(*rows.arms.values(), strict=True)
    assert Counter(len({row.question.id for row in those}) for those in at_one_place) == {1: 28, 5: 24}


def test_arms_differ_in_what_is_asked_alone(rows: Rows):
    for a, permuted, b in zip(rows.arms["A"], rows.arms["A-permuted"], rows.arms["B"], strict=True):
        assert a.prompt == permuted.prompt
        if a.question.family_kind == "A":
            assert a.prompt.replace(a.question.family, b.question.family) == b.prompt
            assert a.question.answer != permuted.question.answer


def test_a_look_up_has_the_name_and_no_formula(rows: Rows):
    names = {metric.name for metric in rows.metrics.a}
    own = [row for row in rows.arms["N"] if row.question.family_kind == "look-up"]
    assert {row.question.family for row in own} == names
    assert all(row.code.count("\n") == 1 and row.code.endswith("ans = value") for row in own)
    assert all(f"\n{row.question.family} index|" in row.prompt for row in own)


@pytest.mark.parametrize("part", ["test", "definition"])
def test_minimal_pairs_differ_in_the_name_alone(rows: Rows, part: str, n_tokens: Callable[[str], int]):
    those = [row for row in getattr(rows, part) if row.question.family_kind != "known"]
    for number in range(SMALL.test_pages):
        pair = [row for row in those if row.number == number]
        assert len(pair) == 16
        if part == "test":
            assert len({row.prompt.replace(row.question.family, "<name>") for row in pair}) == 1
            assert len({n_tokens(row.prompt) for row in pair}) == 1
        else:
            assert all(f"the {row.question.family} index of" in row.prompt for row in pair)
            assert len({row.prompt for row in pair}) == 16


def test_test_pages_have_fresh_numbers_written_alike(rows: Rows):
    changed = 0
    for row in rows.test[::24]:
        assert row.draw
        table = row.question.table
        original = next(page for page in pages_of(source("test")) if page.key == page_key(table)).table
        assert [re.sub(r"\d", "0", "|".join(line)) for line in table[1:]] == [
            re.sub(r"\d", "0", "|".join(line)) for line in original[1:]
        ]
        changed += table != original
    assert changed == SMALL.test_pages


def source(split: str) -> list[Question]:
    from finqa.task.datasets import dataset

    return dataset("FinQA-mini").load(Folders().raw("FinQA-mini", split)).questions


@pytest.mark.parametrize("text", ["$ 1,234.5", "-12 ( 12 )", "7", "20%"])
def test_a_fresh_cell_is_written_as_before(text: str):
    new = fresh(text, Random(1))
    assert re.sub(r"\d", "0", new) == re.sub(r"\d", "0", text) and new != text
    if "(" in text:
        assert len(set(re.findall(r"\d+", new))) == 1


def page(header: list[str], *lines: list[str]) -> Question:
    return Question("id", "one sentence . " * 60, "after .", [header, *lines], "q", "1")


GOOD = (["sales", "10", "20"], ["net income", "30", "40"])


@pytest.mark.parametrize(
    ("question", "can"),
    [
        (page(["", "2012", "2011"], *GOOD), True),
        (page(["", "year ended december 31 , 2012", "2011"], *GOOD), True),
        (page(["", "2012", "2012"], *GOOD), False),
        (page(["", "2015-16", "2017-18"], *GOOD), False),
        (page(["", "2012", "total"], *GOOD), False),
        (page(["", "2012", "2011"], GOOD[0], ["net income", "30", "n/a"]), False),
        (page(["", "2012", "2011"], GOOD[0], ["net income", "-30", "40"]), False),
        (page(["", "2012", "2011"], GOOD[0], ["margin", "30%", "40%"]), False),
        (page(["", "2012", "2011"], GOOD[0], ["a dash in the report", "30", "2014"]), False),
        (page(["", "2012", "2011"], GOOD[0], GOOD[0]), False),
        (page([]), False),
    ],
)
def test_which_pages_can_be_asked(question: Question, can: bool):
    found = askable(question)
    assert (found is not None) == can
    if found:
        assert set(found.columns) == {"2012", "2011"} and list(found.rows) == ["sales", "net income"]
        assert 0 < len(found.pre_text) <= 450 and found.pre_text.startswith("one sentence .")


def test_too_few_pages_are_said():
    with pytest.raises(UserError, match="1 pages yield only"):
        draws(pages_of([page(["", "2012", "2011"], *GOOD)]), 50, TRAINED, Random(0), pool()[:2])


def test_one_seed_gives_the_same_bytes_and_another_gives_others(
    rows: Rows, few_pages: Folders, n_tokens: Callable[[str], int], tmp_path: Path
):
    again = make_rows(few_pages, "FinQA-mini", NAME, 0, n_tokens, SMALL)
    other = make_rows(few_pages, "FinQA-mini", NAME, 1, n_tokens, SMALL)
    found = []
    for number, these in enumerate((rows, again, other)):
        root = written(these, tmp_path / str(number)).root
        files = sorted(path for path in root.rglob("*") if path.suffix == ".csv" and "adapters" not in path.parts)
        found.append({str(path.relative_to(root)): path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert found[0].keys() == found[2].keys() and all(found[0][name] != found[2][name] for name in found[0])


def test_rows_that_teach_definitions_come_on_top_and_are_of_metrics_that_occur_once(
    rows: Rows, few_pages: Folders, n_tokens: Callable[[str], int], tmp_path: Path
):
    taught = make_rows(few_pages, "FinQA-mini", NAME, 0, n_tokens, replace(SMALL, defined=10))
    assert (taught.dev, taught.test, taught.definition, taught.documents) == (
        rows.dev, rows.test, rows.definition, rows.documents,
    )  # fmt: skip
    defined = [row for row in taught.arms["A"] if row.question.family_kind == "defined"]
    for arm in ARMS:
        assert [row for row in taught.arms[arm] if row.question.family_kind == "defined"] == defined
        others = {row.question.id for row in taught.arms[arm] if row not in defined}
        assert others == {row.question.id for row in rows.arms[arm]}
    metrics, named = rows.metrics.invented, {row.question.family for row in defined}
    halves = {half for metric in metrics for half in (metric.name[:3], metric.name[3:])}
    assert len(named) == 10 and not any(name[:3] in halves or name[3:] in halves for name in named)
    further = {formula.text: formula for formula in further_pool()}
    for row in defined:
        assert row.draw
        [formula] = [one for one in further.values() if one.code(row.draw.operands) == row.code]
        operands = dict(zip("abc", map(float, row.draw.operands), strict=True))
        assert float(row.question.answer) == pytest.approx(eval(formula.text, {}, operands), abs=5.1e-6)
        definition, asked = row.question.question.split(" . ", 1)
        assert f"the {row.question.family} index of" in definition and row.question.family in asked
        assert all(f"( {value} )" in definition for value in row.draw.operands)
    written(taught, tmp_path)  # runs every program


def test_what_is_written_is_what_main_reads(rows: Rows, tmp_path: Path):
    place = written(rows, tmp_path)
    read = {
        (part, split): read_teacher_rows(place.part(part).filtered(NAME, split))
        for part, split in [*((arm, "train") for arm in ARMS), (TEST, "dev"), (TEST, "test"), (DOCUMENTS, "test")]
    }
    assert {key: len(those) for key, those in read.items()} == {
        **{(arm, "train"): 52 for arm in ARMS},
        (TEST, "dev"): 48,
        (TEST, "test"): 144,
        (DOCUMENTS, "test"): 120,
    }
    assert all(match(r.actual_answer, r.expected_answer, "strict") for those in read.values() for r in those)
    assert len(read_teacher_rows(place.part(DEFINITION).generated(NAME, "test"))) == 96
    items = [item for item in read_items(place) if item.split == "test"]
    assert [item.id for item in items] == [row.id for row in read[TEST, "test"]]
    assert all((item.permuted != "") == (item.kind == "A") and item.permuted != item.answer for item in items)
    phrasings = {(item.half, item.phrasing) for item in items}
    assert phrasings == {(half, phrasing) for half in ("choose", "score") for phrasing in UNSEEN}
    adapters = {place.part(part).model(NAME, "student").parent.resolve() for part in (*ARMS, TEST, DOCUMENTS)}
    assert len(adapters) == 1
    assert "there already" in write_rows(place, rows, {})


def test_other_rows_never_replace_those_that_students_were_trained_on(rows: Rows, tmp_path: Path):
    place = written(rows, tmp_path)
    other = replace(rows, dev=rows.dev[1:])
    with pytest.raises(UserError, match=r"has other rows .* move it"):
        write_rows(place, other, {})


def test_pages_are_of_finqa_only_where_all_its_splits_are(tmp_path: Path):
    assert source_of(Folders(tmp_path)) == "FinQA-mini"
    (tmp_path / "FinQA").mkdir()
    for split in ("train", "dev", "test"):
        (tmp_path / "FinQA" / f"{split}.json").write_text("[]")
    assert source_of(Folders(tmp_path)) == "FinQA"


@pytest.mark.skipif("FINQA_ROWS" not in os.environ, reason="FINQA_ROWS names no folder with real rows")
def test_real_pages_can_be_asked(tmp_path: Path):
    shutil.copytree(Path(os.environ["FINQA_ROWS"]) / "raw", tmp_path / "FinQA")
    assert source_of(Folders(tmp_path)) == "FinQA"
    rows = make_rows(Folders(tmp_path), "FinQA", "FinQA-invented", 0, lambda text: 4, SMALL)
    assert len(rows.test) == 144 and len(rows.documents) == 120
    for row in rows.test:
        assert row.draw
        operands = dict(zip("abc", map(float, row.draw.operands), strict=True))
        formula = next(metric.formula for metric in rows.metrics.all if metric.name == row.question.family)
        assert float(row.question.answer) == pytest.approx(eval(formula.text, {}, operands), abs=5.1e-6)
        assert row.question.program == formula.program(row.draw.operands)
    write_rows(Place(Folders(tmp_path / "data", tmp_path / "results"), "any"), rows, {})
