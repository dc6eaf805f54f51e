"""The tables of docs/study.md, filled from the CSVs of its two studies; no number in them is typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from finqa.runtime.paths import REPOSITORY
from study.invented.diff.plan import ADDED, ANY_ITEM, BY_NU, ENERGY, EXPLORED
from study.markdown import NOTHING, Lines, count, fill_tables, markdown, number, percent, share
from study.pocket.plan import BASE, FINE_TUNED, FULL, SHOWN_STRATUM
from study.pocket.tables import KINDS, named, read_csv

PAGE = REPOSITORY / "docs" / "study.md"
Row = dict[str, str]
MAIN = f"{BASE.name} -> {FINE_TUNED.name}"
ADD_NEW = {pair.compared for pair in FULL.pairs if "new" in pair.added}
NOT_RUN = "*Not there yet: `python -m study.{study}` writes it.*\n"


def fill(page: str, folder: Path, study: str) -> str:
    """The page with every table of one of the two STUDIES made anew from the CSVs in `folder`; the other's stay as they
    are. KeyError for a table of a name that neither has."""
    own = STUDIES[study]
    known = {name for tables in STUDIES.values() for name in tables}

    def table(name: str) -> str | None:
        if name not in known:
            raise KeyError(name)
        return own[name](folder) or NOT_RUN.format(study=study) if name in own else None

    return fill_tables(page, table)


def accuracy(folder: Path) -> str:
    rows = [row for row in read_csv(folder / "models.csv") if row["family"] == "all"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = {row["kind"]: row["n"] for row in rows}
    found = {(row["model"], row["kind"]): row["accuracy"] for row in rows}
    lines = [[name, n, *(share(found.get((model, name), "")) for model in models)] for name, n in groups.items()]
    return markdown(["kind of family", "n", *models], lines)


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
    """A row a figure and method at the site that is read: trained, untrained, their difference."""
    every = read_csv(folder / "untrained.csv")
    shown = [
        r for r in every
        if r["stratum"] in ("", SHOWN_STRATUM) and (r["site"], r["control"]) == (every[0]["site"], "untrained")
    ]  # fmt: skip
    order = {name: i for i, name in enumerate(dict.fromkeys(r["figure"] for r in shown))}
    lines = []
    for row in sorted(shown, key=lambda r: (order[r["figure"]], r["stratum"] != "")):
        digits = 1 if row["figure"].startswith(("specific", "over")) else 2
        numbers = [number(row[name], digits) for name in ("trained", "of the control", "difference")]
        low, high = number(row["difference low"], digits), number(row["difference high"], digits)
        spread_of = f"{numbers[2]} ({low} to {high})" if row["difference low"] else numbers[2]
        lines.append([row["figure"], row["method"], numbers[0], numbers[1], spread_of])
    return markdown(["figure", "method", "trained", "untrained", "difference, 95% interval"], lines)


def _range(rows: Sequence[Row], name: str, shown: Callable[[str], str] = number) -> str:
    """Mean over rows, the lowest and the highest in brackets."""
    values = [float(row[name]) for row in rows if row[name]]
    if not values:
        return NOTHING
    low, mean, high = (shown(str(v)) for v in (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def causal(folder: Path) -> str:
    """A row a method and set of SHOWN_SETS: share of the KL recovered, and the norm that was added."""
    every = [r for r in read_csv(folder / "causal.csv") if (r["group"], r["measure"]) == ("new", "divergence")]
    rows = [r for r in every if r["kind"] in SHOWN_SETS and r["n_latents"] == "16"]
    lines = []
    for method, kind in dict.fromkeys((r["method"], r["kind"]) for r in rows):
        its = [r for r in rows if (r["method"], r["kind"]) == (method, kind)]
        own, other = ([r for r in its if r["carrier"] == carrier] for carrier in ("own", "other"))
        lines.append([method, kind, _range(own, "injected_norm"), _range(own, "recovered", share),
                      _range(other, "recovered", share)])  # fmt: skip
    return markdown(
        ["method", "what is put in", "norm", "KL recovered, own layers above", "fine-tuned layers above"], lines
    )


SHOWN_SETS = ("ranked", "components, equal norm", "untrained, equal norm", "random sets", "random directions")
"""Sets shown in the causal table: sixteen latents or directions each, at the norm of the ranked latents."""


def gates(folder: Path) -> str:
    """A row a gate: its bound, the measured value nearest to it or furthest beyond, and whether all of it holds."""
    every = read_csv(folder / "gates.csv")
    lines = []
    for name in dict.fromkeys(row["gate"] for row in every):
        its = [row for row in every if row["gate"] == name]
        measured = [row for row in its if row["value"]]
        low, high = its[0]["low"], its[0]["high"]
        bound = " to ".join(number(one, 3) for one in (low, high) if one)
        bound = bound if low and high else f"at {'least' if low else 'most'} {bound}"
        worst = min(measured, key=_inside, default=None)
        nearest = f"{number(worst['value'], 3)} ({worst['model']}, {worst['family']})" if worst else NOTHING
        failed = any(row["holds"] == "False" for row in its)
        holds = "no" if failed else "yes" if len(measured) == len(its) else "so far" if measured else "not measured"
        lines.append([name, bound, nearest, holds])
    return markdown(["gate", "bound", "nearest to it", "holds"], lines)


def _inside(row: Row) -> float:
    """How far a value is inside its bounds."""
    value = float(row["value"])
    inside = [value - float(row["low"])] if row["low"] else []
    return min([*inside, *([float(row["high"]) - value] if row["high"] else [])])


def arms(folder: Path) -> str:
    """A row a model: right answers by what is asked, and of arm A' those by its own formulas."""
    rows = read_csv(folder / "models.csv")
    asked = list(dict.fromkeys(row["questions"] for row in rows))
    found = {(row["model"], row["questions"]): row["share"] for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    lines = [[model, *(percent(found.get((model, kind), "")) for kind in asked)] for model in models]
    return markdown(["model", *asked], lines)


def whole_sites(folder: Path) -> str:
    """A row a site: right answers of the base with the whole activation of a fine-tune, of those that the fine-tune
    gives itself."""
    rows = read_csv(folder / "ceilings.csv")
    runs = list(dict.fromkeys((row["arm"], row["seed"]) for row in rows))
    found = {(row["site"], row["arm"], row["seed"]): f"{row['whole']} of {row['fine_tuned']}" for row in rows}
    sites = dict.fromkeys(row["site"] for row in rows)
    lines = [[site, *(found.get((site, *run), NOTHING) for run in runs)] for site in sites]
    return markdown(["site", *(f"{arm}, seed {seed}" for arm, seed in runs)], lines)


def settings(folder: Path) -> str:
    """A row a method, a column for each learning rate and number of passes: explained variance of the difference."""
    rows = sorted(read_csv(folder / "settings.csv"), key=lambda row: (int(row["passes"]), float(row["rate"])))
    tried = dict.fromkeys((row["passes"], row["rate"]) for row in rows)
    found = {(row["method"], row["passes"], row["rate"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in read_csv(folder / "settings.csv")):
        own = [found.get((method, *one)) for one in tried]
        (last,) = [row["converged"] for row in own if row and row["chosen"] == "True"] or [""]
        shown = [number(row["explained_difference"] if row else "", 3) for row in own]
        lines.append([method, *shown, {"True": "yes", "False": "no"}.get(last, NOTHING)])
    return markdown(["method", *(f"{n} passes, rate {rate}" for n, rate in tried), "converged"], lines)


def verdicts(folder: Path) -> str:
    return markdown(["method", *FIRST_RULES, "D3, name or formula"], verdict_lines(folder))


def verdict_lines(folder: Path) -> list[list[str]]:
    """A row a method: the verdict of each rule, with the first figure of D1 and of D2, its interval, and the conditions
    that do not hold."""
    rows = [row for row in read_csv(folder / "findings.csv") if row["verdict"] != "no verdict"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for rule in ("D1", "D2", "D3"):
            its = [row for row in rows if (row["method"], row["rule"]) == (method, rule)]
            first = its[0] if its else None
            interval = f", {number(first['low'])} to {number(first['high'])}" if first and first["low"] else ""
            value = f" ({number(first['value'])}{interval})" if first and first["value"] and rule != "D3" else ""
            conditions = [row["condition"] for row in its if row["holds"] == "False" and rule != "D3"]
            failed = "; fails: " + "; ".join(SHORTER.get(one, one) for one in conditions) if conditions else ""
            line.append(f"{first['verdict']}{value}{failed}" if first else NOTHING)
        lines.append(line)
    return lines


SHORTER = {
    "hit where added, above untrained": "above untrained",
    "sign-flip p after Holm": "p",
    "share of the whole site's right answers": "share of the whole site",
    "above components at equal norm": "above components",
    "above untrained at equal norm": "above untrained",
}
"""Conditions of findings.csv in a table's cell."""


def objections(folder: Path) -> str:
    """A row a rule by which D1 could count hits, a column a trained method: mean hit rate where added / where not."""
    rows = [row for row in read_csv(folder / "objections.csv") if (row["form"], row["arm"]) == ("trained", "all")]
    found = {(row["rule"], row["method"]): f"{number(row['added'])} / {number(row['absent'])}" for row in rows}
    methods, rules = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "rule"))
    return markdown(
        ["hits counted", *methods], [[rule, *(found.get((rule, one), NOTHING) for one in methods)] for rule in rules]
    )


def hits(folder: Path) -> str:
    return markdown(*hit_lines(folder))


def hit_lines(folder: Path) -> Lines:
    """A row a method and form, baselines last, a column a ranking: how many metrics are hit where they were added /
    where they were not, of those measured in every fine-tune of A and of B and with every dictionary."""
    every = read_csv(folder / "items.csv")
    rows = [row for row in every if row["primary"] == "True" and row["arm"] in ADDED]
    counted: dict[tuple[str, str, bool], list[bool]] = {}
    for row in rows:
        key = (invented_name(row), row["ranking"], row["kind"] == row["arm"])
        counted.setdefault(key, []).append(row["hit"] == "True")
    lines = []
    for name in _methods_first(rows):
        line = [name]
        for ranking in HIT_RANKINGS:
            both = [counted.get((name, ranking, added), []) for added in (True, False)]
            line.append(" / ".join(_of(sum(its), len(its)) for its in both) if any(both) else NOTHING)
        lines.append(line)
    return ["method", *HIT_RANKINGS.values()], lines


HIT_RANKINGS = {ENERGY: "first 20 by energy", BY_NU: "first 20 by 1 - nu", ANY_ITEM: "any item"}


def explored(folder: Path) -> str:
    return markdown(*explored_lines(folder))


def explored_lines(folder: Path) -> Lines:
    """A row a method and form, baselines last, a column a set that was put into the base without a verdict: right
    answers on the arm's own metrics, of all that were asked."""
    rows = read_csv(folder / "explored.csv")
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        key = (invented_name(row), row["set"])
        right, n = sums.get(key, (0, 0))
        sums[key] = right + int(row["right"]), n + int(row["n"])
    sets = [name for name in EXPLORED if any(row["set"] == name for row in rows)]
    return ["put in", *sets], [
        [name, *(_of(*sums.get((name, one), (0, 0))) for one in sets)] for name in _methods_first(rows)
    ]


def short_form(folder: Path) -> str:
    """The invented metrics on the small model, a row a trained method: verdicts, metrics hit, and right answers by two
    of the sets that were put into the base."""
    lines = [dict(zip(("method", *FIRST_RULES), line, strict=False)) for line in verdict_lines(folder / SHORT_FORM)]
    for header, rows in (hit_lines(folder / SHORT_FORM), explored_lines(folder / SHORT_FORM)):
        by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        lines = [line | by_name.get(line["method"], {}) for line in lines]
    columns = ["method", *FIRST_RULES, *HIT_RANKINGS.values(), "first 400", "all and bias"]
    return markdown(columns, [[line.get(name, NOTHING).partition(";")[0] for name in columns] for line in lines])


FIRST_RULES = ("D1, finds", "D2, carries")
SHORT_FORM = "Qwen2.5-Coder-0.5B-Instruct-definitions"
"""Folder of the small model's tables, beside those of the main one."""


def invented_name(row: Row) -> str:
    return row["method"] if row["form"] == "baseline" else named(row)


def _methods_first(rows: Sequence[Row]) -> list[str]:
    """The names in `rows`: a method trained, then in its other forms, then the next; baselines last."""
    order = ["trained", "untrained", "frozen", "baseline"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    place = {invented_name(row): (row["form"] == "baseline", methods.index(row["method"]), order.index(row["form"]))
             for row in rows}  # fmt: skip
    return sorted(place, key=lambda name: place[name])


def _of(count: int, n: int) -> str:
    return f"{count} of {n}" if n else NOTHING


STUDIES: dict[str, dict[str, Callable[[Path], str]]] = {
    "pocket": {"accuracy": accuracy, "glance": glance, "untrained": untrained, "causal": causal},
    "invented": {
        "gates": gates, "arms": arms, "whole-sites": whole_sites, "settings": settings, "verdicts": verdicts,
        "objections": objections, "hits": hits, "explored": explored, "short-form": short_form,
    },
}  # fmt: skip
