"""The tables of docs/study.md, filled from the CSVs; no number in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `fill` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from study.pocket.plan import BASE, FINE_TUNED, FULL, SHOWN_STRATUM
from study.pocket.tables import KINDS, named, read_csv

Row = dict[str, str]
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
MAIN = f"{BASE.name} -> {FINE_TUNED.name}"
ADD_NEW = {pair.compared for pair in FULL.pairs if "new" in pair.added}
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
    shown = f"{float(text):.{digits}f}" if text else NOTHING
    return shown.removeprefix("-") if shown.strip("-0.") == "" and text else shown


def count(text: str) -> str:
    """A count, or a mean of counts with one decimal."""
    if not text:
        return NOTHING
    value = float(text)
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def spread(row: Row, name: str, shown: Callable[[str], str] = number) -> str:
    """The mean over fine-tunes, and where there are several the lowest and the highest."""
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


def families(folder: Path) -> str:
    """A row a family that the base knows: what the fine-tunes left of it."""
    rows = [r for r in read_csv(folder / "models.csv") if r["kind"] == "known" and r["family"] != "all"]
    return _accuracy(rows, "family", "known family")


def glance(folder: Path) -> str:
    """A row a method and form, a column a comparison: items specific to new, other and known families."""
    rows = [row for row in read_csv(folder / "kinds.csv") if row["stratum"] == SHOWN_STRATUM]
    columns = list(dict.fromkeys((row["pair"], row["site"]) for row in rows))
    found = {(named(row), row["pair"], row["site"]): row for row in rows}
    lines = []
    for name in sorted({named(row) for row in rows}, key=_in_order([named(row) for row in rows])):
        cells = [found.get((name, *column)) for column in columns]
        lines.append([name, *(" / ".join(count(row[k]) for k in KINDS) if row else NOTHING for row in cells)])
    return markdown(["method", *(f"{pair}, {site}" for pair, site in columns)], lines)


def _in_order(names: Sequence[str]) -> Callable[[str], tuple[int, int]]:
    """Forms of one method one after the other, methods as they come up."""
    methods = list(dict.fromkeys(name.partition(",")[0] for name in names))
    return lambda name: (methods.index(name.partition(",")[0]), names.index(name))


def untrained(folder: Path) -> str:
    """A row a figure, method and control at the site that is read: trained, the control, their difference."""
    every = read_csv(folder / "untrained.csv")
    shown = [r for r in every if r["stratum"] in ("", SHOWN_STRATUM) and r["site"] == every[0]["site"]]
    order = {name: i for i, name in enumerate(dict.fromkeys(r["figure"] for r in shown))}
    lines = []
    for row in sorted(shown, key=lambda r: (order[r["figure"]], r["stratum"] != "")):
        digits = 1 if row["figure"].startswith(("specific", "over")) else 2
        numbers = [number(row[name], digits) for name in ("trained", "of the control", "difference")]
        low, high = number(row["difference low"], digits), number(row["difference high"], digits)
        spread_of = f"{numbers[2]} ({low} to {high})" if row["difference low"] else numbers[2]
        lines.append([row["figure"], row["method"], row["control"], numbers[0], numbers[1], spread_of, row["verdict"]])
    return markdown(
        ["figure", "method", "control", "trained", "control's", "difference, 95% interval", "trained is"], lines
    )


def marks(folder: Path) -> str:
    """A row a comparison that adds the new families, at the chosen site, and a method: whether its marks of a
    fine-tuned-only latent point at them."""
    rows = [r for r in read_csv(folder / "glance.csv") if r["stratum"] == SHOWN_STRATUM]
    lines = []
    for row in rows:
        shown = row["form"] == "trained" or row["method"] == "PCA of the difference"
        if row["pair"] not in ADD_NEW or row["site"] != rows[0]["site"] or not shown:
            continue
        lines.append(
            [
                row["pair"],
                row["method"],
                count(row["fine-tunes"]),
                *(spread(row, f"auroc of {name}") for name in ("Delta", "1 - nu_err", "slopes")),
                f"{spread(row, 'only, by Delta', count)} / {spread(row, 'only, by slopes', count)}",
                spread(row, "recall, by slopes"),
                spread(row, "precision, by slopes"),
                spread(row, "best is added"),
            ]
        )
    return markdown(
        [
            "pair", "method", "fine-tunes", "AUROC of Delta", "of 1 - nu", "of slopes", "only (Delta / slopes)",
            "recall", "precision", "of all latents",
        ],
        lines,
    )  # fmt: skip


def tokens(folder: Path) -> str:
    """For each method and form, how its best item and its decoded difference tell fixed tokens."""
    every = read_csv(folder / "tokens.csv")
    rows = [r for r in every if r["compared"] == MAIN and r["site"] == every[0]["site"]]
    lines = []
    for name in sorted({named(row) for row in rows}, key=_in_order([named(row) for row in rows])):
        its = [row for row in rows if named(row) == name]
        lines.append([name, count(str(len(its))), *(_range(its, f) for f in ("auroc", "auroc of the decoded norm"))])
    return markdown(["reading", "fine-tunes", "AUROC of the best item", "of the decoded norm"], lines)


def _range(rows: Sequence[Row], name: str, shown: Callable[[str], str] = number) -> str:
    """Mean over rows, the lowest and the highest in brackets."""
    values = [float(row[name]) for row in rows if row[name]]
    if not values:
        return NOTHING
    low, mean, high = (shown(str(v)) for v in (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def causal(folder: Path) -> str:
    """A row a method and set: share of the KL recovered, and the norm that was added."""
    every = [r for r in read_csv(folder / "causal.csv") if (r["group"], r["measure"]) == ("new", "divergence")]
    rows = [r for r in every if r["kind"] not in ("none", "ceiling")]
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        for kind, n in dict.fromkeys((r["kind"], r["n_latents"]) for r in rows if r["method"] == method):
            its = [r for r in rows if (r["method"], r["kind"], r["n_latents"]) == (method, kind, n)]
            own, other = ([r for r in its if r["carrier"] == carrier] for carrier in ("own", "other"))
            lines.append([method, kind, n, _range(own, "injected_norm"), _range(own, "recovered", share),
                          _range(other, "recovered", share)])  # fmt: skip
    return markdown(
        ["method", "what is put in", "latents", "norm", "KL recovered, own layers above", "other layers above"], lines
    )


def replies(folder: Path) -> str:
    """A row a set: accuracy of replies that the patched base writes, and programs right token by token."""
    rows = [r for r in read_csv(folder / "causal.csv") if (r["group"], r["measure"]) == ("new", "accuracy")]
    found = {(r["method"], r["kind"], r["n_latents"], r["carrier"]): r for r in rows}
    lines = []
    for method, kind, n in dict.fromkeys((r["method"], r["kind"], r["n_latents"]) for r in rows):
        its = [found[method, kind, n, carrier] for carrier in ("own", "other")]
        what = "whole site" if kind == "ceiling" else kind
        lines.append([method, what, count(n), number(its[0]["injected_norm"]), *(share(r["value"]) for r in its)])
    return markdown(
        ["method", "what is put in", "latents", "norm", "answers right, own layers above", "fine-tuned layers above"],
        lines,
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "families": families,
    "glance": glance,
    "untrained": untrained,
    "marks": marks,
    "tokens": tokens,
    "causal": causal,
    "replies": replies,
}
