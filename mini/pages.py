"""Synthetic pages of earnings reports, in the style of FinQA's: lower-cased, punctuation spaced.

A page has a company, a table of a few line items over three years, and text around it that holds facts which the
table has not. Every number on a page occurs once, so that an operand names its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

LINE_ITEMS = (
    *("net sales", "cost of sales", "gross profit", "operating income", "net income", "interest expense"),
    *("income taxes", "capital expenditures", "depreciation", "amortization", "goodwill", "total assets"),
    *("total debt", "inventories", "accounts receivable", "cash and equivalents", "research and development"),
    *("rental expense", "pension cost", "dividends paid", "order backlog", "restructuring charges"),
    *("stock compensation", "long-term debt", "short-term debt", "deferred revenue", "advertising expense"),
    *("service revenue", "product revenue", "license revenue", "premiums earned", "claims paid", "customer loans"),
    *("bank deposits", "interest income", "legal costs", "freight revenue", "fuel expense", "store rent"),
    *("accrued liabilities", "marketable securities", "property and equipment", "intangible assets"),
    *("selling expenses", "operating leases", "retained earnings", "working capital", "warranty reserve"),
)
SIGNED_ITEMS = ("other income ( loss )", "hedging gain ( loss )", "currency adjustment", "tax benefit ( expense )")
PERCENT_ITEMS = ("gross margin", "tax rate", "operating margin", "occupancy rate", "loss ratio", "market share")
REGIONS = ("north america", "europe", "asia", "latin america", "the western region", "government customers")
_COMPANY_FIRST = (
    *("harbor", "crestline", "northfield", "silver lake", "pioneer", "atlas", "redwood", "summit", "beacon", "granite"),
    *(
        "evergreen",
        "falcon",
        "highland",
        "keystone",
        "liberty",
        "meridian",
        "oakmont",
        "pacific",
        "quartz",
        "riverside",
    ),
)
_COMPANY_LAST = (
    *("foods", "energy", "financial", "tools", "paper", "airlines", "logistics", "chemicals", "insurance", "software"),
    *("holdings", "industries", "motors", "pharma", "railways", "stores"),
)
UNITS = ("( in millions )", "( in thousands )", "( dollars in millions )", "in millions of dollars", "year ended")


@dataclass(frozen=True)
class Number:
    """A number as a program has it (`literal`) and as the page shows it (`shown`)."""

    literal: str
    shown: str


@dataclass
class Page:
    """A page under construction."""

    years: list[str]
    """Column headers, the latest first."""
    rows: dict[str, dict[str, Number]]
    """Line item -> year -> number."""
    header: str
    company: str
    facts: dict[str, Number] = field(default_factory=dict)
    """Numbers that only the text has, by name."""
    sentences: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Digits of every number on the page."""

    def table(self) -> list[list[str]]:
        return [
            [self.header, *self.years],
            *([name, *(cells[year].shown for year in self.years)] for name, cells in self.rows.items()),
        ]

    def text(self, rng: Random) -> tuple[list[str], list[str]]:
        """The sentences before and after the table."""
        opening = rng.choice(_OPENINGS).format(company=self.company, year=max(self.years))
        sentences = rng.sample(self.sentences, len(self.sentences))
        split = rng.randint(0, len(sentences))
        return [opening, *sentences[:split]], sentences[split:]


_OPENINGS = (
    "{company} reports the following results for the year ended december 31 , {year} .",
    "the table below shows selected data of {company} as of december 31 , {year} .",
    "{company} and its subsidiaries present selected financial data for {year} and prior years .",
    "management of {company} reviews these amounts for {year} each quarter .",
)
_DISTRACTORS = (
    "the company had {n} employees at year end .",
    "an impairment of $ {n} was recorded in {year} .",
    "the credit facility of $ {n} expires in {year} .",
    "about {n} customers were added on average in each month .",
    "the ratio of debt to equity was under {n} per cent in {year} .",
    "see note {n} for the accounting policies .",
    "a percentage of the {n} leases was renewed in {year} .",
)


def make_page(rng: Random, facts: tuple[str, ...] = ()) -> Page:
    """A random page that has the given text facts ("repurchase", "growth", "region", "program") and one or two more."""
    last = rng.randint(2001, 2019)
    years = [str(last - back) for back in range(3)]
    page = Page(
        years=years,
        rows={},
        header=rng.choice(UNITS),
        company=f"{rng.choice(_COMPANY_FIRST)} {rng.choice(_COMPANY_LAST)}",
    )
    page.used.update(years)
    style = rng.choices(("plain", "thousands", "decimals"), (6, 2, 2))[0]
    dollars = rng.random() < 0.6
    names = rng.sample(LINE_ITEMS, rng.choice((2, 3, 3)))
    special = rng.random()
    if special < 0.12:
        names.insert(rng.randint(1, len(names)), rng.choice(SIGNED_ITEMS))
    elif special < 0.24:
        names.append(rng.choice(PERCENT_ITEMS))
    for index, name in enumerate(names):
        page.rows[name] = {year: _cell(rng, page, name, style, dollars and index == 0) for year in years}
    wanted = list(facts)
    others = [f for f in FACTS if f not in wanted]
    wanted += rng.sample(others, 1) if rng.random() < 0.5 else []
    for fact in wanted:
        page.sentences.append(FACTS[fact](rng, page))
    page.sentences.append(rng.choice(_DISTRACTORS).format(n=_fresh(rng, page, 11, 999).shown, year=rng.choice(years)))
    return page


def _cell(rng: Random, page: Page, name: str, style: str, dollar: bool) -> Number:
    if name in PERCENT_ITEMS:
        number = _fresh(rng, page, 30, 890, decimals=True)
        return Number(f"{number.literal}%", f"{number.shown}%")
    if name in SIGNED_ITEMS:
        number = _fresh(rng, page, 12, 480)
        return Number(f"-{number.literal}", f"-{number.shown} ( {number.shown} )") if rng.random() < 0.5 else number
    low, high = {"plain": (120, 9800), "thousands": (1000, 39000), "decimals": (210, 9900)}[style]
    number = _fresh(rng, page, low, high, decimals=style == "decimals", thousands=style == "thousands")
    return Number(number.literal, f"$ {number.shown}") if dollar else number


def _fresh(rng: Random, page: Page, low: int, high: int, decimals: bool = False, thousands: bool = False) -> Number:
    """A number whose digits no other number of the page has; with `decimals` its last digit stands behind a point."""
    while True:
        value = rng.randint(low, high)
        digits = str(value)
        # A trailing zero behind the point would make two literals of one value.
        if digits in page.used or (decimals and digits[-1] == "0"):
            continue
        page.used.add(digits)
        if decimals:
            literal = f"{digits[:-1]}.{digits[-1]}"
            return Number(literal, literal)
        return Number(digits, f"{value:,}" if thousands else digits)


def _repurchase(rng: Random, page: Page) -> str:
    shares = page.facts["shares"] = _fresh(rng, page, 110, 990)
    price = page.facts["price"] = _fresh(rng, page, 11, 98)
    return rng.choice(
        (
            f"the company repurchased {shares.shown} shares at an average price of $ {price.shown} .",
            f"we bought back {shares.shown} shares for an average price of $ {price.shown} each .",
        )
    )


def _growth(rng: Random, page: Page) -> str:
    rate = _fresh(rng, page, 11, 98, decimals=True)
    page.facts["growth"] = Number(f"{rate.literal}%", rate.shown)
    shown = f"{rate.shown}% ( {rate.shown} % )"
    return rng.choice(
        (f"management plans for an annual growth of {shown} .", f"analysts expect a yearly growth rate of {shown} .")
    )


def _region(rng: Random, page: Page) -> str:
    share = _fresh(rng, page, 12, 88)
    page.facts["region_share"] = Number(f"{share.literal}%", share.shown)
    row = rng.choice([name for name in page.rows if name in LINE_ITEMS])
    year, region = rng.choice(page.years), rng.choice(REGIONS)
    page.facts |= {"region": Number(region, region), "region_row": Number(row, row), "region_year": Number(year, year)}
    return rng.choice(
        (
            f"{region} accounted for {share.shown}% of {row} in {year} .",
            f"in {year} , {region} made up {share.shown}% of {row} .",
        )
    )


def _program(rng: Random, page: Page) -> str:
    authorized = page.facts["authorized"] = _fresh(rng, page, 500, 990)
    bought = page.facts["bought"] = _fresh(rng, page, 101, 480)
    return rng.choice(
        (
            f"the board authorized {authorized.shown} units , of which {bought.shown} were issued .",
            f"of the authorized {authorized.shown} units the company has issued {bought.shown} .",
        )
    )


FACTS = {"repurchase": _repurchase, "growth": _growth, "region": _region, "program": _program}
"""What only the text can say; each adds its numbers to the page and returns its sentence."""
