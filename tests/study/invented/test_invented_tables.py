"""Tables, verdicts and figure from the files that the jobs leave, made up here."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finqa.runtime.manifest import write_json
from finqa.runtime.paths import Folders
from study.invented.diff import tables
from study.invented.diff.ceilings import ceilings_path
from study.invented.diff.dictionaries import settings_path
from study.invented.diff.figure import curves, hit_rates, wider
from study.invented.diff.plan import (
    ADDED,
    ALL,
    ANY_ITEM,
    BY_NU,
    COMPONENTS,
    ENDS,
    ENERGY,
    METHODS,
    PAIRS,
    Compared,
    Subject,
    results_of,
    sites,
    subjects,
)
from study.invented.files import TEST, Place, write_table
from study.invented.objections import CUTS
from study.invented.plan import Plan
from study.work import read_json

FINDS = "difference SAE"
TRAINED = (FINDS, "trained")
NAMES = {"A": [f"a{i}" for i in range(8)], "B": [f"b{i}" for i in range(8)]}


def items(compared: Compared, subject: Subject) -> Iterator[dict[str, Any]]:
    """The difference SAE hits what was added when it is trained; nothing else hits anything."""
    for kind, names in NAMES.items():
        for name in names:
            hit = (subject.method, subject.form, kind) == (FINDS, "trained", compared.arm)
            read = hit and compared.arm == "A"
            yield {
                "ranking": "energy", "metric": name, "kind": kind, "item": 3, "sign": 1, "auroc_choose": float(hit),
                "auroc": float(hit), "recall": float(hit), "hit": hit, "permuted_name": 0.5 if read else None,
                "permuted_formula": 0.97 if read else None, "look_up": 0.5 if read else None,
            }  # fmt: skip


def any_item(compared: Compared, subject: Subject) -> Iterator[dict[str, Any]]:
    """Of all latents one hits every metric, added or not, and follows the name: no verdict may come of it."""
    for row in items(compared, subject):
        told = {"ranking": ANY_ITEM, "auroc": 1.0, "recall": 1.0, "hit": True}
        yield row | told | {"permuted_name": 1.0, "permuted_formula": 0.5}


def explored(compared: Compared, subject: Subject) -> Iterator[dict[str, Any]]:
    """All latents give all answers."""
    for metric in NAMES[compared.arm]:
        yield {"method": subject.method, "form": subject.form, "set": ALL, "items": 64, "norm": 9.0, "metric": metric,
               "n": 15, "right": 15}  # fmt: skip


def carried(compared: Compared, subject: Subject) -> Iterator[dict[str, Any]]:
    """The whole site gives 50 of 60; the difference SAE 40, at twice the norm 45; all else 2."""
    other = "B" if compared.arm == "A" else "A"
    right = 50 if subject.method == ENDS else 40 if (subject.method, subject.form) == (FINDS, "trained") else 2
    sets = [(subject.method, subject.form, "", 1.0, right)]
    if subject.form == "trained":
        sets += [(COMPONENTS, "baseline", subject.method, 1.0, 2), (subject.method, "trained", "", 2.0, 45)]
        sets.append((subject.method, "untrained", subject.method, 1.0, 2))
    for method, form, scaled_to, multiple, count in sets:
        for group, arm in (("own", compared.arm), ("other", other)):
            for metric in NAMES[arm]:
                yield {
                    "method": method, "form": form, "scaled_to": scaled_to, "multiple": multiple, "factor": multiple,
                    "norm": 3.0 * multiple, "group": group, "metric": metric, "n": 60,
                    "right": count if group == "own" else 0,
                }  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A quick study whose jobs are done."""
    made = Plan(Place(Folders(tmp_path / "d", tmp_path / "r"), "m"), "pocket-mistral", "FinQA-mini", quick=True)
    primary = sites(made)["residual2"]
    quality = {"n_latents": 64, "k": 4, "rate": 1.0, "passes": 2, "explained_difference": 0.5, "l0": 8.0}
    for pair in PAIRS:
        if pair.arm in ADDED:
            ceiling = {"arm": pair.arm, "seed": pair.seed, "n": 160, "base": 0, "fine_tuned": 100}
            rows = [ceiling | {"site": name, "layer": target.layer, "whole": 30 * target.layer}
                    for name, target in sites(made).items()]  # fmt: skip
            write_json(ceilings_path(made, pair), {"rows": rows})
        for subject in [one for part in tables.AT_THE_PRIMARY for one in subjects(made, pair, part)]:
            found: dict[str, Any] = {} if subject.method == ENDS else {"items": list(items(pair, subject))}
            if subject.form != "baseline":
                found["items"] += any_item(pair, subject)
                found["quality"] = quality | {"converged": True if subject.form == "trained" else None}
            if pair.arm in ADDED:
                found["carried"] = list(carried(pair, subject))
                if subject.form == "trained":
                    found["explored"] = list(explored(pair, subject))
            write_json(results_of(made, pair, primary, subject), found)
    item = {"id": "q", "split": "test", "page": 0, "half": "choose", "phrasing": 6, "family": "a0", "kind": "A",
            "answer": "1", "permuted": "2"}  # fmt: skip
    write_table(made.place.root / TEST / "items.csv", [item])
    (made.place.root / "rows.sha256").write_text("of the rows")
    return made


def test_the_tables_give_the_verdicts_that_were_made_up(plan: Plan):
    output, found = tables.write_tables(plan, [])
    assert output == plan.place.results / "tables"
    assert {path.name for path in output.iterdir()} == {
        "ceilings.csv", "dictionaries.csv", "items.csv", "causal_norm.csv", "explored.csv", "findings.csv", "run.json",
        "headline.png", "headline.svg",
    }  # fmt: skip
    verdicts = {(one.method, one.rule): one.verdict for one in found if one.verdict != "no verdict"}
    for method in METHODS:
        said = [verdicts[method, rule] for rule in ("D1", "D2", "D3")]
        finds = ["finds", "carries", "formula"]
        assert said == (finds if method == FINDS else ["does not find", "does not carry", "unresolved"])
    with (output / "findings.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["verdict"] for line in lines] == [one.verdict for one in found]
    (share,) = [line for line in lines if line["method"] == FINDS and line["condition"].startswith("share")]
    assert (share["value"], share["low"], share["high"], share["holds"]) == ("0.8", "0.8", "0.8", "True")


def test_what_is_explored_has_a_row_a_metric_and_says_of_what_pair_it_is(plan: Plan):
    (line, *_) = lines = tables.diff_rows(plan)["explored"]
    assert line == {
        "arm": "A", "seed": 3, "site": "residual2", "dictionary_seed": 0, "method": "plain", "form": "trained",
        "set": ALL, "items": 64, "norm": 9.0, "metric": "a0", "n": 15, "right": 15,
    }  # fmt: skip
    assert {(one["arm"], one["method"], one["metric"]) for one in lines} == {
        (arm, method, metric) for arm in ADDED for method in METHODS for metric in NAMES[arm]
    }


def test_files_in_which_nothing_was_explored_give_the_other_tables_as_they_were(plan: Plan):
    output, found = tables.write_tables(plan, [])
    with_it = {path.name: path.read_bytes() for path in output.iterdir() if path.suffix == ".csv"}
    for path in (plan.place.results / "diff").rglob("*.json"):
        write_json(path, {name: rows for name, rows in read_json(path).items() if name != "explored"})
    shutil.rmtree(output)
    assert tables.write_tables(plan, [])[1] == found
    without = {path.name: path.read_bytes() for path in output.iterdir() if path.suffix == ".csv"}
    assert with_it.keys() - without.keys() == {"explored.csv"}
    assert {name: with_it[name] for name in without} == without


def test_the_settings_that_were_tried_have_a_row_each(plan: Plan):
    tried = {"n_latents": 64, "k": 4, "explained_difference": 0.5, "l0": 4.0}
    for method, passes, rate in (("L1", 1, 0.5), ("L1", 1, 2.0), ("L1", 2, 2.0), ("difference SAE", 1, 2.0)):
        name = f"{method} 64-k4-x{rate:g}-{passes}"
        write_json(settings_path(plan, name), tried | {"rate": rate, "passes": passes})
    of = {"n_latents": 64, "k": 4, "rate": 2.0, "passes": 2}
    write_json(settings_path(plan, "L1"), {"chosen": of, "converged": True, "explained_difference": {}})
    output, _ = tables.write_tables(plan, [])
    rows = [(r["method"], r["passes"], r["rate"], r["chosen"], r["converged"])
            for r in tables.read_table(output / "settings.csv")]  # fmt: skip
    assert rows == [
        ("L1", "1", "0.5", "False", ""), ("L1", "1", "2.0", "False", ""), ("L1", "2", "2.0", "True", "True"),
        ("difference SAE", "1", "2.0", "False", ""),
    ]  # fmt: skip


def test_the_curves_have_every_set_at_its_norm_and_not_those_at_anothers(plan: Plan):
    drawn = curves(tables.diff_rows(plan)["causal_norm"])
    assert drawn[FINDS] == [(3.0, pytest.approx(40 / 60)), (6.0, pytest.approx(45 / 60))]
    assert drawn[COMPONENTS] == [(3.0, pytest.approx(2 / 60))] and drawn[ENDS] == [(3.0, pytest.approx(50 / 60))]


def test_sets_of_more_items_are_drawn_in_their_order_over_all_pairs():
    def row(method: str, form: str, name: str, right: int, norm: float) -> dict[str, str]:
        return {"method": method, "form": form, "set": name, "right": str(right), "n": "10", "norm": str(norm)}

    rows = [
        row("L1", "trained", "all", 6, 9.0), row("L1", "trained", "all", 8, 7.0),
        row("L1", "trained", "first 100", 1, 20.0), row("L1", "trained", "told best", 9, 1.0),
        row("L1", "untrained", "all", 9, 1.0),
        row(COMPONENTS, "baseline", "first 400", 5, 3.0), row(ENDS, "baseline", "all", 9, 4.0),
    ]  # fmt: skip
    assert wider(rows) == {"L1": [(20.0, 0.1), (8.0, 0.7)], COMPONENTS: [(3.0, 0.5)]}


def test_the_figure_has_the_hits_of_one_ranking_and_says_what_was_not_measured(plan: Plan):
    for name in ("A", "B"):
        (pair,) = [one for one in PAIRS if (one.arm, one.seed) == (name, 3)]
        (subject,) = [one for one in subjects(plan, pair, "diff") if (one.method, one.form) == TRAINED]
        path = results_of(plan, pair, sites(plan)["residual2"], subject)
        found = read_json(path)
        found["items"] += [
            row | {"ranking": BY_NU, "hit": row["metric"] in ("a0", "b1")} for row in found["items"][:16]
        ]
        write_json(path, found)
    rows = tables.diff_rows(plan)["items"]
    one, other = [row for row in rows if row["arm"] == "A"], [row for row in rows if row["seed"] == 3]
    methods, metrics, values = hit_rates(other, BY_NU)
    assert (methods, metrics[0], metrics[8]) == ([FINDS], "a0 (A)", "b0 (B)")
    assert [values[place] for place in (0, 1, 8, 9)] == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    methods, _, values = hit_rates(other, ENERGY)
    place = 2 * methods.index(FINDS)
    assert methods == list(METHODS) and all(line[place : place + 2] == [1.0, 0.0] for line in values)
    _, _, values = hit_rates(one, BY_NU)  # without the pairs of B
    assert [math.isnan(value) for value in (*values[0], *values[9])] == [False, True, True, False]


def test_a_method_that_is_not_trained_yet_is_not_in_the_figure(plan: Plan):
    for pair in PAIRS:
        for subject in [one for part in tables.AT_THE_PRIMARY for one in subjects(plan, pair, part)]:
            if (subject.method, subject.form) == ("L1", "trained"):
                results_of(plan, pair, sites(plan)["residual2"], subject).unlink()
    output, found = tables.write_tables(plan, [])
    assert (output / "headline.png").exists()
    assert {one.verdict for one in found if one.method == "L1"} == {"no verdict"}


@pytest.mark.parametrize(("more", "missed"), [(1.5, {"first 5 items": 0, "first 10 items": 2 / 8}), (3.0, None)])
def test_other_cuts_are_tried_on_the_scores_that_are_there(plan: Plan, more: float, missed: dict[str, float] | None):
    """One item tells each of the eight metrics of A, by 2 on even pages and 1 on odd ones, where all else is 0; on the
    odd pages every question has some more: too much for one threshold where it is 3."""
    kinds = [(name, kind) for kind, names in NAMES.items() for name in names]
    asked = [
        {"id": f"{page}-{name}", "split": "test", "page": page, "half": ("choose", "score")[page // 2 % 2],
         "phrasing": 6, "family": name, "kind": kind, "answer": "1", "permuted": ""}
        for page in range(8) for name, kind in kinds
    ]  # fmt: skip
    write_table(plan.place.root / TEST / "items.csv", asked)
    scores = np.zeros((8, 16, 20), dtype=np.float32)
    for metric in range(8):
        scores[::2, metric, metric + 8], scores[1::2, metric, metric + 8] = 2, 1
    scores[1::2] += more
    pair = PAIRS[0]
    (subject,) = [one for one in subjects(plan, pair, "diff") if (one.method, one.form) == TRAINED]
    path = results_of(plan, pair, sites(plan)["residual2"], subject).with_suffix(".npz")
    np.savez_compressed(path, **{f"energy, {pair.arm}": scores})
    output, _ = tables.write_tables(plan, [])
    lines = tables.read_table(output / "objections.csv")
    assert {(line["method"], line["form"]) for line in lines} == {TRAINED}
    means = [line for line in lines if (line["arm"], line["seed"]) == ("all", "")]
    lines = [line for line in lines if (line["arm"], line["seed"]) == ("A", "3")]
    assert means == [line | {"arm": "all", "seed": ""} for line in lines]  # of the only fine-tune
    assert [line["rule"] for line in lines] == [cut.name for cut in CUTS]
    added = {line["rule"]: float(line["added"]) for line in lines}
    within_pages = ("AUROC alone", "AUROC 0.8 alone", "page means taken out")
    whole = {cut.name: 1.0 if missed or cut.name in within_pages else 0.0 for cut in CUTS}
    assert added == whole | (missed or {})
    assert {line["absent"] for line in lines} == {"0.0"}


def test_verdicts_come_from_the_tables_alone(plan: Plan):
    output, found = tables.write_tables(plan, [])
    read = {name: tables.read_table(output / f"{name}.csv") for name in ("items", "causal_norm", "dictionaries")}
    assert tables.judged(read) == found


def test_before_the_ceilings_are_measured_the_tables_have_what_there_is(plan: Plan, capsys: pytest.CaptureFixture[str]):
    ceilings_path(plan, PAIRS[0]).unlink()
    output, found = tables.write_tables(plan, [])
    assert found == [] and not (output / "items.csv").exists() and (output / "run.json").exists()
    assert str(plan.place.given.data) not in (output / "run.json").read_text()  # no folder of a machine
    assert "no ceilings of [('A', 3)]; measure them with" in capsys.readouterr().out
