"""The question families of FinQA-mini: what is asked of a page, in several phrasings, and its gold program.

Families come in three kinds. *known* ones are in pocket-mistral's pretraining; *new* ones are held out of it wholly,
so that fine-tuning on FinQA-mini is what adds them; *other* ones are held out too and are not part of FinQA-mini: a
second fine-tune can add them instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mini.pages import Page

Kind = Literal["known", "new", "other"]


@dataclass(frozen=True)
class Slots:
    """What a question is about; which fields a family reads depends on the family's `shape`."""

    row: str = ""
    row_2: str = ""
    year: str = ""
    """The later year, or the only one."""
    year_2: str = ""
    """The earlier year."""
    count: str = ""
    region: str = ""


@dataclass(frozen=True)
class Family:
    """One kind of question."""

    name: str
    kind: Kind
    shape: Literal["two years", "row", "two rows", "three rows", "row and growth", "text"]
    """Which slots it has; families of one shape can ask different things of the same page, row and years."""
    phrasings: tuple[str, ...]
    """Question templates over the slots. The first is the one of minimal pairs."""
    program: Callable[[Page, Slots], str]
    """The gold program."""
    facts: tuple[str, ...] = ()
    """Text facts that the page must have."""


def _at(page: Page, row: str, year: str) -> str:
    return page.rows[row][year].literal


def _fact(page: Page, name: str) -> str:
    return page.facts[name].literal


FAMILIES = (
    Family(
        "change",
        "known",
        "two years",
        (
            "what was the change in {row} between {year_2} and {year}?",
            "by how much did {row} change from {year_2} to {year}?",
            "what is the increase or decrease in {row} from {year_2} to {year}?",
            "how much did {row} move in {year} compared to {year_2}?",
        ),
        lambda p, s: f"subtract({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)})",
    ),
    Family(
        "two_year_total",
        "known",
        "two years",
        (
            "what was the total of {row} between {year_2} and {year}?",
            "what is {row} of {year_2} and {year} combined?",
            "how much {row} was there in {year_2} and {year} together?",
            "add up {row} for {year_2} and {year} .",
        ),
        lambda p, s: f"add({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)})",
    ),
    Family(
        "comparison",
        "known",
        "two years",
        (
            "was {row} higher in {year} than in {year_2}?",
            "did {row} in {year} exceed that of {year_2}?",
            "was there more {row} in {year} than in {year_2}?",
            "in {year} , did {row} rise above {year_2}?",
        ),
        lambda p, s: f"greater({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)})",
    ),
    Family(
        "highest",
        "known",
        "row",
        (
            "what was the highest {row} in the table?",
            "what is the maximum {row} of all years shown?",
            "at its peak , how large was {row}?",
            "what was the largest amount of {row}?",
        ),
        lambda p, s: f"table_max({s.row}, none)",
    ),
    Family(
        "lowest",
        "known",
        "row",
        (
            "what was the lowest {row} in the table?",
            "what is the minimum {row} of all years shown?",
            "at its low , how small was {row}?",
            "what was the smallest amount of {row}?",
        ),
        lambda p, s: f"table_min({s.row}, none)",
    ),
    Family(
        "row_total",
        "known",
        "row",
        (
            "what was the total {row} in the table?",
            "what is the sum of {row} over all years shown?",
            "how much {row} was there in all years together?",
            "adding up every year , how large was {row}?",
        ),
        lambda p, s: f"table_sum({s.row}, none)",
    ),
    Family(
        "two_row_total",
        "known",
        "two rows",
        (
            "what was the total of {row} and {row_2} in {year}?",
            "in {year} , what were {row} and {row_2} combined?",
            "how large were {row} and {row_2} together in {year}?",
            "what is the sum of {row} and {row_2} for {year}?",
        ),
        lambda p, s: f"add({_at(p, s.row, s.year)}, {_at(p, s.row_2, s.year)})",
    ),
    Family(
        "portion",
        "known",
        "two rows",
        (
            "what was the portion of {row} to {row_2} in {year}?",
            "in {year} , how large was {row} as a share of {row_2}?",
            "what fraction of {row_2} was {row} in {year}?",
            "for {year} , what is {row} divided by {row_2}?",
        ),
        lambda p, s: f"divide({_at(p, s.row, s.year)}, {_at(p, s.row_2, s.year)})",
    ),
    Family(
        "net_of_both",
        "known",
        "three rows",
        (
            "what was left of {row} after {row_2} of {year} and {year_2}?",
            "in {year} , what remains of {row} less {row_2} of {year} and of {year_2}?",
            "deduct {row_2} of {year} and {year_2} from {row} of {year} .",
        ),
        lambda p, s: (
            f"subtract({_at(p, s.row, s.year)}, {_at(p, s.row_2, s.year)}), subtract(#0, {_at(p, s.row_2, s.year_2)})"
        ),
    ),
    Family(
        "projection",
        "known",
        "row and growth",
        (
            "at the expected growth , what will {row} be {count} years after {year}?",
            "if {row} of {year} grows at that rate for {count} years , how large will it be?",
            "project {row} from {year} over {count} years of growth .",
        ),
        lambda p, s: (
            f"add(const_1, {_fact(p, 'growth')}), exp(#0, const_{s.count}), multiply(#1, {_at(p, s.row, s.year)})"
        ),
        facts=("growth",),
    ),
    Family(
        "repurchase_cost",
        "known",
        "text",
        (
            "how much was spent on repurchased shares?",
            "what did the company pay for the shares it bought back?",
            "what was the cost of the share repurchases?",
        ),
        lambda p, s: f"multiply({_fact(p, 'shares')}, {_fact(p, 'price')})",
        facts=("repurchase",),
    ),
    Family(
        "units_left",
        "known",
        "text",
        (
            "how many authorized units were not yet issued?",
            "how many units can still be issued?",
            "what number of authorized units is left?",
        ),
        lambda p, s: f"subtract({_fact(p, 'authorized')}, {_fact(p, 'bought')})",
        facts=("program",),
    ),
    Family(
        "region_amount",
        "known",
        "text",
        (
            "how much {row} came from {region} in {year}?",
            "in {year} , what amount of {row} did {region} bring?",
            "what was {row} of {region} in {year}?",
        ),
        lambda p, s: f"multiply({_at(p, s.row, s.year)}, {_fact(p, 'region_share')})",
        facts=("region",),
    ),
    Family(
        "percentage_change",
        "new",
        "two years",
        (
            "what was the percentage change in {row} between {year_2} and {year}?",
            "by what percentage did {row} change from {year_2} to {year}?",
            "what is the growth rate of {row} from {year_2} to {year}?",
            "what was the percent increase or decrease in {row} from {year_2} to {year}?",
        ),
        lambda p, s: (
            f"subtract({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)}), divide(#0, {_at(p, s.row, s.year_2)})"
        ),
    ),
    Family(
        "two_year_average",
        "new",
        "two years",
        (
            "what was the average of {row} between {year_2} and {year}?",
            "what is the average {row} for {year_2} and {year}?",
            "on average , how large was {row} in {year_2} and {year}?",
            "what was the mean {row} of {year_2} and {year}?",
        ),
        lambda p, s: f"add({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)}), divide(#0, const_2)",
    ),
    Family(
        "row_average",
        "new",
        "row",
        (
            "what was the average {row} in the table?",
            "what is the mean {row} of all years shown?",
            "on average , how large was {row} over all years?",
            "what was the average amount of {row}?",
        ),
        lambda p, s: f"table_average({s.row}, none)",
    ),
    Family(
        "ratio",
        "new",
        "two years",
        (
            "what was the ratio of {row} between {year} and {year_2}?",
            "what is the ratio of {row} in {year} to {row} in {year_2}?",
            "how many times as large was {row} in {year} as in {year_2}?",
            "in {year} , {row} was what multiple of {year_2}?",
        ),
        lambda p, s: f"divide({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)})",
    ),
    Family(
        "spread",
        "other",
        "row",
        (
            "what was the spread of {row} in the table?",
            "how far apart are the best and worst years of {row}?",
            "what is the range of {row} over all years shown?",
            "what was the gap from trough to top of {row}?",
        ),
        lambda p, s: f"table_max({s.row}, none), table_min({s.row}, none), subtract(#0, #1)",
    ),
    Family(
        "two_row_gap",
        "other",
        "two rows",
        (
            "what was the gap of {row} to {row_2} in {year}?",
            "in {year} , by how much was {row} larger than {row_2}?",
            "how much more {row} than {row_2} was there in {year}?",
            "what is the difference of {row} and {row_2} for {year}?",
        ),
        lambda p, s: f"subtract({_at(p, s.row, s.year)}, {_at(p, s.row_2, s.year)})",
    ),
    Family(
        "year_weight",
        "other",
        "two years",
        (
            "what was the weight of {year} in {row} between {year_2} and {year}?",
            "of {row} in {year_2} and {year} , which part fell in {year}?",
            "how much of the two years' {row} belongs to {year} rather than {year_2}?",
        ),
        lambda p, s: f"add({_at(p, s.row, s.year)}, {_at(p, s.row, s.year_2)}), divide({_at(p, s.row, s.year)}, #0)",
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}


def families(*kinds: Kind) -> tuple[Family, ...]:
    """The families of the given kinds, in order."""
    return tuple(family for family in FAMILIES if family.kind in kinds)
