"""The study's tables from what is there: models, gates, ceilings, settings, dictionaries, items, causal_norm,
explored, objections, findings, and run.json.

Verdicts come from the tables as they are written: findings.csv can be made again from the others alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosscoder.activations.readers import Target
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_manifest
from finqa.runtime.paths import REPOSITORY
from study.invented.diff import figure
from study.invented.diff.ceilings import ceiling_rows, primary_site
from study.invented.diff.dictionaries import settings_path
from study.invented.diff.plan import METHODS, PAIRS, Part, lengths, results_of, site_name, sites, slug, subjects
from study.invented.files import read_items, write_table
from study.invented.gates import Gate, read_answers, share_right
from study.invented.objections import objection_rows
from study.invented.plan import Plan
from study.invented.verdicts import Finding, as_rows, findings
from study.students.plan import MAIN, short
from study.work import read_json

REFERENCE = REPOSITORY / "docs" / "reference" / "invented"
KINDS = ("A", "B", "known")
AT_THE_PRIMARY: tuple[Part, ...] = ("diff", "seeds")
Row = dict[str, Any]


def output_of(plan: Plan) -> Path:
    """Where the tables go: the reference for a study, a folder of it for another model than the main one, and its own
    results for a rehearsal."""
    if plan.is_rehearsal:
        return plan.place.results / "tables"
    return REFERENCE if plan.place.model == short(MAIN) else REFERENCE / plan.place.model


def model_rows(plan: Plan) -> list[Row]:
    """Right answers on test by evaluation and kind of question; of arm A' also by its own formulas."""
    test = {item.id: item for item in read_items(plan.place) if item.split == "test"}
    rows = []
    for model, predictions in read_answers(plan).items():
        for kind in (*KINDS, "A, by the formulas of A'"):
            permuted = kind not in KINDS
            share, n = share_right(
                predictions,
                test,
                lambda item, kind=kind: item.kind == kind.partition(",")[0],
                lambda item, permuted=permuted: item.permuted if permuted else item.answer,
            )
            if share is not None:
                rows.append({"model": model, "questions": kind, "n": n, "right": round(share * n), "share": share})
    return rows


def settings_rows(plan: Plan) -> Iterator[Row]:
    """A row a dictionary that was tried on the control: its settings, how it came out, and whether they were chosen."""
    for method in METHODS:
        path = settings_path(plan, method)
        chosen = read_json(path) if path.exists() else {"chosen": None, "converged": None}
        tried = [read_json(one) for one in path.parent.glob(f"{slug(method)}-[0-9]*.json")]
        for row in sorted(tried, key=lambda row: (row["n_latents"], row["k"], row["passes"], row["rate"])):
            of = {"n_latents": row["n_latents"], "k": row["k"], "rate": row["rate"], "passes": row["passes"]}
            is_chosen = of == chosen["chosen"]
            end = {"chosen": is_chosen, "converged": chosen["converged"] if is_chosen else None}
            yield {"method": method, **row, **end}


def found_of(plan: Plan, target: Target, is_primary: bool) -> Iterator[tuple[Row, Row]]:
    """What names a subject's file, and what the file holds, for all that are there."""
    parts: tuple[Part, ...] = AT_THE_PRIMARY if is_primary else ("sites",)
    for pair in PAIRS:
        for subject in [one for part in parts for one in subjects(plan, pair, part)]:
            path = results_of(plan, pair, target, subject)
            if path.exists():
                place = {"arm": pair.arm, "seed": pair.seed, "site": site_name(target)}
                of = {"method": subject.method, "form": subject.form, "dictionary_seed": subject.seed}
                yield place | of, read_json(path)


def diff_rows(plan: Plan) -> dict[str, list[Row]]:
    """The lines of dictionaries.csv, items.csv, causal_norm.csv, explored.csv and objections.csv, the primary site
    first."""
    primary = primary_site(plan)
    targets = [primary, *(target for target in sites(plan).values() if target != primary)]
    tables: dict[str, list[Row]] = {"dictionaries": [], "items": [], "causal_norm": [], "explored": []}
    for target in targets:
        for named, found in found_of(plan, target, target == primary):
            named = named | {"primary": target == primary}
            if found.get("quality"):
                tables["dictionaries"].append(named | found["quality"])
            tables["items"] += [named | row for row in found.get("items", ())]
            own = {name: named[name] for name in ("arm", "seed", "site", "dictionary_seed")}
            tables["causal_norm"] += [own | row for row in found.get("carried", ())]
            tables["explored"] += [own | row for row in found.get("explored", ())]
    return tables | {"objections": objection_rows(plan, primary)}


def judged(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """The verdicts, from the lines of items.csv, causal_norm.csv and dictionaries.csv."""
    items, trained = ([row for row in tables[name] if str(row["primary"]) == "True"]
                      for name in ("items", "dictionaries"))  # fmt: skip
    return findings(items, tables["causal_norm"], trained)


def write_tables(plan: Plan, gates: Sequence[Gate]) -> tuple[Path, list[Finding]]:
    """Write all tables that something is there for, the figure and run.json; returns the folder and the verdicts."""
    output = output_of(plan)
    rows: dict[str, list[Row]] = {
        "models": model_rows(plan),
        "gates": [asdict(one) for one in gates],
        "ceilings": ceiling_rows(plan),
        "settings": list(settings_rows(plan)),
    }
    try:
        rows |= diff_rows(plan)
    except UserError as error:
        print(f"no dictionaries yet: {error}")
    for name, its in rows.items():
        if its:
            write_table(output / f"{name}.csv", [without_nan(row) for row in its])
    found: list[Finding] = []
    if rows.get("items"):
        read = ("items", "causal_norm", "dictionaries", "explored")
        tables = {name: read_table(output / f"{name}.csv") for name in read}
        found = judged(tables)
        write_table(output / "findings.csv", [without_nan(row) for row in as_rows(found)])
        figure.draw(tables, output / "headline.png")
    config = {"model": plan.place.model, "source": plan.source, "definitions": plan.definitions, "quick": plan.quick}
    config["lengths"] = lengths(plan)
    facts = (
        {"rows": (plan.place.root / "rows.sha256").read_text()} if (plan.place.root / "rows.sha256").exists() else {}
    )
    write_manifest(output / "run.json", config, **facts)
    return output, found


def read_table(path: Path) -> list[Row]:
    """The lines of a CSV as text; none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_nan(row: Mapping[str, Any]) -> Row:
    """What is not a number is an empty cell; rounded to what a reader can use."""

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return None if not math.isfinite(value) else float(f"{value:.6g}")

    return {name: cell(value) for name, value in row.items()}
