"""What an annotator wrote against the label: whether they contradict each other, and what kind of answer is asked for.

The tables are the specification; their questions and numbers are invented.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.task.stated_answers import AnswerKind, answer_kind, label_disputed

CASES: dict[str, list[tuple[str, str, bool | None]]] = {
    "rounded to the digits that are shown, or cut": [
        ("14.2", "14.15", False),
        ("14.1", "14.19", False),
        ("14", "14.9", False),
        ("14.1", "14.2", True),
        ("14", "15", True),
        ("14.15", "14.17", True),
        ("1,234.5", "1234.46", False),
        (".5", "0.5", False),
        ("5.", "5", False),
        ("-0.0", "0.04", False),
        ("0", "0.0", False),
        ("0", "12.0", True),
    ],
    "per cent": [
        ("24%", "0.24", False),
        ("24%", "24.3", False),
        ("24", "0.2391", False),
        ("0.24", "24", False),
        ("24 %", "0.26", True),
        ("24%", "0.0024", True),
        ("24%", "1.24", True),
        ("7%", "0.067", False),
        ("0.5%", "0.00512", False),
        ("240%", "2.4", False),
    ],
    "a label of five decimals is rounded itself": [
        ("12.3455%", "0.12345", False),
        ("12.3462%", "0.12345", True),
        ("1.234567", "1.23457", False),
    ],
    "thousands, millions and billions, but for per cent": [
        ("$ 4.26 million", "4.26", False),
        ("$ 4.26 million", "4260000.0", False),
        ("4260", "4.26", False),
        ("4.3", "4260.0", False),
        ("4.26", "42.6", True),
        ("42.6%", "0.0426", True),
        ("4.26%", "4260.0", True),
    ],
    "one digit is near too many numbers for that": [
        ("4", "4260.0", True),
        ("4", "4.26", False),
        ("1", "700.0", True),
        ("0", "0.3", False),
    ],
    "the sign does not count": [
        ("12%", "-0.12", False),
        ("-12%", "0.12", False),
        ("( 35 )", "-35.0", False),
    ],
    "one number of a sentence is enough": [
        ("the balance rose by 8.3% from 2010 to 2011", "0.08312", False),
        ("$ 35 or $ 3.5 million", "3.5", False),
        ("in 2010 and 2011 , shares were issued", "731000.0", True),
        ("9.5\\n", "9.5", False),
    ],
    "yes and no": [
        ("yes", "yes", False),
        ("Yes", "yes", False),
        ("no", "yes", True),
        ("no", "12.0", True),
        ("12%", "no", True),
        ("yes.", "yes", False),
        ("yes , rent rose by 12%", "yes", False),
        ("no : rent fell", "yes", True),
        ("rent is not known", "no", None),
        ("yes or no", "yes", True),
    ],
    "where nothing is stated nothing is contradicted": [
        ("", "12.0", None),
        ("  ", "yes", None),
        ("about", "12.0", None),
        ("12", "", None),
        ("12%", "12%", None),  # such a label is no number, and matches nothing either
        ("12", "nan", None),
    ],
}


@pytest.mark.parametrize(
    ("stated", "label", "disputed"),
    [
        pytest.param(*case, id=f"{block} ({number})")
        for block, cases in CASES.items()
        for number, case in enumerate(cases, start=1)
    ],
)
def test_a_label_is_disputed_where_what_is_stated_differs_by_more_than_its_form(
    stated: str, label: str, disputed: bool | None
):
    assert label_disputed(stated, label) is disputed


LABELS = st.floats(-1e9, 1e9).map(lambda value: round(value, 5))


@given(LABELS, st.integers(0, 5), st.sampled_from([1, -1]))
def test_a_label_is_never_disputed_by_its_own_rounding_whatever_the_sign(label: float, decimals: int, sign: int):
    assert label_disputed(f"{sign * label:.{decimals}f}", repr(label)) is False
    assert label_disputed(f"{sign * label:,.{decimals}f}", repr(label)) is False


@given(LABELS, st.integers(0, 3))
def test_a_label_is_never_disputed_by_its_per_cent(label: float, decimals: int):
    assert label_disputed(f"{100 * label:.{decimals}f}%", repr(label)) is False


@given(st.floats(1, 1e6), st.floats(0.02, 0.5), st.sampled_from([1, -1]))
def test_a_stated_per_cent_that_is_off_by_two_hundredths_disputes_the_label(per_cent: float, off: float, side: int):
    label = per_cent / 100 * (1 + side * off)
    assert label_disputed(f"{per_cent:.3f}%", f"{label:.8f}") is True


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_has_a_verdict_and_a_kind(stated: str, label: str):
    assert label_disputed(stated, label) in (True, False, None)
    assert answer_kind(stated, label, stated) in ("per cent", "amount", "yes/no")


@pytest.mark.parametrize(
    ("stated", "label", "question", "kind"),
    [
        ("", "yes", "did the percentage of sales rise?", "yes/no"),
        ("no", "no", "did rent rise?", "yes/no"),
        ("24%", "0.24", "how did rent change?", "per cent"),
        ("rent fell by 24%", "-0.24", "what became of rent?", "per cent"),
        ("24.1", "0.24123", "how much of sales is freight?", "per cent"),
        ("24.1", "24.1", "what percentage of sales is freight?", "per cent"),
        ("", "0.24", "what was the percent change in rent?", "per cent"),
        ("0.24", "0.24", "what % ( % ) of sales is freight?", "per cent"),
        ("0.24", "0.24", "what is the growth rate in sales?", "per cent"),
        ("0.24", "0.24", "What Portion of sales is freight?", "per cent"),
        ("0.24", "0.24", "what is the roi of an investment in oaks?", "per cent"),
        ("35", "35", "what is the current portion of debt?", "amount"),
        ("35", "35", "what would a 2% ( 2 % ) rise in interest cost?", "amount"),
        ("0.82", "0.82", "what was the ratio of freight to rent?", "amount"),
        ("$ 4.26 million", "4.26", "what was rent?", "amount"),
        ("", "12", "what was rent in 2010?", "amount"),
    ],
)
def test_the_kind_of_answer_is_told_by_what_is_stated_then_by_the_label_and_the_words(
    stated: str, label: str, question: str, kind: AnswerKind
):
    assert answer_kind(stated, label, question) == kind
