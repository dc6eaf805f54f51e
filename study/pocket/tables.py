"""The CSVs of the study, from what the steps wrote down."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finqa.runtime.paths import write_atomically
from mini.families import BY_NAME

Row = dict[str, Any]
KINDS = ("new", "other", "known")
"""Of family."""
DIGITS = 6
"""Significant, of a number in a CSV."""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A column for every name that some row has, in the order in which they come up; None is an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of text; an empty list where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return "" if value is None else f"{value:.{DIGITS}g}" if isinstance(value, float) else value


def answer_rows(answers: Iterable[Row]) -> list[Row]:
    """A row a subject and stratum: everything that known_answer says."""
    return [{**_which(answer), **row} for answer in answers for row in answer["rows"]]


def _which(answer: Row) -> Row:
    return {name: answer[name] for name in ("pair", "site", "method", "seed")}


def glance_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a pair, site, method and primary stratum: the mean over the dictionaries' seeds, lowest and highest."""
    groups: dict[tuple[str, str, str, str], list[tuple[Row, Row]]] = {}
    for answer in answers:
        for stratum in answer["strata"]:
            if stratum["stratum"] in answer["specific_by_family"]:
                key = (answer["pair"], answer["site"], answer["method"], stratum["stratum"])
                groups.setdefault(key, []).append((answer, stratum))
    rows = []
    for (pair, site, method, stratum), members in groups.items():
        figures = [_figures(answer, its) for answer, its in members]
        row: Row = {"stratum": stratum, "pair": pair, "site": site, "method": method, "seeds": len(members)}
        for name in figures[0]:
            row |= _over_seeds(name, [figure[name] for figure in figures])
        rows.append(row)
    return rows


def _over_seeds(name: str, values: Sequence[float | None]) -> Row:
    there = [value for value in values if value is not None]
    if not there:
        return {name: None, f"{name} lowest": None, f"{name} highest": None}
    return {name: sum(there) / len(there), f"{name} lowest": min(there), f"{name} highest": max(there)}


def _figures(answer: Row, stratum: Row) -> dict[str, float | None]:
    """The figures of one dictionary; None where a method has none, or a class is empty."""
    measures = {of["measure"]: of for of in stratum["exclusivity"]}
    classes = {of["name"]: of for of in stratum["classes"]}

    def auroc(name: str) -> float | None:
        return measures[name]["added_against_rest"]["value"] if name in measures else None

    def of_class(name: str, figure: str) -> float | None:
        if name not in classes:
            return None
        value = classes[name][figure]
        return value["value"] if isinstance(value, dict) else value

    added = stratum["best_items"]
    best = [added[family]["value"] for family in answer["added"] if added[family]["value"] is not None]
    return {
        "alive": answer["n_alive"],
        "auroc of Delta": auroc("delta"),
        "auroc of 1 - nu_err": auroc("1 - nu_err"),
        "auroc of slopes": auroc("delta_slope"),
        "only, by Delta": of_class("delta", "n"),
        "recall, by Delta": of_class("delta", "recall"),
        "precision, by Delta": of_class("delta", "precision"),
        "confirmed": of_class("confirmed", "n"),
        "only, by slopes": of_class("delta_slope", "n"),
        "recall, by slopes": of_class("delta_slope", "recall"),
        "precision, by slopes": of_class("delta_slope", "precision"),
        "recall, all active": of_class("all active", "recall"),
        "best is added": stratum["best_is_added"]["value"],
        "specific to added": stratum["specific_to_added"],
        "specific to others": stratum["specific_to_known"],
        "beat the null, added": stratum["significant_for_added"],
        "beat the null, others": stratum["significant_for_known"],
        "best latent for an added family, mean": sum(best) / len(best) if best else None,
    }


def matrix_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a family, pair, method and primary stratum: how many latents are specific to it, and the best one's AUROC.

    Means over seeds. Pairs that add nothing are there too: what is specific to a family in them is no finding.
    """
    sums: dict[tuple[str, ...], list[tuple[int, float | None]]] = {}
    for answer in answers:
        for stratum in answer["strata"]:
            counts: dict[str, int] | None = answer["specific_by_family"].get(stratum["stratum"])
            if counts is None:
                continue
            for family, best in stratum["best_items"].items():
                key = (stratum["stratum"], answer["pair"], answer["site"], answer["method"], family)
                sums.setdefault(key, []).append((counts.get(family, 0), best["value"]))
    rows = []
    for (stratum, pair, site, method, family), values in sums.items():
        areas = [area for _, area in values if area is not None]
        rows.append(
            {
                "stratum": stratum,
                "pair": pair,
                "site": site,
                "method": method,
                "kind": BY_NAME[family].kind,
                "family": family,
                "specific": sum(n for n, _ in values) / len(values),
                "best auroc": sum(areas) / len(areas) if areas else None,
                "seeds": len(values),
            }
        )
    return rows


def kind_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a pair, site, method and primary stratum: latents specific to the families of each kind, whichever of them
    the pair adds; the mean over seeds, lowest and highest."""
    groups: dict[tuple[str, ...], list[dict[str, int]]] = {}
    for answer in answers:
        for stratum, counts in answer["specific_by_family"].items():
            by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
            for family, n in counts.items():
                by_kind[BY_NAME[family].kind] += n
            groups.setdefault((stratum, answer["pair"], answer["site"], answer["method"]), []).append(by_kind)
    rows = []
    for key, members in groups.items():
        row: Row = dict(zip(("stratum", "pair", "site", "method"), key, strict=True)) | {"seeds": len(members)}
        for kind in KINDS:
            row |= _over_seeds(kind, [member[kind] for member in members])
        rows.append(row)
    return rows


def token_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a subject: how well its best item tells the tokens that fine-tuning fixed from other predicted ones."""
    rows = []
    for answer in answers:
        tokens = answer["tokens"]
        if tokens is None:
            continue
        row = {**_which(answer), "auroc": tokens["best"]["value"]}
        row |= {"low": tokens["best"]["low"], "high": tokens["best"]["high"]}
        row |= {f"tokens: {group}": n for group, n in tokens["n_tokens"].items()}
        row |= {f"mean square of the difference: {group}": v for group, v in tokens["mean_square_norm"].items()}
        rows.append(row | {"share of fixed tokens in added families": tokens["share_in_added_families"]})
    return rows


def probe_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a pair, site, stratum and family: a linear probe on either model and on the difference. The same for every
    subject, so that the first one's is taken."""
    rows: dict[tuple[str, ...], Row] = {}
    for answer in answers:
        for stratum in answer["strata"]:
            for family in stratum["probe"]["difference"]:
                key = (answer["pair"], answer["site"], stratum["stratum"], family)
                areas = {f"probe on {name}": of[family] for name, of in stratum["probe"].items()}
                added = {"added": family in answer["added"]}
                place = dict(zip(("pair", "site", "stratum", "family"), key, strict=True))
                rows.setdefault(key, place | added | areas)
    return list(rows.values())
