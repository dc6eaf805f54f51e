"""Two runs of the study side by side: which figures agree within the spread that each has of its own.

    python -m study.pocket.compare docs/reference/study OTHER [--write again.csv]

Counts of specific latents and measures of exclusivity, of the comparison with several fine-tunes, agree where the
ranges from the lowest to the highest overlap; recovered shares of the KL and of exact programs where their bootstrap
intervals do. Accuracies of the models have no spread of their own and are printed. Ranges of three fine-tunes are
narrow, so some figures are expected to fall apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from finqa.runtime.errors import UserError, report_errors
from study.markdown import markdown
from study.pocket.plan import SHOWN_STRATUM
from study.pocket.tables import named, read_csv, write_csv

RANGE = ("lowest", "highest")
FIGURES = ("auroc of Delta", "auroc of 1 - nu_err", "auroc of slopes", "beat the null, added")
"""Columns of glance.csv."""


class Range(NamedTuple):
    low: float
    middle: float
    high: float


Key = tuple[str, ...]
"""Group of figures, pair, site, method, figure."""


def main() -> None:
    args = parse_arguments()
    rows = compared(args.folder, args.other)
    if not rows:
        raise UserError(f"{args.folder} and {args.other} have no figure in common")
    print(summary(rows))
    print(accuracies(args.folder, args.other), end="")
    if args.write:
        write_csv(args.write, rows)


def compared(folder: Path, other: Path) -> list[dict[str, object]]:
    """A row for every figure that both have, but for what is 0 in both: the two ranges, and whether they overlap."""
    ours, theirs = ranges(folder), ranges(other)
    rows: list[dict[str, object]] = []
    for key in (key for key in ours if key in theirs):
        here, there = ours[key], theirs[key]
        if not any((*here, *there)):
            continue
        names = dict(zip(("group", "pair", "site", "method", "figure"), key, strict=True))
        numbers = {
            f"{run} {part}": value
            for run, found in (("first", here), ("second", there))
            for part, value in found._asdict().items()
        }
        rows.append({**names, **numbers, "overlap": here.low <= there.high and there.low <= here.high})
    return rows


def ranges(folder: Path) -> dict[Key, Range]:
    """Every figure of a run that has a spread."""
    found: dict[Key, Range] = {}
    for row in read_csv(folder / "kinds.csv"):
        if row["stratum"] == SHOWN_STRATUM and int(row["fine-tunes"]) > 1:
            for kind in ("new", "other", "known"):
                _add(found, ("specific latents", *_place(row), f"specific to {kind}"), row, kind)
    for row in read_csv(folder / "glance.csv"):
        if row["stratum"] == SHOWN_STRATUM and int(row["fine-tunes"]) > 1:
            for figure in FIGURES:
                _add(found, ("exclusivity", *_place(row), figure), row, figure)
    for row in read_csv(folder / "causal.csv"):
        if row["group"] == "new" and row["kind"] == "ranked" and row["recovered_low"]:
            figure = f"{row['n_latents']} latents, {row['direction']}, {row['carrier']}, {row['measure']}"
            spread = (float(row[name]) for name in ("recovered_low", "recovered", "recovered_high"))
            found["recovered", *_place(row), figure] = Range(*spread)
    return found


def _place(row: dict[str, str]) -> tuple[str, str, str]:
    return row["pair"], row["site"], named(row) if "form" in row else row["method"]


def _add(found: dict[Key, Range], key: Key, row: dict[str, str], name: str) -> None:
    if row[name]:
        found[key] = Range(float(row[f"{name} {RANGE[0]}"]), float(row[name]), float(row[f"{name} {RANGE[1]}"]))


def summary(rows: list[dict[str, object]]) -> str:
    groups = dict.fromkeys(str(row["group"]) for row in rows)
    cells = []
    for group in groups:
        of_group = [row for row in rows if row["group"] == group]
        cells.append((group, str(len(of_group)), str(sum(bool(row["overlap"]) for row in of_group))))
    return markdown(("figures", "in both runs", "ranges overlap"), cells)


def accuracies(folder: Path, other: Path) -> str:
    """Accuracies of every model on every kind of family, in both runs."""
    ours, theirs = (
        {(row["model"], row["kind"]): row["accuracy"] for row in read_csv(f / "models.csv") if row["family"] == "all"}
        for f in (folder, other)
    )
    shared = [key for key in ours if key in theirs]
    rows = [(*key, f"{float(ours[key]):.1%}", f"{float(theirs[key]):.1%}") for key in shared]
    return markdown(("model", "kind of family", "accuracy", "second run"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of one run's CSVs")
    parser.add_argument("other", type=Path, help="of the other's")
    parser.add_argument("--write", type=Path, metavar="CSV", help="where every figure goes, with both ranges")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
