"""Questions about a page: what a family asks, in one of its phrasings."""

from __future__ import annotations

from random import Random

from mini.families import Family, Slots
from mini.pages import LINE_ITEMS, PERCENT_ITEMS, Page


def choose_slots(rng: Random, page: Page, family: Family) -> Slots:
    """What to ask of `page`: rows that make sense for the family, two years in order of time."""
    plain = [row for row in page.rows if row in LINE_ITEMS]
    earlier, later = sorted(rng.sample(page.years, 2))
    if family.shape == "two years":
        # A percentage of a percentage, or of a negative number, is no sensible question.
        divides = family.name in ("percentage_change", "ratio", "year_weight")
        return Slots(row=rng.choice(plain if divides else list(page.rows)), year=later, year_2=earlier)
    if family.shape == "row":
        return Slots(row=rng.choice([r for r in page.rows if r not in PERCENT_ITEMS]))
    if family.shape in ("two rows", "three rows"):
        row, row_2 = rng.sample(plain, 2)
        return Slots(row=row, row_2=row_2, year=later, year_2=earlier)
    if family.shape == "row and growth":
        return Slots(row=rng.choice(plain), year=later, count=rng.choice("23456"))
    if family.name == "region_amount":
        facts = page.facts
        return Slots(row=facts["region_row"].literal, year=facts["region_year"].literal, region=facts["region"].literal)
    return Slots()


def ask(family: Family, slots: Slots, phrasing: int) -> str:
    """The question's text."""
    return family.phrasings[phrasing].format_map(vars(slots))
