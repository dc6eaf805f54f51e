"""The study's tables: no number of the page is typed, and every one is in a CSV beside it."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY
from study import page
from study.inference import holm
from study.invented.verdicts import Rates
from study.markdown import BLOCK
from study.pocket import compare, tables
from study.pocket.tables import read_csv, write_csv

PAGE = page.PAGE
PRIMARY = ("last prompt token", "program before the operator")
REFERENCE = REPOSITORY / "docs" / "reference"
COMMITTED = {"pocket": REFERENCE / "study", "invented": REFERENCE / "invented"}
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?%?(?![\w.])")


def estimate(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None, "n": 3, "n_others": 5}


def answer(
    pair: str, method: str, specific: int, delta: float | None, families=("ratio",), form: str = "trained"
) -> dict:
    """What measures.answer_one writes, of two strata."""
    measures = [{"measure": "delta_slope", "added_against_rest": estimate(0.625)}]
    classes = [{"name": "all active", "n": 9, "recall": estimate(0.5), "precision": estimate(0.25)}]
    if delta is not None:
        measures.append({"measure": "delta", "added_against_rest": estimate(delta)})
        classes.append({"name": "delta", "n": 0, "recall": estimate(None), "precision": estimate(None)})
    strata = [
        {
            "stratum": stratum,
            "exclusivity": measures,
            "classes": classes,
            "best_is_added": estimate(0.375),
            "best_items": {"ratio": estimate(0.84), "change": estimate(0.71)},
            "specific_to_added": specific,
            "specific_to_known": 2,
            "over_all_pages_added": specific + 5,
            "over_all_pages_known": 3,
            "significant_for_added": 4,
            "significant_for_known": 1,
            "probe": {name: {"ratio": 0.9, "change": None} for name in ("instruct", "fine-tuned", "difference")},
        }
        for stratum in PRIMARY
    ]
    compared = pair.removesuffix(", second seed")
    which = {"pair": pair, "compared": compared, "site": "layer 4 residual", "method": method, "form": form}
    squares = {"fixed": 1234.5, "other predicted": 8.125, "passage": None}
    tokens = {
        "best": {"value": 0.8125, "low": 0.7, "high": 0.9},
        "decoded": {"value": 0.955, "low": 0.9, "high": 0.97},
        "n_tokens": {"fixed": 17, "other predicted": 1000},
        "mean_square_norm": squares,
        "share_in_added_families": 1.0,
    }
    return {
        **which,
        "n_alive": 9,
        "added": list(families),
        "strata": strata,
        "specific_by_family": {stratum: {"ratio": specific} for stratum in PRIMARY},
        "tokens": tokens,
        "rows": [{"pair": pair, "subject": method, "stratum": "last prompt token", "n_alive": 9}],
    }


ANSWERS = [
    answer("base -> fine-tuned", "plain", 3, 0.44),
    answer("base -> fine-tuned, second seed", "plain", 6, 0.56),
    answer("base -> fine-tuned", "plain", 5, None, form="untrained"),
    answer("base -> fine-tuned, second seed", "plain", 6, None, form="untrained"),
    answer("base -> fine-tuned", "difference SAE", 47, None),
    answer("base -> sham", "plain", 0, 0.5, families=()),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every CSV of a study, with made-up figures."""
    kinds = [("new", 0.0, 0.985), ("known", 0.998, 0.948)]
    models = [
        {"model": m, "kind": kind, "family": family, "n": 400, "accuracy": share[i]}
        for i, m in enumerate(("base", "fine-tuned"))
        for kind, *share in kinds
        for family in ("all", f"a {kind} one")
    ]
    ceilings = [
        {"layer": layer, "site": site, "direction": direction, "carrier": carrier, "divergence_closed": 0.137 * layer,
         "exact": 0.021, "exact_recovered": None, "n": 48}
        for layer in (1, 2) for site in ("attention", "mlp", "residual")
        for direction in ("sufficiency", "necessity") for carrier in ("own", "other")
    ]  # fmt: skip
    which = {"pair": "base -> fine-tuned", "site": "layer 4 residual", "method": "plain"}
    which |= {"compared": "base -> fine-tuned"}
    quality = {"form": "trained", "explained_joint": 0.96712, "explained_difference": 0.62345, "l0": 24.84}
    patch = {"n_latents": 16, "direction": "sufficiency", "group": "new", "value": 0.3719, "injected_norm": 7.25}
    patch |= {"recovered_low": 0.39, "recovered_high": 0.51}
    patches = [
        {**which, **patch, "kind": kind, "carrier": carrier, "measure": measure, "recovered": recovered}
        for kind, recovered in (("ranked", 0.443), ("components, equal norm", 0.333), ("untrained, equal norm", 0.137))
        for carrier in ("own", "other")
        for measure in ("divergence", "accuracy")
    ]
    control = {"control": "random sets", "n_latents": 16, "group": "new", "measure": "divergence", "ranked": 0.443}
    control |= {"direction": "sufficiency", "carrier": "other", "mean": 0.12, "lowest": 0.02, "highest": 0.27}
    written = {
        "models": models,
        "ceilings": ceilings,
        "dictionaries": [which | quality | {"dead_on_held_out": 0.031, "steps": 1000}],
        "known_answer": tables.answer_rows(ANSWERS),
        "glance": tables.glance_rows(ANSWERS),
        "kinds": tables.kind_rows(ANSWERS),
        "matrix": tables.matrix_rows(ANSWERS),
        "tokens": tables.token_rows(ANSWERS),
        "probes": tables.probe_rows(ANSWERS),
        "causal": patches,
        "untrained": tables.untrained_rows(ANSWERS, patches, "base -> fine-tuned"),
        "causal_controls": [which | control | {"n_sets": 20, "p": 0.0476}],
    }
    for name, rows in written.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    return tmp_path


def shown_numbers(text: str, study: str = "pocket") -> set[str]:
    """Every number in the cells of a study's tables, as it is written there; names of things are left out."""
    cells = [
        cell.strip()
        for block in BLOCK.finditer(text)
        if block[2] in page.STUDIES[study]
        for line in block[3].splitlines()[2:]
        for cell in line.strip("|").split("|")
    ]
    return {number for cell in cells for number in NUMBER.findall(cell)}


def is_in(number: str, values: list[float]) -> bool:
    """Whether some value of a CSV rounds to a number that is shown."""
    digits = len(number.rstrip("%").partition(".")[2])
    scale, sign = (100, "%") if number.endswith("%") else (1, "")
    return any(f"{value * scale:.{digits}f}{sign}" == number for value in values)


def values_of(folder: Path) -> list[float]:
    """Of one run; again.csv has another run's too."""
    texts = {
        text
        for path in folder.rglob("*.csv")
        if path.name != "again.csv"
        for row in read_csv(path)
        for text in row.values()
    }
    values = [float(number) for text in texts for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]
    return values + [total for path in folder.rglob("items.csv") for total in sums_of(path.parent)]


def sums_of(folder: Path) -> list[float]:
    """What the tables of the invented metrics add up over pairs: metrics hit, and right answers of sets."""
    sums: Counter[tuple[str, ...]] = Counter()
    for row in read_csv(folder / "items.csv"):
        if row["primary"] == "True" and row["arm"] in "AB":
            place = (row["method"], row["form"], row["ranking"], str(row["kind"] == row["arm"]))
            sums["hit", *place] += row["hit"] == "True"
            sums["asked", *place] += 1
    for row in read_csv(folder / "explored.csv"):
        for name in ("right", "n"):
            sums[name, row["method"], row["form"], row["set"]] += int(row[name])
    return [float(value) for value in sums.values()]


def test_every_table_of_the_page_is_filled_and_every_number_in_it_is_in_a_csv(folder: Path):
    filled = page.fill(PAGE.read_text(), folder, "pocket")
    assert page.NOT_RUN.format(study="pocket") not in filled
    numbers, values = shown_numbers(filled), values_of(folder)
    assert {"98%", "47", "5.5", "44%", "7.25", "33%"} <= numbers
    assert not [number for number in numbers if not is_in(number, values)]


def test_a_number_that_is_in_no_csv_is_noticed(folder: Path):
    filled = page.fill(PAGE.read_text(), folder, "pocket").replace("47", "46.9")
    assert [n for n in shown_numbers(filled) if not is_in(n, values_of(folder))] == ["46.9"]


@pytest.mark.parametrize("study", ["pocket", "invented"])
def test_the_committed_page_has_the_committed_figures_and_no_others(study: str):
    text, folder = PAGE.read_text(), COMMITTED[study]
    assert page.fill(text, folder, study) == text
    values = values_of(folder)
    assert not [number for number in shown_numbers(text, study) if not is_in(number, values)]


def test_the_tables_of_the_invented_metrics_say_what_is_measured_and_what_is_not(tmp_path: Path):
    fixed = {"n": 60, "holds": True}
    write_csv(tmp_path / "gates.csv", [
        {"gate": "learnt", "model": "A-seed3", "family": "far", "value": 0.95, "low": 0.8, "high": None, **fixed},
        {"gate": "learnt", "model": "A-seed3", "family": "near", "value": 0.825, "low": 0.8, "high": None, **fixed},
        {"gate": "known", "model": "A", "family": "f", "value": -0.031, "low": -0.02, "high": 0.02, "holds": "False"},
        {"gate": "other", "model": "A", "family": "f", "value": 0.01, "low": None, "high": 0.05, **fixed},
        {"gate": "other", "model": "B", "family": "f", "value": None, "low": None, "high": 0.05, "holds": None},
    ])  # fmt: skip
    rule = {"rule": "D1", "low": 0.41, "high": 0.93, "verdict": "finds", "holds": "True"}
    write_csv(tmp_path / "findings.csv", [
        {"method": "plain", "condition": "added less absent", "value": 0.6875, **rule},
        {"method": "plain", "condition": "p", "value": 0.001, **rule},
        {"method": "norm", "condition": "hit", "value": 0.5, **rule, "verdict": "no verdict"},
        {"method": "L1", "condition": "added less absent", "value": 0.6875, **rule, "verdict": "unresolved"},
        {"method": "L1", "condition": "p", "value": 0.1, **rule, "verdict": "unresolved", "holds": "False"},
    ])  # fmt: skip
    tried = [("as fixed", "plain", 0.6875, 0.0), ("as fixed", "L1", 0.5, None), ("AUROC alone", "plain", 0.75, 0.125)]
    write_csv(tmp_path / "objections.csv", [
        {"rule": name, "method": method, "form": form, "arm": arm, "added": added, "absent": absent}
        for name, method, added, absent in tried for form in ("trained", "untrained") for arm in ("all",)
    ])  # fmt: skip
    columns = ("method", "form", "arm", "kind", "ranking", "hit", "primary")
    write_csv(tmp_path / "items.csv", [dict(zip(columns, line, strict=True)) for line in [
        ("norm", "baseline", "A", "A", "energy", "False", "True"),
        ("norm", "baseline", "A", "B", "energy", "False", "True"),
        ("L1", "untrained", "A", "A", "1 - nu", "False", "True"),
        ("L1", "trained", "A", "A", "energy", "False", "True"),
        ("L1", "trained", "A", "A", "energy", "True", "True"),
        ("L1", "trained", "A", "B", "energy", "False", "True"),
        ("L1", "trained", "B", "B", "energy", "True", "True"),
        ("L1", "trained", "B", "A", "energy", "True", "True"),
        ("L1", "trained", "B", "A", "any item", "True", "True"),
        ("L1", "trained", "A", "A", "energy", "True", "False"),  # at another site
        ("L1", "trained", "K", "A", "energy", "True", "True"),
    ]])  # fmt: skip
    write_csv(tmp_path / "explored.csv", [
        {"method": method, "form": form, "set": name, "metric": metric, "n": 15, "right": right}
        for method, form, name, rights in [
            ("whole site", "baseline", "all", (9, 4)), ("L1", "untrained", "all", (0, 0)),
            ("L1", "trained", "all", (7, 0)), ("L1", "trained", "told best", (1, 2)),
        ]
        for metric, right in zip("xy", rights, strict=True)
    ])  # fmt: skip
    made = page.STUDIES["invented"]
    assert made["hits"](tmp_path).splitlines() == [
        "| method | first 20 by energy | first 20 by 1 - nu | any item |",
        "| --- | --- | --- | --- |",
        "| L1 | 2 of 3 / 1 of 2 | - | - / 1 of 1 |",
        "| L1, untrained | - | 0 of 1 / - | - |",
        "| norm | 0 of 1 / 0 of 1 | - | - |",
    ]
    assert made["explored"](tmp_path).splitlines() == [
        "| put in | told best | all |",
        "| --- | --- | --- |",
        "| L1 | 3 of 30 | 7 of 30 |",
        "| L1, untrained | - | 0 of 30 |",
        "| whole site | - | 13 of 30 |",
    ]
    assert made["gates"](tmp_path).splitlines()[2:] == [
        "| learnt | at least 0.800 | 0.825 (A-seed3, near) | yes |",
        "| known | -0.020 to 0.020 | -0.031 (A, f) | no |",
        "| other | at most 0.050 | 0.010 (A, f) | so far |",
    ]
    assert made["verdicts"](tmp_path).splitlines()[2:] == [
        "| plain | finds (0.69, 0.41 to 0.93) | - | - |",
        "| L1 | unresolved (0.69, 0.41 to 0.93); fails: p | - | - |",
    ]
    assert made["objections"](tmp_path).splitlines()[2:] == [
        "| as fixed | 0.69 / 0.00 | 0.50 / - |",
        "| AUROC alone | 0.75 / 0.12 | - |",
    ]
    assert made["whole-sites"](tmp_path) == ""
    (tmp_path / "explored.csv").unlink()
    assert made["explored"](tmp_path) == ""


def hits_of(items: list[page.Row]) -> Counter[tuple[str, ...]]:
    """Metrics hit, by ranking, form, method, and whether the metric was added."""
    hits: Counter[tuple[str, ...]] = Counter()
    for row in items:
        hits[row["ranking"], row["form"], row["method"], str(row["kind"] == row["arm"])] += row["hit"] == "True"
    return hits


def rates_by_nu(items: list[page.Row]) -> dict[str, Rates]:
    own = [row for row in items if (row["ranking"], row["form"]) == ("1 - nu", "trained")]
    return {method: Rates.of(own, method, "trained") for method in {row["method"] for row in own}}


def hits_of_l1_in_a(items: list[page.Row]) -> list[page.Row]:
    kinds = [(row["method"], row["form"], row["ranking"], row["arm"], row["kind"], row["hit"]) for row in items]
    return [row for row, of in zip(items, kinds, strict=True) if of == ("L1", "trained", "1 - nu", "A", "A", "True")]


def test_what_the_page_says_in_words_is_in_the_committed_figures():
    text = PAGE.read_text().partition("- **On pocket-mistral,")[2].partition("## Invented metrics")[0]
    numbers, values = set(NUMBER.findall(text)), values_of(COMMITTED["pocket"])
    assert len(numbers) > 2
    assert not [number for number in numbers if not is_in(number, values)]


def test_what_the_page_says_of_invented_metrics_is_in_the_committed_tables():
    text = " ".join(PAGE.read_text().split())
    tables = {name: read_csv(COMMITTED["invented"] / f"{name}.csv")
              for name in ("items", "causal_norm", "dictionaries", "explored", "objections", "findings")}  # fmt: skip
    items, carried = tables["items"], tables["causal_norm"]
    seven = {row["method"] for row in tables["dictionaries"]}
    assert len(seven) == 7 and {row["dictionary_seed"] for row in tables["dictionaries"]} == {"0"}

    given = {(row["method"], row["rule"], row["verdict"]) for row in tables["findings"] if row["method"] in seven}
    six = {method for method, _, verdict in given if verdict == "does not find"}
    assert six == {method for method, _, verdict in given if verdict == "does not carry"} and len(six) == 6
    assert given >= {("stage-wise SAE", rule, "unresolved") for rule in ("D1", "D2")}
    assert "six of seven methods neither find nor carry" in text

    def right(method: str, arm: str = "", seed: str = "") -> tuple[int, int]:
        rows = [row for row in carried if row["method"] == method and row["form"] in ("trained", "baseline")
                and arm in row["arm"] and seed in row["seed"]
                and row["group"] == "own" and not row["scaled_to"] and row["multiple"] == "1.0"]  # fmt: skip
        return sum(int(row["right"]) for row in rows), sum(int(row["n"]) for row in rows)

    sets = {row["method"] for row in carried} - {"whole site", "fine-tuned"}
    assert seven < sets and {right(method) for method in sets} == {(0, 1920)}
    whole, asked = right("whole site")
    assert f"none of {asked:,} right answers, where the whole site gives {whole:,}" in text
    pairs = [("A", "3"), ("A", "4"), ("B", "3"), ("B", "4")]
    answered = [right("fine-tuned", *pair)[0] for pair in pairs]
    assert "answer {}, {} (A), {} and {} (B) of 480 rightly".format(*answered) in text
    assert "whole sites give {}, {}, {} and {}:".format(*(right("whole site", *pair)[0] for pair in pairs)) in text
    learnt = [row for row in carried if row["method"] == "fine-tuned" and row["group"] == "own"
              and int(row["right"]) < 0.8 * int(row["n"])]  # fmt: skip
    assert [(row["arm"], row["seed"], row["metric"], row["right"]) for row in learnt] == [("B", "3", "daklir", "23")]
    assert "daklir, is at 23 of 60" in text

    hits = hits_of(items)
    by = {(ranking, form): sorted(hits[ranking, form, method, "True"] for method in seven)
          for ranking in ("energy", "any item") for form in ("trained", "untrained")}  # fmt: skip
    assert not any(number for key, number in hits.items() if key[0] == "energy")
    plain, l1 = (hits["1 - nu", "trained", method, "True"] for method in ("plain", "L1"))
    assert (
        f"1 - nu tell {l1} of 32 (16 metrics, two fine-tunes each)" in text
        and f"of the plain crosscoder {plain}." in text
    )
    assert not any(hits["1 - nu", *key] for key in [("trained", "L1", "False"), ("untrained", "L1", "True")])
    fewest, most = by["any item", "trained"][0], by["any item", "trained"][-1]
    assert f"tell {fewest} to {most} of 32 and untrained ones at most {by['any item', 'untrained'][-1]}." in text

    rates = rates_by_nu(items)
    p = holm({method: one.p or 1.0 for method, one in rates.items()})["L1"]
    low, high = rates["L1"].interval or (0.0, 0.0)
    assert f"all of D1: {rates['L1'].difference:.2f} ({low:.2f} to {high:.2f}), p after Holm {p:.4f}." in text
    others = max(one.difference or 0.0 for method, one in rates.items() if method not in ("L1", "plain"))
    assert len(rates) == 5 and f"fail at {rates['plain'].difference:.2f}, and the three others" in text
    assert f"at {others} at most" in text

    followed = hits_of_l1_in_a(items)
    formula = [row for row in followed if float(row["permuted_formula"]) >= 0.9]
    assert max(float(row["permuted_name"]) for row in followed) < 0.9
    assert len([row for row in followed if float(row["look_up"]) >= 0.9]) == 1
    n, m = len(followed), len(formula)
    assert f"Of L1's {n} hits by 1 - nu in A, {m} follow the formula" in text and f"and {n - m} neither" in text

    def of(method: str, form: str, name: str) -> int:
        rows = [r for r in tables["explored"] if (r["method"], r["form"], r["set"]) == (method, form, name)]
        assert sum(int(row["n"]) for row in rows) == (480 if rows else 0)
        return sum(int(row["right"]) for row in rows)

    decoded, four = ([of(method, "trained", name) for method in seven] for name in ("all and bias", "first 400"))
    site = of("whole site", "baseline", "all")
    assert f"with its bias give {min(decoded)} to {max(decoded)}, and the whole site {site}." in text
    assert f"by energy give {max(four)} at most" in text and sum(number > 0 for number in four) == 4
    assert f"components 100 give {of('PCA of the difference', 'baseline', 'first 100')}." in text
    few = {of(method, "trained", name) for method in seven for name in ("first 100", "told best", "top 20 by 1 - nu")}
    assert few == {0} == {of(method, "untrained", "all") for method in seven}

    explained = sorted(float(row["explained_difference"]) for row in tables["dictionaries"] if row["form"] == "trained")
    assert f"explain {explained[0]:.0%} to {explained[-1]:.0%}".replace("% to", " to") in text
    norms = {(row["method"], row["arm"], row["seed"]): float(row["norm"]) for row in carried
             if row["form"] == "baseline" and not row["scaled_to"] and row["multiple"] == "1.0"}  # fmt: skip
    shares = [(norms["PCA of the difference", *pair] / norms["whole site", *pair]) ** 2 for pair in pairs]
    assert f"components have {min(shares):.0%} to {max(shares):.0%}".replace("% to", " to") in text
    random = [row for row in tables["objections"] if (row["method"], row["arm"]) == ("random directions", "all")]
    by_cut = {row["rule"]: [round(32 * float(row[name])) for name in ("added", "absent")] for row in random}
    alone, centred = by_cut["AUROC alone"], by_cut["page means taken out"]
    assert (
        f"lead: {alone[0]} and {centred[0]} of 32 where a metric was added, {alone[1]} and {centred[1]} where" in text
    )
    leading = {row["rule"] for row in tables["objections"] if row["form"] == "trained" and float(row["added"])}
    assert leading == {"AUROC alone", "AUROC 0.8 alone", "page means taken out"}
    sixteen, thirty_two = (1 - 0.025 ** (1 / n) for n in (16, 32))
    assert f"none of 16 metrics is {sixteen:.2f}, below" in text
    assert f"that is {sixteen * asked / whole:.2f}, above the 0.25" in text
    assert f"{thirty_two * asked / whole:.2f} with 32 metrics and fine-tunes" in text


def test_what_the_page_says_of_the_small_model_is_in_its_figures():
    text = " ".join(BLOCK.sub("", PAGE.read_text()).partition("### The 0.5B, in the short form")[2].split())
    folder = COMMITTED["invented"] / page.SHORT_FORM
    tables = {name: read_csv(folder / f"{name}.csv")
              for name in ("items", "causal_norm", "dictionaries", "explored", "findings")}  # fmt: skip
    seven = {row["method"] for row in tables["dictionaries"]}
    given = {(row["rule"], row["verdict"]) for row in tables["findings"] if row["form"] == "trained"}
    assert given == {("D1", "does not find"), ("D2", "does not carry"), ("D3", "unresolved")} and len(seven) == 7
    trained = [row for row in tables["dictionaries"] if row["form"] == "trained"]
    assert {row["converged"] for row in trained} == {"True"} and len(trained) == 28

    carried: Counter[tuple[str, str]] = Counter()
    for row in tables["causal_norm"]:
        if row["group"] == "own" and row["multiple"] == "1.0" and not row["scaled_to"] and row["form"] != "untrained":
            carried["right", row["method"]] += int(row["right"])
            carried["asked", row["method"]] += int(row["n"])
    methods = {method for _, method in carried} - {"whole site", "fine-tuned"}
    assert seven < methods and not any(carried["right", method] for method in methods)
    whole, asked = (carried[name, "whole site"] for name in ("right", "asked"))
    assert f"on the test it gives {whole:,} of {asked:,}" in text and {carried["asked", m] for m in methods} == {asked}
    assert f"site gives, is {(1 - 0.025 ** (1 / 16)) * asked / whole:.3f} here" in text

    hits = hits_of(tables["items"])
    assert {key: n for key, n in hits.items() if key[0] == "energy" and n} == {
        ("energy", "trained", "partition", "True"): 1
    }
    added, absent = [hits["1 - nu", "trained", "L1", which] for which in ("True", "False")]
    assert f"L1 hits {added} of 32 where they were added and {absent} where not" in text
    whole_page = " ".join(PAGE.read_text().split())
    assert f"On the 0.5B L1 tells {added}, and {absent} where they were not." in whole_page
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    assert f"by 1 - nu tell {added} of the 32, and {absent} of those that were not added." in readme
    rates = rates_by_nu(tables["items"])
    p, (low, high) = holm({method: one.p or 1.0 for method, one in rates.items()})["L1"], rates["L1"].interval or (0, 0)
    assert f"{rates['L1'].difference:.2f} ({low:.2f} to {high:.2f}), below the 0.5" in text
    assert f"p after Holm {p:.3f}." in text and len(rates) == 5
    followed = hits_of_l1_in_a(tables["items"])
    name, formula = (sum(float(row[f"permuted_{by}"]) >= 0.9 for row in followed) for by in ("name", "formula"))
    assert f"{formula} of its {len(followed)} hits follow the formula" in text and name == 1

    def told(form: str, added: str) -> list[int]:
        return sorted(hits["any item", form, method, added] for method in seven)

    best, wrong, untrained = told("trained", "True"), told("trained", "False"), told("untrained", "True")
    assert f"tells {best[0]} to {best[-1]} of 32 where they were added, {wrong[0]} to {wrong[-1]} where not" in text
    assert f"and {untrained[-1]} at most untrained." in text

    right: Counter[tuple[str, str, str]] = Counter()
    for row in tables["explored"]:
        right[row["method"], row["form"], row["set"]] += int(row["right"])
    decoded = sorted(right[method, "trained", "all and bias"] for method in seven)
    most = max(right[method, "trained", "first 400"] for method in seven)
    site, hundred = right["whole site", "baseline", "all"], right["PCA of the difference", "baseline", "first 100"]
    assert f"give {decoded[0]} to {decoded[-1]} of 480 right answers, the whole site {site}" in text
    assert f"by energy {most} at most, and 100 principal components {hundred}." in text


def test_what_readme_says_of_the_study_is_in_the_committed_figures():
    text = (REPOSITORY / "README.md").read_text().partition("**Does such a comparison find")[2].partition("[docs/")[0]
    numbers, values = set(NUMBER.findall(text)), [*values_of(COMMITTED["pocket"]), *values_of(COMMITTED["invented"])]
    assert {"22", "32", "16", "92.5", "233.5"} <= numbers
    assert not [number for number in numbers if not is_in(number, values)]


def test_two_runs_agree_where_their_spreads_overlap(folder: Path, tmp_path_factory, capsys, monkeypatch):
    tmp_path = tmp_path_factory.mktemp("runs")
    other = shutil.copytree(folder, tmp_path / "other")
    rows = compare.compared(folder, other)
    assert {row["group"] for row in rows} == {"specific latents", "exclusivity", "recovered"}
    assert all(row["overlap"] for row in rows)

    moved = [{**row, "new": 900, "new lowest": 890, "new highest": 910} for row in read_csv(other / "kinds.csv")]
    write_csv(other / "kinds.csv", moved)
    counts = [row for row in compare.compared(folder, other) if row["group"] == "specific latents"]
    apart = [row for row in counts if not row["overlap"]]
    assert apart and {row["figure"] for row in apart} == {"specific to new"}
    monkeypatch.setattr(sys, "argv", ["compare", str(folder), str(other), "--write", str(tmp_path / "again.csv")])
    compare.main()
    said = capsys.readouterr().out
    assert f"| specific latents | {len(counts)} | {len(counts) - len(apart)} |" in said
    assert len(read_csv(tmp_path / "again.csv")) == len(rows)
    with pytest.raises(UserError, match="no figure in common"):
        monkeypatch.setattr(sys, "argv", ["compare", str(folder), str(tmp_path)])
        compare.main()


def test_filling_again_changes_nothing_and_other_text_stays(folder: Path):
    once = page.fill(PAGE.read_text(), folder, "pocket")
    assert page.fill(once, folder, "pocket") == once
    assert BLOCK.sub("", once) == BLOCK.sub("", PAGE.read_text())


def test_a_table_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError, match="accuracies"):
        page.fill("<!-- table: accuracies -->\n<!-- end of table -->", COMMITTED["pocket"], "pocket")


def test_fine_tunes_are_one_row_with_their_mean_and_their_range():
    plain = next(row for row in tables.glance_rows(ANSWERS) if (row["method"], row["form"]) == ("plain", "trained"))
    assert (plain["fine-tunes"], plain["specific to added"]) == (2, 4.5)
    assert (plain["specific to added lowest"], plain["specific to added highest"]) == (3, 6)
    assert plain["auroc of Delta"] == pytest.approx(0.5)


def test_what_training_adds_is_a_difference_over_fine_tunes_with_its_t_interval():
    patches = [
        {"compared": "base -> fine-tuned", "pair": pair, "site": "layer 4 residual", "method": "plain", "kind": kind,
         "n_latents": 16, "direction": "sufficiency", "carrier": "own", "group": "new", "measure": "divergence",
         "recovered": recovered}
        for pair, ranked, untrained in (("a", 0.30, 0.11), ("b", 0.33, 0.13), ("c", 0.36, 0.15))
        for kind, recovered in (("ranked", ranked), ("untrained", 0.9), ("untrained, equal norm", untrained))
    ]  # fmt: skip
    counts, of_kl = (
        [row for row in tables.untrained_rows(ANSWERS, patches, "base -> fine-tuned") if row["figure"] == figure]
        for figure in ("specific to added", "KL recovered by 16, equal norm")
    )
    [row] = [row for row in counts if row["stratum"] == PRIMARY[1]]
    assert (row["method"], row["control"], row["fine-tunes"]) == ("plain", "untrained", 2)
    assert (row["trained"], row["of the control"], row["difference"]) == (4.5, 5.5, -1)
    # Differences of -2 and 0: t(0.975, 1) is 12.706, the standard error 1.
    assert (row["difference low"], row["difference high"]) == pytest.approx((-13.706, 11.706), abs=1e-3)
    assert row["verdict"] == "unresolved"
    [row] = of_kl
    # Differences of 0.19, 0.20, 0.21: t(0.975, 2) is 4.303, the standard error 0.01 / sqrt 3.
    assert row["difference"] == pytest.approx(0.2)
    assert (row["difference low"], row["difference high"]) == pytest.approx((0.17516, 0.22484), abs=1e-4)
    assert row["verdict"] == "more"
    two = [patch for patch in patches if patch["pair"] != "c"]
    rows = [r for r in tables.untrained_rows([], two, "base -> fine-tuned") if r["control"] == "untrained"]
    assert [(r["fine-tunes"], r["verdict"]) for r in rows] == [(2, "unresolved")]


def test_an_empty_class_has_no_figure_and_not_the_figure_zero():
    rows = {(r["pair"], r["method"]): r for r in tables.glance_rows(ANSWERS) if r["form"] == "trained"}
    plain, sae = rows["base -> fine-tuned", "plain"], rows["base -> fine-tuned", "difference SAE"]
    assert (plain["only, by Delta"], plain["recall, by Delta"], plain["precision, by Delta"]) == (0, None, None)
    assert sae["auroc of Delta"] is None
    assert sae["only, by Delta"] is None


def test_the_glance_is_of_the_strata_that_were_counted():
    assert {row["stratum"] for row in tables.glance_rows(ANSWERS)} == set(PRIMARY)


def test_the_matrix_has_every_pair_and_family():
    rows = tables.matrix_rows(ANSWERS)
    assert {row["pair"] for row in rows} == {"base -> fine-tuned", "base -> sham"}
    of_pair = [row for row in rows if row["pair"] == "base -> fine-tuned" and row["stratum"] == PRIMARY[0]]
    assert {tables.named(row): row["specific"] for row in of_pair if row["family"] == "ratio"} == {
        "plain": 4.5, "plain, untrained": 5.5, "difference SAE": 47
    }  # fmt: skip


def test_kinds_are_counted_in_pairs_that_add_nothing_too():
    sham = {**answer("base -> sham", "plain", 0, None, families=())}
    sham["specific_by_family"] = {stratum: {"ratio": 2, "change": 5} for stratum in PRIMARY}
    [row] = [row for row in tables.kind_rows([sham]) if row["stratum"] == PRIMARY[1]]
    assert [row[kind] for kind in ("new", "other", "known")] == [2, 0, 5]


def test_a_csv_comes_back_as_it_was_with_empty_cells_for_what_there_is_not(tmp_path: Path):
    write_csv(tmp_path / "t.csv", [{"a": None, "b": 0.1234567}, {"a": True, "c": "x, y"}])
    assert read_csv(tmp_path / "t.csv") == [
        {"a": "", "b": "0.123457", "c": ""},
        {"a": "1", "b": "", "c": "x, y"},
    ]


def test_figures_are_drawn_from_the_csvs(folder: Path):
    from study.pocket import figures

    figures.draw_ceilings(read_csv(folder / "ceilings.csv"), folder / "ceilings.png")
    figures.draw_glance(read_csv(folder / "kinds.csv"), folder / "glance.png", "last prompt token")
    figures.draw_recovered(read_csv(folder / "causal.csv"), folder / "causal.png")
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("ceilings", "glance", "causal"))
