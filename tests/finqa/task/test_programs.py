"""FinQA's program language: reading it, running it, and compiling it to Python."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.task.answers import match
from finqa.task.program_compiler import to_python
from finqa.task.programs import ProgramError, Step, execute, number, parse

TABLE = [
    ["( in millions )", "2009", "2008", "2007"],
    ["net sales", "$ 5829", "$ 5,735", "$ 4912"],
    ["other income ( loss ) , net", "-45 ( 45 )", "12", "30"],
    ["margin", "42.1%", "40.5%", "39%"],
    ["headcount", "120", "n/a", "100"],
    ["net debt", "1", "2", "3"],
    ["net debt", "10", "20", "30"],
]


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("add(1, 2)", 3),
        ("subtract(5,829, 5735)", 94),
        ("multiply(21, 28%)", 5.88),
        ("divide(#0, const_2)", None),
        ("add(3.24, 3.98), divide(#0, const_2)", 3.61),
        ("exp(const_2, const_3)", 8),
        ("exp(const_m1, const_2)", 1),
        ("greater(2, 1)", "yes"),
        ("greater(1, 1)", "no"),
        ("table_max(net sales, none)", 5829),
        ("table_min(other income ( loss ) , net, none)", -45),
        ("table_sum(margin, none)", 1.216),
        ("table_average(net sales, none)", 5492),
        ("table_max(net debt, none)", 30),
        ("table_max(net sales, none), table_min(net sales, none), subtract(#0, #1)", 917),
        ("divide(1, 0)", None),
        ("table_sum(headcount, none)", None),
        ("table_sum(no such row, none)", None),
        ("greater(2, 1), add(#0, 1)", None),
        ("exp(-8, 0.5)", None),
        ("exp(10, 400)", None),
    ],
)
def test_a_program_gives_the_value_of_the_official_rules(program: str, value: float | str | None):
    if value is None:
        with pytest.raises(ProgramError):
            execute(program, TABLE)
    else:
        assert execute(program, TABLE) == pytest.approx(value)


def test_a_row_name_may_hold_parentheses_and_commas():
    assert parse("table_sum(other income ( loss ) , net, none), add(#0, const_1)") == [
        Step("table_sum", ("other income ( loss ) , net", "none")),
        Step("add", ("#0", "const_1")),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "add", "add(1)", "add(1, 2, 3)", "add(1, 2) subtract(3, 4)", "pow(1, 2)", "add(#0, 1)", "add(1, 2"),
        *(f"add({operand}, 1)" for operand in ("0x10", "1_000", "2+8800", "24#2", "12\n.1", "1 # x", "0b1", "1j")),
        *(f"add(1, {operand})" for operand in ("–12", "−5", "1.5 million", "$ 5", "(5)", "nan", "inf", "1e999")),
        *(f"add(1, {operand})" for operand in ("const_x", "const_0x10", "const_1_0", "const_m", "const_mm1", "x")),
        *(f"add(1, 2), add({operand}, 1)" for operand in ("#", "#-1", "#1", "#0x0", "#٠", "#0 #", "#99999999999")),
        *(f"add(1, {operand})" for operand in ("__import__('os')", "1;2", "1\\", "'5'", "٥", "1e5e5", "5%%", "1..2")),
    ],
)
def test_what_is_no_program_is_refused(text: str):
    with pytest.raises(ProgramError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5%", 0.05), ("const_m1", -1), ("const_1000", 1000), ("1,234.5", 1234.5), ("-3", -3), ("n/a", None), ("", None)],
)
def test_a_literal_has_its_value(text: str, value: float | None):
    assert number(text) == value


PAGE = "the company repurchased 340 shares at an average price of $ 27 .\ngrowth is expected to be 5.2% ( 5.2 % ) ."


def test_operands_are_named_after_their_row_and_column():
    code = to_python("subtract(5829, 5735), divide(#0, 5735)", TABLE, "what was the change in net sales from 2008?")
    assert code == (
        "net_sales_2009 = 5829\n"
        "net_sales_2008 = 5735\n"
        "# (net_sales_2009 - net_sales_2008) / net_sales_2008\n"
        "change = net_sales_2009 - net_sales_2008\n"
        "ans = change / net_sales_2008"
    )


def test_operands_of_the_text_are_named_after_the_words_before_them():
    code = to_python("multiply(340, 27)", TABLE, "what was spent?", PAGE)
    assert code.splitlines()[0] == "company_repurchased_shares = 340"
    assert code.splitlines()[1].endswith("average_price = 27")


def test_an_operand_that_is_nowhere_gets_a_plain_name():
    assert to_python("add(77777, 88888)", TABLE, "what?").startswith("value = 77777\nvalue_2 = 88888\n")


def test_no_name_shadows_the_answer_or_python():
    table = [["", "2009"], ["max", "5"], ["class", "7"], ["ans", "9"]]
    code = to_python("add(5, 7), add(#0, 9)", [["", ""], *table[1:]], "what?")
    names = {line.split(" = ")[0] for line in code.splitlines() if not line.startswith("#")}
    assert names & {"max", "class"} == set()
    assert code.count("\nans = ") == 1


OPERANDS = st.one_of(
    st.integers(1, 9999).map(str),
    st.integers(1, 999).map(lambda n: f"{n / 10}"),
    st.integers(1, 99).map(lambda n: f"{n}%"),
    st.sampled_from(["const_2", "const_100", "const_m1", "5829", "5735", "42.1%"]),
)


@st.composite
def programs(draw: st.DrawFn) -> str:
    steps: list[str] = []
    for index in range(draw(st.integers(1, 4))):
        op = draw(st.sampled_from(["add", "subtract", "multiply", "divide", "table_sum", "table_average"]))
        if op.startswith("table"):
            steps.append(f"{op}({draw(st.sampled_from(['net sales', 'margin', 'net debt']))}, none)")
            continue
        earlier = [f"#{i}" for i in range(index)]
        operand = st.one_of(OPERANDS, st.sampled_from(earlier)) if earlier else OPERANDS
        steps.append(f"{op}({draw(operand)}, {draw(operand)})")
    return ", ".join(steps)


@given(programs())
def test_compiled_python_gives_what_the_program_gives(program: str):
    try:
        expected = execute(program, TABLE)
    except ProgramError:
        return
    variables: dict[str, object] = {}
    exec(to_python(program, TABLE, "what was net sales in 2009?", PAGE), variables)
    assert match(variables["ans"], expected)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str):
    with suppress(ProgramError):
        assert parse(text)
