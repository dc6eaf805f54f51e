"""When an answer is right, rule by rule: the table below is the specification.

Each line is (a program's result, the label, the rules under which it is right). The headings say what a block is
about; borders are tested just inside and just outside.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from finqa.answers import RULES, match

ALL = "strict relaxed reported"
NOT_REPORTED = "strict relaxed"
NOT_STRICT = "relaxed reported"
RELAXED = "relaxed"
REPORTED = "reported"
NONE = ""
NAN, INF = float("nan"), float("inf")

CASES: dict[str, list[tuple[object, object, str]]] = {
    "a label is rounded to five decimals, a result is not": [
        (0.8916269210386858, "0.89163", ALL),
        (0.8916269210386858, 0.89163, ALL),
        (1 / 3, 0.33333, ALL),
        (2 / 3, "0.66667", ALL),
        (-1 / 3, "-0.33333", ALL),
        (1 / 3, "0.33334", NOT_STRICT),
        (0.141414141, "0.14141", ALL),
        (94.32500001, "94.325", ALL),
        (3.6100000000000003, "3.61", ALL),
        (0.1 + 0.2, "0.3", ALL),
    ],
    "strict: 5.01e-6, both sides": [
        (0.500005, 0.5, ALL),
        (0.499995, 0.5, ALL),
        (0.50000500999, 0.5, ALL),
        (0.49999499001, 0.5, ALL),
        (0.50000501001, 0.5, NOT_STRICT),
        (0.49999498999, 0.5, NOT_STRICT),
        (-0.50000500999, -0.5, ALL),
        (-0.50000501001, -0.5, NOT_STRICT),
        (5.00999e-6, 0, ALL),
        (-5.00999e-6, 0, ALL),
        (5.01001e-6, 0, REPORTED),
        (-5.01001e-6, 0, REPORTED),
        (0.89162, 0.89163, NOT_STRICT),
    ],
    "strict: above 5.01 the border is one part in a million of the label": [
        (5.0100050099, 5.01, ALL),
        (1000000.999, 1000000, NOT_REPORTED),
        (999999.001, 1000000, NOT_REPORTED),
        (1000001.001, 1000000, RELAXED),
        (999998.999, 1000000, RELAXED),
        (-1000000.999, -1000000, NOT_REPORTED),
        (-1000001.001, -1000000, RELAXED),
        (100.000099, 100, ALL),
        (100.000101, 100, NOT_STRICT),
        (1473945024.8, "1473945024.8", ALL),
        (1473945100.0, 1473945024.8, NOT_REPORTED),
        (1473950024.8, 1473945024.8, RELAXED),
    ],
    "relaxed: one part in a thousand of the label, both sides": [
        (1000.999, 1000, RELAXED),
        (999.001, 1000, RELAXED),
        (1001.001, 1000, NONE),
        (998.999, 1000, NONE),
        (-1000.999, -1000, RELAXED),
        (-1001.001, -1000, NONE),
        (0.0500499, 0.05, NOT_STRICT),
        (0.0500501, 0.05, REPORTED),
        (94, 94.05, RELAXED),
        (94, 94.1, NONE),
    ],
    "relaxed: per cent for a fraction, never the other way round": [
        (89.16269, 0.89163, NOT_STRICT),
        (89.2, 0.89163, NOT_STRICT),
        (89.3, 0.89163, NONE),
        (-12.5, -0.125, NOT_STRICT),
        (100.0999, 1, NOT_STRICT),
        (100.1001, 1, NONE),
        (0.125, 12.5, NONE),
        (0.0891627, 0.89163, NONE),
        (8916.269, 0.89163, NONE),
        (100, 1, NOT_STRICT),
        (1, 100, NONE),
    ],
    "reported: within 1e-3, whatever the size": [
        (0.0771, 0.0774, REPORTED),
        (0.001, 0.0019, REPORTED),
        (0.001, 0.0021, NONE),
        (0.5009, 0.5, REPORTED),
        (0.4991, 0.5, REPORTED),
        (0.5011, 0.5, NONE),
        (1000000.0009, 1000000, ALL),
        (0.0005, -0.0004, REPORTED),
        (-0.0005, 0.0004, REPORTED),
    ],
    "reported: a result that is too large by 100, 1e3, 1e6 or 1e9 passes, one that is too small does not": [
        (14.1, 0.141, NOT_STRICT),
        (141, 0.141, REPORTED),
        (141000, 0.141, REPORTED),
        (141000000, 0.141, REPORTED),
        (1410, 0.141, NONE),
        (12675000, 12.675, REPORTED),
        (12675, 12.675, REPORTED),
        (12.675, 12675000, NONE),
        (12.675, 12675, NONE),
    ],
    "a label of zero": [
        (0, 0, ALL),
        (0.0, "0.0", ALL),
        (-0.0, 0, ALL),
        ("0", "-0", ALL),
        (0.000005, 0, ALL),
        (0.00001, 0, REPORTED),
        (0.0009, 0, REPORTED),
        (0.0011, 0, REPORTED),  # 0.0011 / 100 is near 0
        (0.09, 0, REPORTED),
        (1, 0, REPORTED),
        (999999, 0, REPORTED),  # so is 999999 / 1e9
        (1000001, 0, NONE),
        ("no", 0, NONE),
        (False, 0, NONE),
        (None, 0, NONE),
        ("", 0, NONE),
    ],
    "signs count": [
        (-0.1, 0.1, NONE),
        (0.1, -0.1, NONE),
        (-5, "5", NONE),
        ("-5", -5, ALL),
        ("+5", 5, ALL),
        (-1000000, 1000000, NONE),
    ],
    "numbers of every type": [
        (94, 94, ALL),
        (94, 94.0, ALL),
        (94.0, 94, ALL),
        (Decimal("2.5"), 2.5, ALL),
        (2.5, Decimal("2.5"), ALL),
        (Decimal("0.891626921"), "0.89163", ALL),
        (Decimal("1E+2"), 100, ALL),
        (Fraction(5, 2), "2.5", ALL),
        (Fraction(1, 3), 0.33333, ALL),
        (Fraction(-5, 2), -2.5, ALL),
        (np.float64(2.5), 2.5, ALL),
        (np.float32(0.1), 0.1, ALL),
        (np.float16(2.5), 2.5, ALL),
        (np.longdouble(2.5), 2.5, ALL),
        (np.int64(94), 94, ALL),
        (np.int8(-5), "-5", ALL),
        (np.uint64(2**63), 2**63, ALL),
        (2.5, np.float64(2.5), ALL),
        (np.array(2.5), 2.5, ALL),
        (np.str_("2.5"), 2.5, ALL),
    ],
    "numbers as text": [
        ("94", 94, ALL),
        (" 94\n", 94, ALL),
        ("1,234", 1234, ALL),
        ("1,234,567.5", 1234567.5, ALL),
        (1234, "1,234", ALL),
        ("-1,234", "-1234", ALL),
        (".5", 0.5, ALL),
        ("-.5", -0.5, ALL),
        ("5.", 5, ALL),
        ("1e3", 1000, ALL),
        ("1.5E-3", 0.0015, ALL),
        ("1e+06", 1000000, ALL),
        ("007", 7, ALL),
        ("2.50", "2.5", ALL),
        ("2_5", 25, NONE),
        ("0x10", 16, NONE),
        ("- 5", -5, NONE),
        ("--5", -5, NONE),
        ("1.2.3", 1.2, NONE),
        ("1e", 1, NONE),
        (",5", 5, NONE),
        (".", 0, NONE),
        ("five", 5, NONE),
        ("", "", NONE),
        (b"5", 5, NONE),
    ],
    "a sign of per cent, a currency, a unit or brackets make a text, not a number": [
        ("14.1%", 0.141, NONE),
        ("14.1%", 14.1, NONE),
        ("14.1%", "14.1%", NONE),
        ("14.1 %", 0.141, NONE),
        ("$5", 5, NONE),
        ("$ 1,234", 1234, NONE),
        ("5 million", 5, NONE),
        ("(5)", -5, NONE),
        ("ans = 5", 5, NONE),
        ("7/8", 0.875, NONE),
    ],
    "yes and no": [
        ("yes", "yes", ALL),
        ("no", "no", ALL),
        (" Yes ", "yes", ALL),
        ("NO", "no", ALL),
        (True, "yes", ALL),
        (False, "no", ALL),
        ("yes", True, ALL),
        ("True", "yes", ALL),
        ("false", "no", ALL),
        (np.bool_(True), "yes", ALL),
        (np.bool_(False), "no", ALL),
        (np.array(True), "yes", ALL),
        (np.str_("yes"), "yes", ALL),
        (True, True, ALL),
        ("no", "yes", NONE),
        (True, "no", NONE),
        (True, 1, NONE),
        (False, 0, NONE),
        (np.bool_(True), 1, NONE),
        (1, "yes", NONE),
        (0, "no", NONE),
        ("1", "yes", NONE),
        (True, "1", NONE),
        ("y", "yes", NONE),
        ("yes.", "yes", NONE),
        ("yes, it did", "yes", NONE),
        (None, "no", NONE),
    ],
    "what is no answer matches nothing, itself included": [
        (None, None, NONE),
        (None, "None", NONE),
        ([2.5], 2.5, NONE),
        ((2.5,), 2.5, NONE),
        ({"ans": 2.5}, 2.5, NONE),
        ({2.5}, 2.5, NONE),
        ([], [], NONE),
        (["yes"], "yes", NONE),
        (np.array([2.5]), 2.5, NONE),
        (np.array([[1, 2]]), 1, NONE),
        (2.5 + 0j, 2.5, NONE),
        (np.complex128(2.5), 2.5, NONE),
        (len, 2.5, NONE),
        (object(), object(), NONE),
        (np.datetime64("2009"), 2009, NONE),
    ],
    "neither NaN nor infinity is ever right": [
        (NAN, NAN, NONE),
        (NAN, 0, NONE),
        (0, NAN, NONE),
        ("nan", "nan", NONE),
        ("NaN", NAN, NONE),
        (np.float64("nan"), NAN, NONE),
        (Decimal("NaN"), Decimal("NaN"), NONE),
        (Decimal("sNaN"), 0, NONE),
        (INF, INF, NONE),
        (-INF, -INF, NONE),
        ("inf", "inf", NONE),
        ("-Infinity", -INF, NONE),
        (np.float32("inf"), INF, NONE),
        (Decimal("Infinity"), INF, NONE),
        (np.longdouble("nan"), NAN, NONE),
        (INF, 1e308, NONE),
        (1.0, INF, NONE),
    ],
    "numbers that no float holds are no answers; those that one holds are": [
        (10**400, 10**400, NONE),
        (10**400, 1.0, NONE),
        ("1e400", "1e400", NONE),
        ("9" * 5000, 1, NONE),
        (10**5000, 1, NONE),
        (Fraction(10**400), 1, NONE),
        (Decimal("1e400"), 1, NONE),
        (1e308, 1e308, ALL),
        (1e308, -1e308, NONE),
        (10**300, "1e300", ALL),
        (2**53 + 1, 2**53, ALL),  # one float
        (5e-324, 0, ALL),
        (Fraction(1, 10**400), 0, ALL),
    ],
}


@pytest.mark.parametrize(
    ("actual", "expected", "rules"),
    [
        pytest.param(*case, id=f"{block} ({number})")
        for block, cases in CASES.items()
        for number, case in enumerate(cases, start=1)
    ],
)
def test_an_answer_is_right_under_exactly_these_rules(actual: object, expected: object, rules: str):
    assert [rule for rule in RULES if match(actual, expected, rule)] == rules.split()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown answer rule 'loose'"):
        match(1, 1, "loose")  # pyright: ignore[reportArgumentType]
