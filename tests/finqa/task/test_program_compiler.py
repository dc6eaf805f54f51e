"""The program teacher: any valid program over any table becomes Python with the same value, and readable names."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finqa.runtime.paths import SPLITS
from finqa.task.answers import match
from finqa.task.datasets import load_finqa
from finqa.task.program_compiler import PROGRAM_STYLES, ProgramStyle, has_header, to_python
from finqa.task.programs import ARITHMETIC, TABLE_OPERATIONS, ProgramError, Step, cell_number, execute, parse
from finqa.task.records import Question, Table, format_table, parse_table


def value_of(code: str) -> Any:
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables["ans"]


# --- Generated programs -----------------------------------------------------------------------------------------------

WORDS = ("net", "sales", "( loss )", ", net", "total", "class", "max", "ans", "2009", "12.5", "%", "#0", "const_2", "$")
ROW_NAMES = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join),
    st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="|"), min_size=1, max_size=12),
)
DIGITS = st.one_of(
    st.integers(0, 999).map(str),
    st.integers(0, 9999).map(lambda n: f"{n / 10}"),
    st.integers(1000, 9999).map(lambda n: f"{n:,}"),
    st.integers(0, 99).map(lambda n: f"0{n}"),
    st.integers(0, 99).map(lambda n: f".{n:02}"),
    st.integers(0, 9).map(lambda n: f"{n}e2"),
)
LITERALS = st.builds(
    "{}{}{}".format, st.sampled_from(["", "", "", "-", "+"]), DIGITS, st.sampled_from(["", "", "", "%", " %"])
)
CONSTANTS = st.sampled_from(["const_1", "const_2", "const_3", "const_100", "const_1000", "const_m1"])
CELLS = st.one_of(
    LITERALS,
    LITERALS.map("$ {}".format),
    DIGITS.map(lambda digits: f"-{digits} ( {digits} )"),
    DIGITS.map("- {}".format),
    DIGITS.map("{}\u00a0".format),
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = draw(st.integers(1, 4))
    names = draw(st.lists(ROW_NAMES.filter(str.strip), min_size=1, max_size=4))
    cells = st.lists(st.one_of(CELLS, CELLS, CELLS, st.sampled_from(["", "n/a"])), min_size=columns, max_size=columns)
    return [["( in millions )", *(str(2009 - c) for c in range(columns))], *([name, *draw(cells)] for name in names)]


@st.composite
def programs(draw: st.DrawFn, table: Table) -> list[Step]:
    """One to five steps over all ten operations; operands from the table, of the program's own, or earlier results."""
    quoted = [cell for row in table[1:] for cell in row[1:] if re.fullmatch(r"[+-]?[\d,.]+%?", cell)]
    operands = st.one_of(LITERALS, CONSTANTS, *([st.sampled_from(quoted)] if quoted else []))
    steps: list[Step] = []
    for index in range(draw(st.integers(1, 5))):
        op = draw(st.sampled_from((*ARITHMETIC, *TABLE_OPERATIONS)))
        if op in TABLE_OPERATIONS:
            steps.append(Step(op, (draw(st.sampled_from([row[0].strip() for row in table[1:]])), "none")))
            continue
        a, b = (
            draw(st.one_of(operands, st.integers(0, index - 1).map("#{}".format)) if index else operands)
            for _ in range(2)
        )
        steps.append(Step(op, (a, draw(CONSTANTS) if op == "exp" else b)))
    return steps


def printed(steps: list[Step]) -> str:
    return ", ".join(f"{step.op}({step.args[0]}, {step.args[1]})" for step in steps)


@given(st.data())
def test_what_is_printed_is_parsed_again(data: st.DataObject):
    table = data.draw(tables())
    steps = data.draw(programs(table))
    assert parse(printed(steps)) == steps


@settings(max_examples=400)
@given(st.data())
def test_any_valid_program_compiles_to_python_with_its_value(data: st.DataObject):
    table = data.draw(tables())
    steps = data.draw(programs(table))
    style = data.draw(st.sampled_from(PROGRAM_STYLES))
    try:
        expected = [execute(steps[: last + 1], table) for last in range(len(steps))]
    except ProgramError:
        assume(False)
        raise
    # Python computes with whole numbers of any size, the program language with floats.
    assume(all(isinstance(value, str) or abs(value) < 2**53 for value in expected))
    code = to_python(steps, table, "what was net sales in 2009?", "sales of $ 12.5 .", style)
    assert match(value_of(code), expected[-1])


@given(st.data())
def test_names_are_distinct_and_shadow_nothing(data: st.DataObject):
    table = data.draw(tables())
    try:
        code = to_python(data.draw(programs(table)), table, "what was net sales in 2009?")
    except ProgramError:
        return  # a row with a cell that is no number
    assigned = [node.targets[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign)]
    names = [target.id for target in assigned if isinstance(target, ast.Name)]
    assert len(names) == len(assigned) == len(set(names))
    assert names[-1] == "ans" and not set(names) & {"max", "min", "sum", "len"}


@given(st.data())
def test_the_value_survives_the_tables_way_through_the_csv(data: st.DataObject):
    table = data.draw(tables())
    steps = data.draw(programs(table))
    read = parse_table(format_table(table))
    assert _value_or_none(steps, read) == _value_or_none(steps, table)


def _value_or_none(steps: list[Step], table: Table) -> float | str | None:
    try:
        return execute(steps, table)
    except ProgramError:
        return None


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("$ 5,829", 5829),
        ("-234 ( 234 )", -234),
        ("- 5", -5),
        ("5 %", 0.05),
        ("7\u00a0", 7),
        ("0e5", 0),
        ("-\t5", -5),
        ("-\u00a05", None),
        ("12 34", None),
        ("1e999", None),
        ("٣", None),
        ("( 234 )", None),
        ("2014", 2014),
        ("\u2014", None),
    ],
)
def test_a_cell_has_its_value_or_is_no_number(cell: str, value: float | None):
    assert cell_number(cell) == value
    if value is not None:
        assert value_of(to_python("table_sum(a, none)", [["", "2009"], ["a", cell]], "")) == value


def test_a_row_may_have_the_name_of_an_operand():
    table = [["", "a", "b"], ["2009", "5", "7"]]
    assert value_of(to_python("table_sum(2009, none), subtract(2009, #0)", table, "what?")) == 1997


def test_a_number_is_named_in_a_page_of_one_long_line():
    """Twenty thousand sentences without a line break; only what stands near a number is read for its name."""
    page = " ".join(f"item {n} was {n + 100_000} dollars ." for n in range(20_000)) + " store rent was 7.5 dollars ."
    code = to_python("add(7.5, 119999)", [["", ""]], "what?", page)
    assert code.splitlines()[:2] == ["store_rent_dollars = 7.5", "item_dollars = 119999"]


HEADED, NOT_HEADED = True, False


@pytest.mark.parametrize(
    ("table", "headed", "names"),
    [
        ([["2006", "$ 2408"], ["2007", "1364"]], NOT_HEADED, ["amount_2006", "amount_2007"]),
        ([["net sales", "2,408", "3"], ["rent", "1364", "5"]], NOT_HEADED, ["net_sales", "rent"]),
        ([["margin", "2408%"], ["tax rate", "1364"]], NOT_HEADED, ["margin", "tax_rate"]),
        ([["", "2009", "2008"], ["net sales", "2408", "1364"]], HEADED, ["net_sales_2009", "net_sales_2008"]),
        ([["year", "rent"], ["2006", "2408"], ["2007", "1364"]], HEADED, ["rent_2006", "rent_2007"]),
        ([["", "2009 ( a )", "total"], ["net sales", "2408", "1364"]], HEADED, ["net_sales_2009", "net_sales_total"]),
    ],
)
def test_names_are_of_the_header_only_where_there_is_one(table: Table, headed: bool, names: list[str]):
    assert has_header(table) == headed
    code = to_python("subtract(2408, 1364)", table, "what?")
    assert [line.split(" = ")[0].removesuffix("_a") for line in code.splitlines()[:2]] == names


@pytest.mark.parametrize(
    "text",
    [
        "rent was $ 24 , $ 13 and $ 7 in 2009 , 2008 and 2007 , respectively .",
        "for the years ended december 31 , 2009 , 2008 and 2007 rent was $ 24 , $ 13 , and $ 7 , respectively .",
        "rent was $ 24 in 2009 , $ 13 in 2008 and $ 7 in 2007 .",
        "in 2009 and 2008 rent was 24% ( 24 % ) and 13% ( 13 % ) , respectively .",
        "the board met . as of may 5 , 2009 and 2008 , rent was 24 and 13 , respectively ; staff was 9 .",
    ],
)
def test_numbers_of_a_list_are_told_apart_by_their_year(text: str):
    code = to_python("subtract(24, 13)", [["", ""]], "what?", text)
    assert re.search(r"_2008 = 13$", code, re.MULTILINE), code
    assert not re.search(r"_\d = ", code)


def test_the_second_of_two_numbers_with_the_same_words_before_them_is_named_by_what_follows():
    code = to_python("add(24, 13)", [["", ""]], "what?", "rent was $ 24 ; the rent was $ 13 , for stores .")
    assert code.splitlines()[:2] == ["rent = 24", "rent_stores = 13"]


@pytest.mark.parametrize(
    ("style", "lines"),
    [
        ("named", ["net_sales_2009 = 90", "net_sales_2008 = 60", "# (net_sales_2009 - net_sales_2008) / net_sales_2008",
                   "change = net_sales_2009 - net_sales_2008", "ans = change / net_sales_2008"]),
        ("formula-first", ["# (net_sales_2009 - net_sales_2008) / net_sales_2008", "net_sales_2009 = 90",
                           "net_sales_2008 = 60", "change = net_sales_2009 - net_sales_2008",
                           "ans = change / net_sales_2008"]),
        ("plain", ["value = 90", "value_2 = 60", "change = value - value_2", "ans = change / value_2"]),
    ],
)  # fmt: skip
def test_a_program_is_written_in_three_styles(style: ProgramStyle, lines: list[str]):
    table = [["", "2009", "2008"], ["net sales", "90", "60"]]
    program = "subtract(90, 60), divide(#0, 60)"
    assert to_python(program, table, "how did net sales change?", style=style).splitlines() == lines


# --- Real programs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_questions() -> list[Question]:
    if "FINQA_ROWS" not in os.environ:
        pytest.skip("FINQA_ROWS names no folder with real rows")
    raw = Path(os.environ["FINQA_ROWS"]) / "raw"
    return [question for split in SPLITS for question in load_finqa(raw / f"{split}.json").questions]


def compiled(question: Question) -> str:
    return to_python(question.program, question.table, question.question, question.passage)


def test_every_real_program_compiles_runs_and_gives_the_label(real_questions: list[Question]):
    assert real_questions
    wrong = [q.id for q in real_questions if not match(value_of(compiled(q)), q.answer)]
    assert wrong == []


def test_every_real_program_is_parsed_from_what_is_printed(real_questions: list[Question]):
    assert [parse(printed(parse(q.program))) for q in real_questions] == [parse(q.program) for q in real_questions]


def test_at_least_95_per_cent_of_real_operands_have_a_real_name(real_questions: list[Question]):
    operands = [name for question in real_questions for name in _operand_names(compiled(question))]
    plain = [name for name in operands if re.fullmatch(r"(value|row)(_\d+)?|.*_\d", name)]
    assert len(operands) > len(real_questions)
    assert len(plain) <= 0.05 * len(operands), f"{len(plain)} of {len(operands)} have a plain or a numbered name"


def _operand_names(code: str) -> list[str]:
    """The variables that hold a number or a row of the page: those whose right-hand side names no other variable."""
    return [
        node.targets[0].id
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and not any(isinstance(part, ast.Name) for part in ast.walk(node.value))
    ]
