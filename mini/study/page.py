"""The tables of docs/study.md, filled from the CSVs; no number in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `fill` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mini.study.tables import read_csv

Row = dict[str, str]
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
NOT_RUN = "*Not there yet: `make study` writes it.*\n"
NOTHING = "-"


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew from the CSVs in `folder`. KeyError for a table of an unknown name."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]](folder) or NOT_RUN}{found[4]}", page)


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


def accuracy_by_family(folder: Path) -> str:
    rows = [row for row in read_csv(folder / "models.csv") if row["family"] != "all"]
    return _accuracy([{**row, "family": f"{row['family']} ({row['kind']})"} for row in rows], "family", "family")


def _accuracy(rows: Sequence[Row], by: str, title: str) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = {row[by]: row["n"] for row in rows}
    found = {(row["model"], row[by]): row["accuracy"] for row in rows}
    lines = [[name, n, *(share(found.get((model, name), "")) for model in models)] for name, n in groups.items()]
    return markdown([title, "n", *models], lines)


def ceilings(folder: Path) -> str:
    rows = read_csv(folder / "ceilings.csv")
    found = {(row["layer"], row["site"], row["direction"], row["carrier"]): row for row in rows}
    places = list(dict.fromkeys((row["layer"], row["site"]) for row in rows))
    kinds = [("sufficiency", "own"), ("sufficiency", "other"), ("necessity", "own")]
    lines = []
    for layer, site in places:
        its = [found[layer, site, *kind] for kind in kinds]
        lines.append([layer, site, *(f"{share(r['divergence_closed'])} / {share(r['exact'])}" for r in its)])
    return markdown(
        ["layer", "site", "into the base, own layers above", "into the base, fine-tuned layers above", "taken out"],
        lines,
    )


def glance(folder: Path) -> str:
    return _glance(folder, "last prompt token")


def glance_program(folder: Path) -> str:
    return _glance(folder, "program before the operator")


def _glance(folder: Path, stratum: str) -> str:
    lines = []
    for row in read_csv(folder / "glance.csv"):
        if row["stratum"] != stratum:
            continue
        lines.append(
            [
                row["pair"],
                row["site"],
                row["method"],
                count(row["seeds"]),
                spread(row, "auroc of Delta"),
                spread(row, "auroc of 1 - nu_err"),
                spread(row, "auroc of slopes"),
                f"{spread(row, 'only, by Delta', count)} / {spread(row, 'only, by slopes', count)}",
                spread(row, "recall, by slopes"),
                spread(row, "precision, by slopes"),
                spread(row, "specific to added", count),
                spread(row, "specific to others", count),
                spread(row, "beat the null, added", count),
            ]
        )
    return markdown(
        [
            "pair", "site", "method", "seeds", "AUROC of Delta", "of 1 - nu", "of slopes", "only (Delta / slopes)",
            "recall", "precision", "specific: added", "others", "beat the null",
        ],
        lines,
    )  # fmt: skip


def quality(folder: Path) -> str:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in read_csv(folder / "dictionaries.csv"):
        groups.setdefault((row["pair"], row["site"], row["method"]), []).append(row)
    lines = []
    for key, rows in groups.items():
        # Of the first seed: the CSV has the others.
        first = rows[0]
        figures = [number(first[name], 3) for name in ("explained_joint", "explained_difference")]
        others = [number(first["l0"], 1), share(first["dead_on_held_out"]), count(first["steps"])]
        lines.append([*key, *figures, *others])
    return markdown(["pair", "site", "method", "both models", "difference", "L0", "silent", "steps"], lines)


def tokens(folder: Path) -> str:
    lines = []
    for row in read_csv(folder / "tokens.csv"):
        if row["seed"] not in ("", "0") or not row["auroc"]:
            continue
        groups = ("fixed", "other predicted", "passage")
        squares = [number(row[f"mean square of the difference: {group}"], 1) for group in groups]
        best = [number(row["auroc"]), f"{number(row['low'])} to {number(row['high'])}", row["tokens: fixed"]]
        lines.append([row["pair"], row["site"], row["method"], *best, *squares])
    return markdown(
        ["pair", "site", "method", "AUROC", "95%", "fixed tokens", "square: fixed", "other", "passage"], lines
    )


def matrix(folder: Path) -> str:
    rows = [row for row in read_csv(folder / "matrix.csv") if row["stratum"] == "program before the operator"]
    rows = [row for row in rows if row["kind"] != "known"]
    columns = list(dict.fromkeys((row["pair"], row["site"], row["method"]) for row in rows))
    families = {row["family"]: row["kind"] for row in rows}
    found = {(row["pair"], row["site"], row["method"], row["family"]): row for row in rows}
    lines = []
    for column in columns:
        its = [found[*column, family] for family in families]
        lines.append([*column, *(f"{count(row['specific'])} / {number(row['best auroc'])}" for row in its)])
    names = [f"{family} ({kind})" for family, kind in families.items()]
    return markdown(["pair", "site", "method", *names], lines)


def probes(folder: Path) -> str:
    lines = []
    for row in read_csv(folder / "probes.csv"):
        if row["added"] == "1" and row["stratum"] in ("last prompt token", "program before the operator"):
            areas = [number(row[f"probe on {name}"]) for name in ("instruct", "fine-tuned", "difference")]
            lines.append([row["pair"], row["site"], row["stratum"], row["family"], *areas])
    return markdown(["pair", "site", "tokens", "family", "instruct", "fine-tuned", "difference"], lines)


def causal(folder: Path) -> str:
    lines = []
    for row in read_csv(folder / "causal.csv"):
        if (
            row["group"] == "new"
            and row["measure"] in ("divergence", "exact", "accuracy")
            and row["kind"] != "none"
            and not row["kind"].startswith("random")
        ):
            interval = (
                f"{share(row['recovered_low'])} to {share(row['recovered_high'])}" if row["recovered_low"] else "-"
            )
            place = [row["direction"], f"{row['carrier']} layers", row["kind"], row["n_latents"], row["measure"]]
            figures = [number(row["value"]), share(row["recovered"]), interval, number(row["injected_norm"], 1)]
            lines.append([row["method"], *place, *figures])
    return markdown(
        ["method", "direction", "above", "set", "latents", "measure", "value", "recovered", "95%", "added norm"], lines
    )


def causal_controls(folder: Path) -> str:
    lines = []
    for row in read_csv(folder / "causal_controls.csv"):
        if row["group"] == "new" and row["measure"] == "divergence":
            place = [row["direction"], f"{row['carrier']} layers", row["n_latents"], row["control"], row["n_sets"]]
            figures = [share(row[name]) for name in ("ranked", "mean", "lowest", "highest")]
            lines.append([row["method"], *place, *figures, number(row["p"], 3)])
    return markdown(
        ["method", "direction", "above", "latents", "control", "sets", "ranked", "mean", "lowest", "highest", "p"],
        lines,
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "accuracy-by-family": accuracy_by_family,
    "ceilings": ceilings,
    "glance": glance,
    "glance-program": glance_program,
    "quality": quality,
    "tokens": tokens,
    "matrix": matrix,
    "probes": probes,
    "causal": causal,
    "causal-controls": causal_controls,
}
