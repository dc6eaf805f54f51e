"""The CSVs of the study, from what the steps wrote down."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finqa.runtime.paths import write_atomically
from mini.families import BY_NAME

Row = dict[str, Any]
KINDS = ("new", "other", "known")
"""Kinds of family."""
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


def named(row: Mapping[str, Any]) -> str:
    """The method, and its form where it is not the trained one."""
    return row["method"] if row["form"] in ("", "trained") else f"{row['method']}, {row['form']}"


def answer_rows(answers: Iterable[Row]) -> list[Row]:
    """A row a subject and stratum: everything that known_answer says."""
    return [{**_which(answer), **row} for answer in answers for row in answer["rows"]]


def _which(answer: Row) -> Row:
    return {name: answer[name] for name in ("pair", "site", "method", "form")}


def _group(answer: Row, stratum: str) -> tuple[str, ...]:
    """What a row of the tables is of: one method on one comparison, whose fine-tuning seeds it is the mean over."""
    return stratum, answer["compared"], answer["site"], answer["method"], answer["form"]


GROUP = ("stratum", "pair", "site", "method", "form")


def glance_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a comparison, site, method, form and primary stratum: the mean over fine-tunes, lowest and highest."""
    groups: dict[tuple[str, ...], list[tuple[Row, Row]]] = {}
    for answer in answers:
        for stratum in answer["strata"]:
            groups.setdefault(_group(answer, stratum["stratum"]), []).append((answer, stratum))
    rows = []
    for key, members in groups.items():
        figures = [_figures(answer, its) for answer, its in members]
        row: Row = dict(zip(GROUP, key, strict=True)) | {"fine-tunes": len(members)}
        for name in figures[0]:
            row |= _over_fine_tunes(name, [figure[name] for figure in figures])
        rows.append(row)
    return rows


def _over_fine_tunes(name: str, values: Sequence[float | None]) -> Row:
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
        "over all pages, added": stratum["over_all_pages_added"],
        "over all pages, others": stratum["over_all_pages_known"],
        "families with a specific latent": of_class("all active", "recall"),
        "fixed tokens, decoded": (answer["tokens"] or {}).get("decoded", {}).get("value"),
        "beat the null, added": stratum["significant_for_added"],
        "beat the null, others": stratum["significant_for_known"],
        "best latent for an added family, mean": sum(best) / len(best) if best else None,
    }


def matrix_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a family, pair, method and primary stratum: how many latents are specific to it, and the best one's AUROC.

    Means over fine-tunes. Pairs that add nothing are there too: what is specific to a family in them is no finding.
    """
    sums: dict[tuple[str, ...], list[tuple[int, float | None]]] = {}
    for answer in answers:
        for stratum in answer["strata"]:
            counts: dict[str, int] | None = answer["specific_by_family"].get(stratum["stratum"])
            if counts is None:
                continue
            for family, best in stratum["best_items"].items():
                key = (*_group(answer, stratum["stratum"]), family)
                sums.setdefault(key, []).append((counts.get(family, 0), best["value"]))
    rows = []
    for (*group, family), values in sums.items():
        areas = [area for _, area in values if area is not None]
        rows.append(
            {
                **dict(zip(GROUP, group, strict=True)),
                "kind": BY_NAME[family].kind,
                "family": family,
                "specific": sum(n for n, _ in values) / len(values),
                "best auroc": sum(areas) / len(areas) if areas else None,
                "fine-tunes": len(values),
            }
        )
    return rows


def kind_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a pair, site, method and primary stratum: latents specific to the families of each kind, whichever of them
    the pair adds; the mean over fine-tunes, lowest and highest."""
    groups: dict[tuple[str, ...], list[dict[str, int]]] = {}
    for answer in answers:
        for stratum, counts in answer["specific_by_family"].items():
            by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
            for family, n in counts.items():
                by_kind[BY_NAME[family].kind] += n
            groups.setdefault(_group(answer, stratum), []).append(by_kind)
    rows = []
    for key, members in groups.items():
        row: Row = dict(zip(GROUP, key, strict=True)) | {"fine-tunes": len(members)}
        for kind in KINDS:
            row |= _over_fine_tunes(kind, [member[kind] for member in members])
        rows.append(row)
    return rows


CONTROLS = (("untrained", None), ("frozen decoder", None), ("", "random directions"), ("", "PCA of the difference"))
"""What a trained dictionary is compared with: a form of itself, or a baseline by name."""
COMPARED = (
    "specific to added", "specific to others", "over all pages, added", "families with a specific latent",
    "fixed tokens, decoded",
)  # fmt: skip
MORE, FEWER, UNRESOLVED = "more", "less", "unresolved"
RESOLVES_FROM = 3
"""Fine-tunes: two that happen to agree have an interval of no width."""


def untrained_rows(answers: Sequence[Row], patches: Sequence[Row], repeated: str) -> list[Row]:
    """A row a figure, site, stratum, trained method and control, over the fine-tunes of the comparison `repeated`:
    means and the mean of the differences with its 95% t interval. A difference is resolved where that leaves out 0."""
    figures: dict[tuple[str, ...], dict[str, float]] = {}
    for answer in answers:
        for stratum in answer["strata"] if answer["compared"] == repeated else ():
            found = _figures(answer, stratum)
            for name in COMPARED:
                key = (name, stratum["stratum"], answer["site"], answer["method"], answer["form"])
                value = found[name]
                if value is not None:
                    figures.setdefault(key, {})[answer["pair"]] = value
    for row in patches:
        place = (row["direction"], row["carrier"], row["group"], row["measure"], row["n_latents"])
        if row["compared"] != repeated or place != ("sufficiency", "own", "new", "divergence", 16):
            continue
        kind = row["kind"].removesuffix(", equal norm")
        forms = {"ranked": (row["method"], "trained"), "components": ("PCA of the difference", "")}
        method, form = forms.get(kind, (row["method"], kind))
        # The set itself, and its controls at its norm.
        if row["recovered"] is not None and (kind == "ranked" or row["kind"] != kind):
            name = "KL recovered by 16, equal norm"
            of = f"{method} beside {row['method']}" if kind == "components" else method
            figures.setdefault((name, "", row["site"], of, form), {})[row["pair"]] = row["recovered"]
    rows = []
    for (name, stratum, site, method, form), trained in figures.items():
        for control_form, baseline in CONTROLS if form == "trained" else ():
            others = [f"{baseline} beside {method}", baseline] if baseline else [method]
            keys = [(name, stratum, site, other, control_form) for other in others]
            if (control_form, method) == ("untrained", "difference term"):
                keys = [(name, stratum, site, "plain", control_form)]
            control = next((figures[key] for key in keys if key in figures), {})
            both = [pair for pair in trained if pair in control]
            if both:
                place = {"figure": name, "stratum": stratum, "site": site, "method": method}
                place |= {"control": baseline or control_form}
                rows.append(place | _difference([trained[p] for p in both], [control[p] for p in both]))
    return rows


def _difference(trained: Sequence[float], control: Sequence[float]) -> Row:
    """Paired over fine-tunes; no interval from one of them."""
    from statistics import mean, stdev

    from scipy.stats import t

    differences = [a - b for a, b in zip(trained, control, strict=True)]
    n, middle = len(differences), mean(differences)
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5 if n > 1 else None
    low, high = (None, None) if half is None else (middle - half, middle + half)
    open_still = n < RESOLVES_FROM or low is None or high is None or low <= 0 <= high
    resolved = UNRESOLVED if open_still else MORE if middle > 0 else FEWER
    return {
        "fine-tunes": n, "trained": mean(trained), "of the control": mean(control), "difference": middle,
        "difference low": low, "difference high": high, "verdict": resolved,
    }  # fmt: skip


def token_rows(answers: Sequence[Row]) -> list[Row]:
    """A row a subject: how well its best item, and the norm of all that it decodes, tell the tokens that fine-tuning
    fixed from other predicted ones."""
    rows = []
    for answer in answers:
        tokens = answer["tokens"]
        if tokens is None:
            continue
        row = {**_which(answer), "compared": answer["compared"], "auroc": tokens["best"]["value"]}
        row |= {"low": tokens["best"]["low"], "high": tokens["best"]["high"]}
        row |= {"auroc of the decoded norm": tokens["decoded"]["value"]}
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
