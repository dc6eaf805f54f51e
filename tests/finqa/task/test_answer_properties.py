"""What holds of the answer rules whatever the numbers; test_answers.py has the table of cases."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from finqa.task.answers import RULES, Rule, match

NAN, INF = float("nan"), float("inf")
LABELS = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(-1e9, 1e9).map(lambda value: round(value, 5)),
    st.floats(-1, 1).map(lambda value: round(value, 5)),
)
"""Numbers as FinQA's labels are: at most five decimals."""
NUMBERS = st.one_of(LABELS, st.floats(allow_nan=False, allow_infinity=False), st.floats(-10, 10))
NO_FINITE_NUMBERS = st.sampled_from(
    [
        *(NAN, INF, -INF, "nan", "inf", "-inf", "Infinity", "1e999", 10**400, None),
        *(Decimal("NaN"), Decimal("sNaN"), Decimal("-Infinity")),
        *(np.float32("nan"), np.float64("-inf"), np.longdouble("inf")),
    ]
)
ANYTHING = st.one_of(NUMBERS, st.booleans(), st.text(max_size=8), st.sampled_from(["yes", "no", "1,234"]))


def representations(value: int | float) -> list[object]:
    """`value` in every type and notation that holds exactly it."""
    same: list[object] = [value, float(value), np.float64(value), np.longdouble(value), np.array(float(value))]
    same += [Decimal(value), Fraction(value), repr(float(value)), f" {float(value)!r} ", f"{float(value):.17e}"]
    if float(value).is_integer():
        same += [int(value), f"{int(value)}", f"{int(value):,}"]
        if abs(value) < 2**63:
            same.append(np.int64(int(value)))
    return same


@given(NUMBERS, LABELS, st.sampled_from([0.0, 4.9e-6, 5.0e-6, 5.1e-6, 1e-4, 1.0]), st.sampled_from(RULES))
def test_the_verdict_does_not_depend_on_how_a_number_is_represented(
    value: int | float, label: int | float, distance: float, rule: Rule
):
    assume(value == float(value))
    for actual in (value, label + distance):  # far from the label, and near it
        verdicts = {match(a, e, rule) for a in representations(actual) for e in representations(label)}
        assert verdicts == {match(actual, label, rule)}


@given(NO_FINITE_NUMBERS, st.one_of(ANYTHING, NO_FINITE_NUMBERS), st.sampled_from(RULES))
def test_what_is_no_finite_number_is_never_right_and_never_a_label(bad: object, other: object, rule: Rule):
    assert not match(bad, other, rule) and not match(other, bad, rule)


@given(st.floats(-1e9, 1e9))
def test_strict_accepts_a_result_whose_label_is_the_official_rounding(result: float):
    assert match(result, round(result, 5))


@given(LABELS, st.floats(-2e-5, 2e-5))
def test_strict_accepts_what_the_official_rule_accepts_and_little_more(label: int | float, distance: float):
    """Near any label: round(result, 5) == label implies strict, and strict implies five decimals or a millionth."""
    result = label + distance
    if round(result, 5) == label:
        assert match(result, label)
    if match(result, label):
        assert abs(round(result, 5) - label) <= max(1.1e-5, 1.1e-6 * abs(label))


@given(st.one_of(ANYTHING, NO_FINITE_NUMBERS), st.one_of(ANYTHING, NO_FINITE_NUMBERS), st.floats(-1e-4, 1e-4))
def test_relaxed_contains_strict(actual: object, expected: object, distance: float):
    near = expected + distance if isinstance(expected, float) else expected
    for result in (actual, expected, near):
        assert match(result, expected, "relaxed") or not match(result, expected, "strict")


@given(LABELS, st.floats(-9.99e-4, 9.99e-4), st.sampled_from([1, 100, 0.01]))
def test_relaxed_forgives_a_rounded_result_and_per_cent_either_way(label: int | float, error: float, factor: float):
    assume(label != 0)
    assert match(label * (1 + error) * factor, label, "relaxed")


@given(LABELS, st.floats(1.01e-3, 0.5), st.sampled_from([1, -1]), st.sampled_from([1, 100, 0.01]))
def test_relaxed_forgives_no_larger_error_and_nothing_where_the_label_is_zero(
    label: int | float, error: float, side: int, factor: float
):
    result = label * (1 + side * error) * factor
    assume(abs(result - label) > 5.01e-6)  # what strict accepts
    assert not match(result, label, "relaxed")
    assert not match(label, 0, "relaxed") or match(label, 0)


@given(NUMBERS, st.sampled_from(RULES))
def test_every_number_matches_itself_as_text(value: int | float, rule: Rule):
    assert match(repr(value), value, rule)


@given(NUMBERS, st.sampled_from(["yes", "no", "True", True, False, np.bool_(False)]), st.sampled_from(RULES))
def test_a_number_is_never_a_yes_or_a_no(value: int | float, answer: object, rule: Rule):
    assert not match(value, answer, rule) and not match(answer, value, rule)
