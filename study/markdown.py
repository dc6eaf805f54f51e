"""Tables of a page, in Markdown, which stand between `<!-- table: NAME -->` and `<!-- end of table -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
Lines = tuple[list[str], list[list[str]]]
"""A table's header and its rows."""
NOTHING = "-"


def fill_tables(page: str, table: Callable[[str], str | None]) -> str:
    """The page with what stands in each of its blocks replaced by the Markdown that `table` gives for its name; where
    that is None, it stays."""

    def filled(found: re.Match[str]) -> str:
        made = table(found[2])
        return found[0] if made is None else f"{found[1]}{made}{found[4]}"

    return BLOCK.sub(filled, page)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def share(text: str) -> str:
    """A share as a percentage of a whole number of points; what rounds to nothing has no sign."""
    shown = f"{float(text):.0%}" if text else NOTHING
    return "0%" if shown == "-0%" else shown


def number(text: str, digits: int = 2) -> str:
    shown = f"{float(text):.{digits}f}" if text else NOTHING
    return shown.removeprefix("-") if shown.strip("-0.") == "" and text else shown


def count(text: str) -> str:
    """A count, or a mean of counts with one decimal."""
    if not text:
        return NOTHING
    value = float(text)
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def percent(text: str) -> str:
    """A share with one decimal of a point."""
    return f"{float(text):.1%}" if text else NOTHING
