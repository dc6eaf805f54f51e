"""The tables of docs/study.md, filled from the CSVs; no number in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `fill` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from study.pocket.plan import FULL, SHOWN_STRATUM
from study.pocket.tables import KINDS, read_csv

Row = dict[str, str]
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
ADD_NEW = {pair.name for pair in FULL.pairs if "new" in pair.added}
NOT_RUN = "*Not there yet: `make study` writes it.*\n"
NOTHING = "-"


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew from the CSVs in `folder`. KeyError for a table of an unknown name."""
    return fill_tables(page, lambda name: TABLES[name](folder) or NOT_RUN)


def fill_tables(page: str, table: Callable[[str], str]) -> str:
    """The page with what stands in each of its blocks replaced by the Markdown that `table` gives for its name."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", page)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def share(text: str) -> str:
    """A share as a percentage of a whole number of points; what rounds to nothing has no sign."""
    shown = f"{float(text):.0%}" if text else NOTHING
    return "0%" if shown == "-0%" else shown


def number(text: str, digits: int = 2) -> str:
    return f"{float(text):.{digits}f}" if text else NOTHING


def count(text: str) -> str:
    """A count, or a mean of counts with one decimal."""
    if not text:
        return NOTHING
    value = float(text)
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def spread(row: Row, name: str, shown: Callable[[str], str] = number) -> str:
    """The mean over seeds, and where there are several the lowest and the highest."""
    if not row[name]:
        return NOTHING
    low, high = shown(row[f"{name} lowest"]), shown(row[f"{name} highest"])
    mean = shown(row[name])
    return mean if low == high else f"{mean} ({low} to {high})"


def accuracy(folder: Path) -> str:
    rows = [row for row in read_csv(folder / "models.csv") if row["family"] == "all"]
    return _accuracy(rows, "kind", "kind of family")


def _accuracy(rows: Sequence[Row], by: str, title: str) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = {row[by]: row["n"] for row in rows}
    found = {(row["model"], row[by]): row["accuracy"] for row in rows}
    lines = [[name, n, *(share(found.get((model, name), "")) for model in models)] for name, n in groups.items()]
    return markdown([title, "n", *models], lines)


def glance(folder: Path) -> str:
    """A row a method, a column a pair: latents specific to new, other and known families."""
    rows = [row for row in read_csv(folder / "kinds.csv") if row["stratum"] == SHOWN_STRATUM]
    columns = list(dict.fromkeys((row["pair"], row["site"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["pair"], row["site"]): row for row in rows}
    lines = []
    for method in methods:
        cells = [found.get((method, *column)) for column in columns]
        lines.append([method, *(" / ".join(count(row[k]) for k in KINDS) if row else NOTHING for row in cells)])
    return markdown(["method", *(f"{pair}, {site}" for pair, site in columns)], lines)


def marks(folder: Path) -> str:
    """A row a pair that adds the new families, at the chosen site, and a method: whether its marks of a fine-tuned-only
    latent point at them."""
    rows = [r for r in read_csv(folder / "glance.csv") if r["stratum"] == SHOWN_STRATUM]
    best = {(r["pair"], r["site"], r["method"]): r for r in read_csv(folder / "tokens.csv") if r["seed"] in ("", "0")}
    lines = []
    for row in rows:
        if row["pair"] not in ADD_NEW or row["site"] != rows[0]["site"]:
            continue
        tokens = best.get((row["pair"], row["site"], row["method"]))
        lines.append(
            [
                row["pair"],
                row["site"],
                row["method"],
                count(row["seeds"]),
                *(spread(row, f"auroc of {name}") for name in ("Delta", "1 - nu_err", "slopes")),
                f"{spread(row, 'only, by Delta', count)} / {spread(row, 'only, by slopes', count)}",
                spread(row, "recall, by slopes"),
                spread(row, "precision, by slopes"),
                spread(row, "beat the null, added", count),
                number(tokens["auroc"]) if tokens else NOTHING,
            ]
        )
    return markdown(
        [
            "pair", "site", "method", "seeds", "AUROC of Delta", "of 1 - nu", "of slopes", "only (Delta / slopes)",
            "recall", "precision", "beat the null", "fixed tokens",
        ],
        lines,
    )  # fmt: skip


def causal(folder: Path) -> str:
    """A row a method, direction and carrier: share of the KL recovered by sets of latents and by controls."""
    rows = [r for r in read_csv(folder / "causal.csv") if (r["group"], r["measure"]) == ("new", "divergence")]
    controls = read_csv(folder / "causal_controls.csv")
    sizes = sorted({int(r["n_latents"]) for r in rows if r["kind"] == "ranked"})
    lines = []
    for key in dict.fromkeys((r["method"], r["direction"], r["carrier"]) for r in rows):
        its = [r for r in rows if (r["method"], r["direction"], r["carrier"]) == key]
        by_kind = {(r["kind"], r["n_latents"]): r for r in its}
        cells = [share(by_kind["ranked", str(n)]["recovered"]) if ("ranked", str(n)) in by_kind else "-" for n in sizes]
        for control in ("random sets", "random directions"):
            of = [
                r for r in controls
                if (r["method"], r["direction"], r["carrier"], r["control"]) == (*key, control)
                and (r["group"], r["measure"]) == ("new", "divergence")
            ]  # fmt: skip
            cells.append(f"{share(of[-1]['lowest'])} to {share(of[-1]['highest'])}" if of else NOTHING)
        sham = f"{key[0]} of base -> sham"
        for kind in ("components", sham, "mean difference"):
            of = [r for r in its if r["kind"] == kind]
            cells.append(share(of[-1]["recovered"]) if of else NOTHING)
        lines.append([key[0], key[1], f"{key[2]} layers", *cells])
    return markdown(
        [
            "method", "direction", "above", *(f"{n} latent{'s' * (n > 1)}" for n in sizes), "random sets",
            "random directions", "PCA", "the sham's latents", "mean difference",
        ],
        lines,
    )  # fmt: skip


def replies(folder: Path) -> str:
    """A row a set: accuracy of replies that the patched base writes, and programs right token by token."""
    rows = [r for r in read_csv(folder / "causal.csv") if r["group"] == "new" and r["direction"] == "sufficiency"]
    found = {(r["method"], r["kind"], r["n_latents"], r["carrier"], r["measure"]): r for r in rows}
    lines = []
    for method, kind, n in dict.fromkeys((r["method"], r["kind"], r["n_latents"]) for r in rows):
        cells = []
        for measure in ("accuracy", "exact"):
            its = [found.get((method, kind, n, carrier, measure)) for carrier in ("own", "other")]
            cells += [f"{share(r['value'])}" if r else NOTHING for r in its]
        lines.append([method, "whole site" if kind == "ceiling" else kind, count(n), *cells])
    return markdown(
        [
            "method", "what is put in", "latents", "answers right, own layers above", "fine-tuned layers above",
            "programs exact, own layers above", "fine-tuned layers above",
        ],
        lines,
    )  # fmt: skip


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "glance": glance,
    "marks": marks,
    "causal": causal,
    "replies": replies,
}
