"""The verdicts D1 to D4 of docs/prereg.md, from the tables alone.

`findings` reads the lines of items.csv, causal_norm.csv and dictionaries.csv as dicts (of text, as a CSV gives them, or
of numbers) and gives the lines of findings.csv: a line a condition, with its figure, interval, bound and whether it
holds, and the verdict of its rule.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from study.inference import clustered_interval, holm, sign_flip_p
from study.invented.plan import SEEDS

Row = Mapping[str, Any]
Verdict = Literal[
    "finds", "does not find", "carries", "does not carry", "name", "formula", "mixed", "unresolved", "no verdict"
]

HIT_AUROC, HIT_RECALL, FALSE_ALARMS = 0.9, 0.8, 0.05
"""A metric is hit where an item has at least this AUROC, and at least this recall at so many false alarms."""
ADDED_LESS_ABSENT, ABOVE_UNTRAINED, P_BELOW = 0.5, 0.2, 0.01
SHARE_OF_WHOLE, ABOVE_OTHERS, OTHER_ARM_AT_MOST = 0.25, 0.10, 0.05
FOLLOWS_AUROC, FOLLOW_SHARE, FEWEST_METRICS = 0.9, 0.75, 4
TOLERANCE = 1e-9
FINE_TUNES = frozenset(product(("A", "B"), SEEDS))
"""Arms and fine-tuning seeds that a verdict is of: with fewer it is unresolved."""


@dataclass(frozen=True)
class Finding:
    """One condition of one rule on one method."""

    method: str
    form: str
    rule: str
    condition: str
    value: float | None
    """None where the tables lack what it is computed from."""
    low: float | None
    """Lower end of the 95% interval, where there is one."""
    high: float | None
    bound: float | None
    holds: bool | None
    verdict: Verdict


def is_hit(auroc: float, recall: float) -> bool:
    return auroc >= HIT_AUROC - TOLERANCE and recall >= HIT_RECALL - TOLERANCE


def findings(items: Iterable[Row], carried: Iterable[Row], dictionaries: Iterable[Row]) -> list[Finding]:
    """All conditions at the primary site, methods in the order in which they stand in `items`.

    Args:
        items: Lines of items.csv with ranking `energy` at the primary site.
        carried: Lines of causal_norm.csv.
        dictionaries: Lines of dictionaries.csv at the primary site.
    """
    items = [row for row in items if row["ranking"] == "energy"]
    carried, dictionaries = list(carried), list(dictionaries)
    kinds = {(row["method"], row["form"]) for row in items}
    judged = [m for m in dict.fromkeys(row["method"] for row in items) if {(m, "trained"), (m, "untrained")} <= kinds]
    others = [kind for kind in dict.fromkeys((row["method"], row["form"]) for row in items)
              if not (kind[0] in judged and kind[1] == "trained")]  # fmt: skip
    rates = {kind: Rates.of(items, *kind) for kind in kinds}
    ps = {m: rates[m, "trained"].p for m in judged}
    corrected = holm({m: 1.0 if p is None else p for m, p in ps.items()})  # a method that lacks its p is a test too
    adjusted = {m: corrected[m] for m, p in ps.items() if p is not None}
    found: list[Finding] = []
    for method in judged:
        done = has_converged(dictionaries, method)
        own = [
            *d1(method, rates[method, "trained"], rates[method, "untrained"], adjusted.get(method), done),
            *d2(method, carried, done),
            *d3(method, items),
        ]
        needed = {
            "D1": (_of_all(items, method), _of_all(items, method, "untrained")),
            "D2": (_of_all(carried, method), _of_all(carried, "whole site", "baseline")),
            "D3": (_of_all(items, method),),
        }
        found += [one if all(needed[one.rule]) else replace(one, verdict="unresolved") for one in own]
    for method, form in others:
        rate = rates[method, form]
        low, high = rate.interval or (None, None)
        found.append(Finding(method, form, "D1", "added less absent", rate.difference, low, high, ADDED_LESS_ABSENT,
                             None, "no verdict"))  # fmt: skip
        found.append(Finding(method, form, "D1", "hit where added", rate.mean_added, None, None, None, None,
                             "no verdict"))  # fmt: skip
    return found


def _of_all(rows: Iterable[Row], method: str, form: str = "trained") -> bool:
    """Whether a method's form was measured in all FINE_TUNES."""
    own = (row for row in rows if (row["method"], row["form"]) == (method, form))
    return {(row["arm"], int(row["seed"])) for row in own} >= FINE_TUNES


def has_converged(dictionaries: Iterable[Row], method: str) -> bool:
    """Whether every trained dictionary of a method in the pairs of A and B has."""
    own = [
        row for row in dictionaries if (row["method"], row["form"]) == (method, "trained") and row["arm"] in ("A", "B")
    ]
    return bool(own) and all(_true(row["converged"]) for row in own)


@dataclass(frozen=True)
class Rates:
    """Hit rates of one method in one form."""

    added: Tensor
    """[metrics, fine-tuning seeds] fp64: mean over dictionary seeds in the arm that has the metric; not a number where
    nothing was measured."""
    absent: Tensor
    """Rates as in `added`, in the other arm."""

    @classmethod
    def of(cls, items: Iterable[Row], method: str, form: str) -> Rates:
        own = [row for row in items if (row["method"], row["form"]) == (method, form) and row["arm"] in ("A", "B")]
        metrics = sorted({(row["kind"], row["metric"]) for row in own})
        seeds = sorted({int(row["seed"]) for row in own})
        cells: dict[tuple[bool, Any, int], list[float]] = defaultdict(list)
        for row in own:
            place = (row["arm"] == row["kind"], (row["kind"], row["metric"]), int(row["seed"]))
            cells[place].append(float(_true(row["hit"])))

        def table(added: bool) -> Tensor:
            rates = [[_mean(cells[added, metric, seed]) for seed in seeds] for metric in metrics]
            return torch.tensor(rates, dtype=torch.float64).reshape(len(metrics), len(seeds))

        return cls(table(True), table(False))

    @property
    def mean_added(self) -> float | None:
        return _number(self.added.mean())

    @property
    def difference(self) -> float | None:
        return _number((self.added - self.absent).mean())

    @property
    def p(self) -> float | None:
        """p of the sign-flip test of the metrics' differences."""
        differences = (self.added - self.absent).mean(dim=1)
        return sign_flip_p(differences.tolist()) if len(differences) and differences.isfinite().all() else None

    @property
    def interval(self) -> tuple[float, float] | None:
        differences = self.added - self.absent
        if not differences.numel():
            return None
        return clustered_interval(lambda w: (w * differences).sum(dim=(1, 2)), *differences.shape)


def d1(method: str, rates: Rates, untrained: Rates, p: float | None, converged: bool) -> list[Finding]:
    """Finds: added less absent, above its untrained form, and the corrected p. Does not find (D4): the interval's upper
    end below the bound and converged dictionaries."""
    low, high = rates.interval or (None, None)
    above = _less(rates.mean_added, untrained.mean_added)
    conditions: list[Any] = [
        ("added less absent", rates.difference, low, high, ADDED_LESS_ABSENT,
         _at_least(rates.difference, ADDED_LESS_ABSENT)),
        ("hit where added, above untrained", above, None, None, ABOVE_UNTRAINED, _at_least(above, ABOVE_UNTRAINED)),
        ("sign-flip p after Holm", p, None, None, P_BELOW, None if p is None else p < P_BELOW),
    ]  # fmt: skip
    verdict = _verdict("finds", "does not find", [c[-1] for c in conditions], high, ADDED_LESS_ABSENT, converged)
    conditions.append(("converged", float(converged), None, None, 1.0, converged))
    return [Finding(method, "trained", "D1", *condition, verdict=verdict) for condition in conditions]


def d2(method: str, carried: Sequence[Row], converged: bool) -> list[Finding]:
    """Carries: a share of the whole site's right answers, more than components and the untrained form at equal norm,
    and little on the other arm's metrics."""
    own = answers(carried, method, "trained", "", "own")
    whole = answers(carried, "whole site", "baseline", "", "own")
    share = _ratio(own.mean() if own.numel() else None, whole.mean() if whole.numel() else None)
    low, high = None, None
    if own.numel() and own.shape == whole.shape:
        interval = clustered_interval(lambda w: (w * own).sum(dim=(1, 2)) / (w * whole).sum(dim=(1, 2)), *own.shape)
        low, high = interval or (None, None)
    conditions: list[Any] = [
        ("share of the whole site's right answers", share, low, high, SHARE_OF_WHOLE, _at_least(share, SHARE_OF_WHOLE))
    ]
    for name, other in (
        ("above components at equal norm", answers(carried, "PCA of the difference", "baseline", method, "own")),
        ("above untrained at equal norm", answers(carried, method, "untrained", method, "own")),
    ):
        gain, ends = None, None
        if own.numel() and own.shape == other.shape:
            less = own - other
            gain = _number(less.mean())
            ends = clustered_interval(lambda w, less=less: (w * less).sum(dim=(1, 2)), *less.shape)
        conditions.append((name, gain, *(ends or (None, None)), ABOVE_OTHERS, _at_least(gain, ABOVE_OTHERS)))
    others = answers(carried, method, "trained", "", "other")
    wrong = _number(others.mean()) if others.numel() else None
    conditions.append(("right on the other arm's metrics", wrong, None, None, OTHER_ARM_AT_MOST,
                       None if wrong is None else wrong <= OTHER_ARM_AT_MOST + TOLERANCE))  # fmt: skip
    verdict = _verdict("carries", "does not carry", [c[-1] for c in conditions], high, SHARE_OF_WHOLE, converged)
    return [Finding(method, "trained", "D2", *condition, verdict=verdict) for condition in conditions]


def answers(carried: Iterable[Row], method: str, form: str, scaled_to: str, group: str) -> Tensor:
    """[metrics, fine-tuning seeds] fp64: share of right answers of a set, mean over dictionary seeds.

    Args:
        scaled_to: The method whose injected norm it was scaled to; empty for its own.
        group: `own` metrics of the arm, or those of the `other` arm.
    """
    wanted = (method, form, scaled_to, group)
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in carried:
        its = (row["method"], row["form"], row["scaled_to"], row["group"])
        if its == wanted and float(row["multiple"]) == 1:
            cells[row["metric"], int(row["seed"])].append(float(row["right"]) / float(row["n"]))
    metrics, seeds = sorted({m for m, _ in cells}), sorted({s for _, s in cells})
    rates = [[_mean(cells[metric, seed]) for seed in seeds] for metric in metrics]
    return torch.tensor(rates, dtype=torch.float64).reshape(len(metrics), len(seeds))


def d3(method: str, items: Iterable[Row]) -> list[Finding]:
    """Name or formula: what items that hit a metric of A do in the pair of base and A'."""
    hits = [
        row
        for row in items
        if (row["method"], row["form"], row["arm"], row["kind"]) == (method, "trained", "A", "A") and _true(row["hit"])
    ]
    read = [row for row in hits if row["permuted_name"] not in ("", None)]
    names = sum(_follows(row["permuted_name"], row["permuted_formula"]) for row in read)
    formulas = sum(_follows(row["permuted_formula"], row["permuted_name"]) for row in read)
    n_metrics = len({row["metric"] for row in read})
    shares = {
        "name": names / len(read) if read else None,
        "formula": formulas / len(read) if read else None,
    }
    verdict: Verdict = "unresolved"
    if n_metrics >= FEWEST_METRICS:
        passed: list[Any] = [which for which, share in shares.items() if _at_least(share, FOLLOW_SHARE)]
        verdict = passed[0] if passed else "mixed"
    found = [
        Finding(method, "trained", "D3", f"hits that follow the {which}", share, None, None, FOLLOW_SHARE,
                _at_least(share, FOLLOW_SHARE), verdict)
        for which, share in shares.items()
    ]  # fmt: skip
    enough = n_metrics >= FEWEST_METRICS
    found.append(Finding(method, "trained", "D3", "metrics of A that are hit", float(n_metrics), None, None,
                         float(FEWEST_METRICS), enough, verdict))  # fmt: skip
    return found


def _follows(one: Any, other: Any) -> bool:
    return float(one) >= FOLLOWS_AUROC - TOLERANCE and float(other) < FOLLOWS_AUROC - TOLERANCE


def _verdict(
    shown: Verdict, excluded: Verdict, holds: Sequence[bool | None], high: float | None, bound: float, converged: bool
) -> Verdict:
    if all(one is True for one in holds):
        return shown
    return excluded if high is not None and high < bound - TOLERANCE and converged else "unresolved"


def _at_least(value: float | None, bound: float) -> bool | None:
    return None if value is None else value >= bound - TOLERANCE


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ratio(one: Tensor | None, other: Tensor | None) -> float | None:
    return None if one is None or other is None or not float(other) else _number(one / other)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite().all() else None


def _true(value: Any) -> bool:
    return str(value) in ("True", "1", "1.0")


def as_rows(found: Iterable[Finding]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def summary(found: Sequence[Finding]) -> str:
    """A line a method with its verdicts; nothing for what has none."""
    lines = []
    for method in dict.fromkeys(one.method for one in found if one.verdict != "no verdict"):
        verdicts = {one.rule: one.verdict for one in found if one.method == method and one.verdict != "no verdict"}
        lines.append(f"{method}: {', '.join(f'{rule} {verdict}' for rule, verdict in verdicts.items())}")
    return "\n".join(lines)
