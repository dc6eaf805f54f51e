from __future__ import annotations

import pytest

from finqa.task.evidence import SHOWN, evidence
from finqa.task.records import Question

PAGE = Question(
    id="",
    pre_text="sales rose by 12.5 % in 2009 . rent was $ 340 million ; nothing else changed .",
    post_text="the board met in may .",
    table=[["", "2009", "2008"], ["sales", "$ 1,234", "1,100"], ["charges", "-45 ( 45 )", "1,100"], ["staff", "7"]],
    question="what ?",
    answer="",
)


def places(code: str) -> dict[float, tuple[str, ...]]:
    return {one.number: one.places for one in evidence(code, PAGE)}


def test_a_number_of_the_table_is_named_by_row_and_column():
    [one] = evidence("sales_2009 = 1234\nans = sales_2009", PAGE)
    assert (one.number, one.name, one.places) == (1234, "sales_2009", ("table: sales, 2009",))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ans = 1100 - 7", {1100: ("table: sales, 2008", "table: charges, 2008"), 7: ("table: staff, 2009",)}),
        ("a = -45\nans = a", {45: ("table: charges, 2009",)}),
        ("rent = 340\nans = rent", {340: ("text: rent was $ 340 million ;",)}),
        ("rate = 0.125", {0.125: ()}),
        ("rate = 12.5 / 100", {12.5: ("text: sales rose by 12.5 % in 2009 .",)}),
        ("a = 99\nans = a / 1000", {99: ()}),
        ("ans = 100 * 7 / 1", {7: ("table: staff, 2009",)}),
        ("ans = 7 + 7.0", {7: ("table: staff, 2009",)}),
        ("ans = (", {}),
        ("ans = True", {}),
    ],
)
def test_numbers_are_found_in_the_table_then_in_the_text_and_units_are_left_out(code: str, expected: dict):
    assert places(code) == expected


def test_hostile_code_has_no_evidence_and_is_not_run():
    assert evidence("x = " + "9" * 400, PAGE) == []
    assert evidence("(" * 5000, PAGE) == []
    assert evidence("raise SystemExit\nans = 7", PAGE)[0].places == ("table: staff, 2009",)


def test_of_a_long_sentence_the_part_with_the_number_is_shown():
    page = Question("", "word " * 200 + "rent was 340 " + "word " * 200, "", [], "what ?", "")
    [place] = evidence("ans = 340", page)[0].places
    assert "rent was 340" in place and len(place) < SHOWN + 20


def test_a_table_without_a_header_has_no_names_of_columns_and_its_first_row_counts():
    page = Question("", "", "", [["2006", "$ 2408"], ["2007", "1364"]], "what ?", "")
    assert [one.places for one in evidence("ans = 2408 / 1364", page)] == [("table: 2006",), ("table: 2007",)]
