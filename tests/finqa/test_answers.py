"""When an answer is right, rule by rule."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.answers import RULES, Rule, match


@pytest.mark.parametrize(
    ("actual", "expected", "rules"),
    [
        (0.8916269210386858, "0.89163", "strict relaxed reported"),
        (0.89162, 0.89163, "relaxed reported"),
        (89.16269, 0.89163, "relaxed reported"),
        (0.0891627, 0.89163, ""),
        (0.0771, 0.0774, "reported"),
        (1473945024.8, "1473945024.8", "strict relaxed reported"),
        (1473945100.0, 1473945024.8, "strict relaxed"),
        (1473950024.8, 1473945024.8, "relaxed"),
        (12.675, 12675000, ""),
        (12675000, 12.675, "reported"),
        (0.0000051, 0, "reported"),
        (0.000005, 0, "strict relaxed reported"),
        (-0.1, 0.1, ""),
        ("1,234", 1234, "strict relaxed reported"),
        ("yes", "yes", "strict relaxed reported"),
        (True, "yes", "strict relaxed reported"),
        ("True", "yes", "strict relaxed reported"),
        (False, "no", "strict relaxed reported"),
        (True, 1, ""),
        (1, "yes", ""),
        ("no", "yes", ""),
        (np.float64(2.5), 2.5, "strict relaxed reported"),
        (np.bool_(True), "yes", "strict relaxed reported"),
        (Decimal("2.5"), 2.5, "strict relaxed reported"),
        (Fraction(5, 2), "2.5", "strict relaxed reported"),
        (None, None, ""),
        ([2.5], 2.5, ""),
        (np.array([2.5]), 2.5, ""),
        (float("nan"), float("nan"), ""),
        (float("inf"), float("inf"), ""),
        ("inf", "inf", ""),
        (10**400, 1.0, ""),
        ("", "", ""),
        ("2_5", 25, ""),
        (2.5 + 0j, 2.5, ""),
    ],
)
def test_an_answer_is_right_under_exactly_these_rules(actual: object, expected: object, rules: str):
    assert [rule for rule in RULES if match(actual, expected, rule)] == rules.split()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown answer rule 'loose'"):
        match(1, 1, "loose")  # pyright: ignore[reportArgumentType]


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(RULES))
def test_every_number_matches_itself_as_text(value: float, rule: Rule):
    assert match(repr(value), value, rule)


@given(st.floats(-1e9, 1e9))
def test_the_strict_rule_accepts_what_the_official_one_accepts(value: float):
    assert match(value, round(value, 5))
