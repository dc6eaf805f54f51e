"""The wording of questions: six phrasings to train on and two of the test alone, alike for every metric."""

from __future__ import annotations

from collections.abc import Sequence

from mini.families import Slots
from study.invented.metrics import Formula, Metric

TRAINED, UNSEEN = (0, 1, 2, 3, 4, 5), (6, 7)
"""Numbers of the phrasings of training rows, dev and documents, and of those that only the test has."""
_INVENTED = (
    "what is the {name} index of {row} and {row_2} from {year_2} to {year}?",
    "for {row} and {row_2} , what was the {name} index between {year_2} and {year}?",
    "calculate the {name} index of {row} with {row_2} for {year_2} to {year} .",
    "how large is the {name} index for {row} and {row_2} from {year_2} to {year}?",
    "from {year_2} to {year} , what is the {name} index of {row} and {row_2}?",
    "what {name} index do {row} and {row_2} have between {year_2} and {year}?",
    "determine the {name} index of {row} and {row_2} between {year_2} and {year} .",
    "what does the {name} index of {row} and {row_2} come to from {year_2} to {year}?",
)
_KNOWN = (
    "what is {words}?",
    "from the table , what was {words}?",
    "calculate {words} .",
    "how large is {words}?",
    "by the page , what is {words}?",
    "what amount is {words}?",
    "determine {words} .",
    "what does {words} come to?",
)
_LOOK_UP = (
    "what is the {name} index of {year}?",
    "for {year} , what was the {name} index?",
    "give the {name} index for {year} .",
    "how large is the {name} index in {year}?",
    "in {year} , what is the {name} index?",
    "what {name} index is shown for {year}?",
)


def row_name(metric: Metric) -> str:
    """Name of a row of the table that bears a metric's name."""
    return f"{metric.name} index"


def ask(metric: Metric, slots: Slots, phrasing: int) -> str:
    """A question for a metric by its name, or for a known family in words."""
    if metric.kind == "known":
        return _KNOWN[phrasing].format(words=in_words(metric.formula, slots))
    return _INVENTED[phrasing].format(name=metric.name, **vars(slots))


def ask_with_definition(metric: Metric, slots: Slots, operands: Sequence[str], phrasing: int) -> str:
    """The question (`ask`) after the metric's definition, in which each operand has its value in brackets."""
    start = f"the {metric.name} index of {slots.row} and {slots.row_2} from {slots.year_2} to {slots.year}"
    return f"{start} is {in_words(metric.formula, slots, operands)} . {ask(metric, slots, phrasing)}"


def ask_for_a_row(metric: Metric, slots: Slots, phrasing: int) -> str:
    """A question for one cell of the row that bears the metric's name."""
    return _LOOK_UP[phrasing].format(name=metric.name, year=slots.year)


def in_words(formula: Formula, slots: Slots, operands: Sequence[str] = ()) -> str:
    """The formula over the operands' names, with their values in brackets where they are given."""
    named = (f"{slots.row} of {slots.year}", f"{slots.row} of {slots.year_2}", f"{slots.row_2} of {slots.year}")
    if operands:
        a, b, c = (f"{name} ( {value} )" for name, value in zip(named, operands, strict=True))
        named = (a, b, c)
    return formula.words(named)
