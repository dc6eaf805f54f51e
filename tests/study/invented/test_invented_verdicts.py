"""The verdicts of made-up tables in which each is known, at the edges of every threshold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch

from finqa.runtime.paths import REPOSITORY
from study.inference import clustered_interval, holm, sign_flip_p
from study.invented import verdicts
from study.invented.verdicts import Finding, findings, is_hit, summary

A, B = [f"a{i}" for i in range(8)], [f"b{i}" for i in range(8)]
KINDS = {**dict.fromkeys(A, "A"), **dict.fromkeys(B, "B")}
FINE_TUNES = [(arm, seed) for seed in (3, 4) for arm in ("A", "B")]
METHOD = "difference SAE"
Row = dict[str, Any]
Hit = Callable[[str, str, int, int], bool]
"""Metric, arm, fine-tuning seed, dictionary seed."""


def added(metric: str, arm: str) -> bool:
    return KINDS[metric] == arm


def items(
    hit: Hit, form: str = "trained", method: str = METHOD, permuted: tuple[float, float] = (1.0, 0.5)
) -> list[Row]:
    """A line a metric, fine-tune and dictionary seed; `permuted`: AUROC in A' for the name and for the formula."""
    return [
        {
            "method": method, "form": form, "arm": arm, "seed": seed, "dictionary_seed": own, "ranking": "energy",
            "metric": metric, "kind": kind, "hit": str(hit(metric, arm, seed, own)),
            "permuted_name": str(permuted[0]) if arm == kind == "A" else "",
            "permuted_formula": str(permuted[1]) if arm == kind == "A" else "",
        }
        for (arm, seed), own, (metric, kind) in product(FINE_TUNES, range(3), KINDS.items())
    ]  # fmt: skip


def never(*_: Any) -> bool:
    return False


def where_added(metric: str, arm: str, *_: Any) -> bool:
    return added(metric, arm)


def in_first(n: int) -> Hit:
    """Hit where added, of the first n metrics of either set."""
    return lambda metric, arm, *_: added(metric, arm) and int(metric[1]) < n


def dictionaries(converged: bool = True, method: str = METHOD) -> list[Row]:
    return [
        {"method": method, "form": "trained", "arm": arm, "seed": seed, "converged": str(converged)}
        for arm, seed in FINE_TUNES
    ]


def carried(right: dict[str, int], n: int = 60, method: str = METHOD) -> list[Row]:
    """Right answers of `n` for every metric: of the `set`, the `whole` site, `components` and `untrained` at equal
    norm, and of the set on the `other` arm's metrics."""
    sets = {
        "set": (method, "trained", "", "own"),
        "whole": ("whole site", "baseline", "", "own"),
        "components": ("PCA of the difference", "baseline", method, "own"),
        "untrained": (method, "untrained", method, "own"),
        "other": (method, "trained", "", "other"),
    }
    rows = []
    for (arm, seed), (name, (of, form, scaled_to, group)) in product(FINE_TUNES, sets.items()):
        for metric, kind in KINDS.items():
            if (kind == arm) == (group == "own"):
                rows.append({
                    "method": of, "form": form, "scaled_to": scaled_to, "group": group, "multiple": "1.0", "arm": arm,
                    "seed": str(seed), "dictionary_seed": "0", "metric": metric, "n": str(n), "right": str(right[name]),
                })  # fmt: skip
    return rows


CARRIES = {"set": 30, "whole": 60, "components": 6, "untrained": 6, "other": 0}


def verdict(found: Iterable[Finding], rule: str, method: str = METHOD) -> str:
    (said,) = {one.verdict for one in found if (one.rule, one.method, one.form) == (rule, method, "trained")}
    return said


def judged(
    hit: Hit = where_added, untrained: Hit = never, right: dict[str, int] = CARRIES, converged: bool = True, **more: Any
) -> list[Finding]:
    rows = items(hit, **more) + items(untrained, "untrained")
    return findings(rows, carried(right), dictionaries(converged))


@pytest.mark.parametrize(
    ("hit", "untrained", "converged", "said"),
    [
        (where_added, never, True, "finds"),
        (where_added, never, False, "finds"),  # convergence is asked for where something is denied
        (in_first(4), never, True, "finds"),  # 0.5 of the metrics, p = 2 / 256
        (in_first(3), never, True, "unresolved"),  # 0.375, but the interval reaches over 0.5
        (never, never, True, "does not find"),
        (never, never, False, "unresolved"),
        (lambda *_: True, never, True, "does not find"),  # hit just as often where absent
        (where_added, where_added, True, "unresolved"),  # no better than untrained, and the interval is not below
        (where_added, in_first(6), True, "finds"),  # 0.25 above untrained
        (where_added, in_first(7), True, "unresolved"),  # 0.125
        (lambda m, arm, seed, own: added(m, arm) and seed == 3, never, True, "finds"),  # one fine-tune of two: 0.5
        (lambda m, arm, seed, own: added(m, arm) and own > 0, never, True, "finds"),  # two dictionaries of three
    ],
)  # fmt: skip
def test_what_a_method_finds(hit: Hit, untrained: Hit, converged: bool, said: str):
    assert verdict(judged(hit, untrained, converged=converged), "D1") == said


@pytest.mark.parametrize(
    ("right", "converged", "said"),
    [
        ({}, True, "carries"),
        ({"set": 15}, True, "carries"),
        ({"set": 14}, True, "does not carry"),
        ({"set": 14}, False, "unresolved"),
        ({"set": 30, "components": 24}, True, "carries"),
        ({"set": 30, "components": 25}, True, "unresolved"),
        ({"set": 30, "untrained": 24}, True, "carries"),
        ({"set": 30, "untrained": 25}, True, "unresolved"),
        ({"other": 3}, True, "carries"),
        ({"other": 4}, True, "unresolved"),
        ({"set": 0, "components": 0, "untrained": 0}, True, "does not carry"),
        ({"set": 0, "whole": 0}, True, "unresolved"),  # the site gives nothing of which there were a share
    ],
)
def test_what_items_carry(right: dict[str, int], converged: bool, said: str):
    assert verdict(judged(right=CARRIES | right, converged=converged), "D2") == said


@pytest.mark.parametrize(
    ("permuted", "hit", "said"),
    [
        ((0.9, 0.89), where_added, "name"),
        ((0.89, 0.9), where_added, "formula"),
        ((0.9, 0.9), where_added, "mixed"),
        ((0.5, 0.5), where_added, "mixed"),
        ((1.0, 0.5), in_first(4), "name"),
        ((1.0, 0.5), in_first(3), "unresolved"),
        ((1.0, 0.5), never, "unresolved"),
    ],
)
def test_whether_items_follow_the_name_or_the_formula(permuted: tuple[float, float], hit: Hit, said: str):
    assert verdict(judged(hit, permuted=permuted), "D3") == said


@pytest.mark.parametrize(("n", "said"), [(6, "name"), (5, "mixed")])
def test_three_quarters_of_the_hits_have_to_share_what_they_follow(n: int, said: str):
    rows = items(where_added) + items(never, "untrained")
    for row in rows:
        if row["permuted_name"] and int(row["metric"][1]) >= n:
            row["permuted_formula"] = "0.95"
    assert verdict(findings(rows, [], dictionaries()), "D3") == said


def test_what_was_not_measured_is_unresolved():
    only_a = [row for row in items(where_added) + items(never, "untrained") if row["arm"] == "A"]
    found = findings(only_a, [], dictionaries())
    assert verdict(found, "D1") == verdict(found, "D2") == "unresolved"
    assert findings([], [], []) == []


def test_one_fine_tuning_seed_gives_figures_and_no_verdict():
    whole = (judged_rows(where_added), carried(CARRIES), dictionaries())
    first = findings(*([row for row in rows if int(row["seed"]) == 3] for rows in whole))
    assert {one.verdict for one in first} == {"unresolved", "no verdict"}
    assert [one.value for one in first] == [one.value for one in findings(*whole)]


@pytest.mark.parametrize(
    ("method", "form", "rule"),
    [(METHOD, "untrained", "D1"), (METHOD, "trained", "D2"), ("whole site", "baseline", "D2")],
)
def test_what_a_method_is_held_against_is_measured_in_all_fine_tunes_too(method: str, form: str, rule: str):
    rows, patched = (
        [row for row in table if (row["method"], row["form"], int(row["seed"])) != (method, form, 4)]
        for table in (judged_rows(where_added), carried(CARRIES))
    )
    assert verdict(findings(rows, patched, dictionaries()), rule) == "unresolved"


def test_holm_counts_a_method_that_is_not_measured_in_both_arms_yet():
    half = in_first(4)
    other = items(half, method="plain") + items(never, "untrained", "plain")
    found = findings(judged_rows(half) + [row for row in other if row["arm"] == "A"], [], dictionaries())
    assert verdict(found, "D1") == "unresolved"
    assert [one.value for one in found if one.condition.startswith("sign-flip")] == [pytest.approx(2 * 2 / 256), None]


def test_holm_counts_every_method_that_is_judged():
    """0.0078 passes for one method, and for two whose other one is sure; not for two that need it both."""
    half = in_first(4)
    assert verdict(judged(half), "D1") == "finds"
    both = [row for name in ("plain", METHOD) for row in items(half, method=name) + items(never, "untrained", name)]
    assert verdict(findings(both, [], dictionaries()), "D1") == "unresolved"
    sure = items(where_added, method="plain") + items(never, "untrained", "plain")
    assert verdict(findings(sure + judged_rows(half), [], dictionaries()), "D1") == "finds"


def judged_rows(hit: Hit) -> list[Row]:
    return items(hit) + items(never, "untrained")


def test_baselines_have_figures_and_no_verdict():
    rows = judged_rows(where_added) + items(where_added, "baseline", "PCA of the difference")
    found = findings(rows, carried(CARRIES), dictionaries())
    (said,) = [one for one in found if (one.form, one.condition) == ("baseline", "added less absent")]
    assert (said.value, said.verdict, said.holds) == (1.0, "no verdict", None)
    assert summary(found) == f"{METHOD}: D1 finds, D2 carries, D3 name"


@pytest.mark.parametrize(
    ("auroc", "recall", "hit"), [(0.9, 0.8, True), (0.899, 1.0, False), (1.0, 0.799, False), (float("nan"), 1.0, False)]
)
def test_a_hit(auroc: float, recall: float, hit: bool):
    assert is_hit(auroc, recall) is hit


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0] * 16, 2 / 2**16),
        ([1.0] * 8 + [0.0] * 8, 2 / 2**8),
        ([0.0] * 16, 1.0),
        ([1.0, -1.0], 1.0),
        ([3, 1, 1], 0.25),
    ],
)
def test_the_sign_flip_test_is_exact(differences: list[float], p: float):
    assert sign_flip_p(differences) == p


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_the_interval_counts_fine_tunes_and_not_their_metrics_alone():
    def mean(values: torch.Tensor) -> tuple[float, float]:
        found = clustered_interval(lambda w: (w * values).sum(dim=(1, 2)), *values.shape)
        assert found
        return found

    assert mean(torch.ones(16, 2, dtype=torch.float64)) == pytest.approx((1.0, 1.0))
    by_seed = torch.tensor([[0.0, 1.0]] * 16, dtype=torch.float64)
    assert mean(by_seed) == (0.0, 1.0)
    by_metric = torch.tensor([[0.0, 0.0], [1.0, 1.0]] * 8, dtype=torch.float64)
    low, high = mean(by_metric)
    assert 0.2 <= low <= 0.3 and 0.7 <= high <= 0.8
    assert clustered_interval(lambda w: w.sum(dim=(1, 2)) * torch.nan, 2, 2) is None


def test_the_preregistration_says_the_rules_of_the_code():
    page = " ".join((REPOSITORY / "docs" / "prereg.md").read_text().split())
    for said in (
        f"an AUROC of at least {verdicts.HIT_AUROC}",
        f"a recall of at least {verdicts.HIT_RECALL} at {verdicts.FALSE_ALARMS:.0%} false alarms",
        f"is at least {verdicts.ADDED_LESS_ABSENT};",
        f"is at least {verdicts.ABOVE_UNTRAINED} above that of the method's own untrained form",
        f"has p < {verdicts.P_BELOW}",
        f"at least {verdicts.SHARE_OF_WHOLE:.0%} of the right answers that the whole site gives",
        f"at least {100 * verdicts.ABOVE_OTHERS:.0f} points more than 20 principal components",
        f"at most {verdicts.OTHER_ARM_AT_MOST:.0%} right answers on the metrics of the other arm",
        f"AUROC is at least {verdicts.FOLLOWS_AUROC} for the same name",
    ):
        assert said in page, said
    assert re.search(r"at least three quarters of the hits share", page) and verdicts.FOLLOW_SHARE == 0.75
    assert "fewer than four metrics hit" in page and verdicts.FEWEST_METRICS == 4
