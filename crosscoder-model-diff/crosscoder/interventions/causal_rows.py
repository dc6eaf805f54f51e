"""From what every cell gave to the rows of a causal report: shares recovered, by group of questions, with intervals.

Measures: `divergence`, KL(fine-tuned || patched) on the documents' completions; `exact`, share of completions that the
patched model would have written token by token; `accuracy` and `share_runs`, of replies that it wrote and that were
run. Groups: all questions, each kind (known, new), each family.

Under `necessity` a divergence is recovered by any harm: whatever is taken from the fine-tuned model, its own answers
become less likely. So a share there means something only beside that of random directions of the same length.

    recovered = (m(S) - m(none)) / (m(ceiling) - m(none))

m is a mean over questions. Intervals are paired bootstrap: a resample draws the same questions for all three. Where the
gap's own interval holds 0, or the whole site moves the patched model the other way, there is nothing to recover, and
the share is None: neither 0 nor 1 would be true.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.interventions.causal import Cell, Measured
from finqa.evaluation.metrics import mcnemar

INTERVAL = (0.025, 0.975)
RESAMPLES = 2_000
VERDICTS = ("exact", "accuracy")
"""Measures of right and wrong, which McNemar's test compares."""
LOW_CEILING = 0.2
"""Share of the KL that a site must close for shares of its ceiling to say much."""
NO_GAP = "nothing to recover: the whole site changes nothing here, within its 95% interval"
AWAY = "nothing to recover: the whole site moves the patched model the other way here"


@dataclass(frozen=True)
class Asked:
    """One question with its document."""

    document: Document
    family: str = ""
    kind: str = ""
    """`known` or `new`; empty where the data set does not know."""
    expected: str = ""
    """The label."""


def rows_of(
    asked: Sequence[Asked],
    cells: Sequence[Cell],
    measured: Sequence[Measured],
    replies: Mapping[int, dict[str, list[int]]],
    seed: int,
) -> dict[str, Any]:
    """`rows`: one for each cell, group and measure, but of random sets none for each family. `random`: the ranked sets
    among their random ones. `notes`: where there was no gap.
    """
    groups = groups_of(asked)
    families = {one.family for one in asked}
    weights = {name: resamples(len(members), seed) for name, members in groups.items()}
    rows: list[dict[str, Any]] = []
    by_place: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for number, cell in enumerate(cells):
        kind = kind_of(cell)
        if kind in ("none", "ceiling"):
            by_place[cell[1:]][kind] = number
    for number, cell in enumerate(cells):
        ends = by_place[cell[1:]]
        values = values_of(measured[number], replies.get(number))
        none, ceiling = (values_of(measured[ends[kind]], replies.get(ends[kind])) for kind in ("none", "ceiling"))
        for group, members in groups.items():
            if kind_of(cell).startswith("random") and group in families:
                continue
            for measure in values:
                picked = [[table[measure][i] for i in members] for table in (values, none, ceiling)]
                rows.append(_row(cell, measured[number], group, measure, picked, weights[group]))
    missing = {
        (r["group"], r["measure"], *_where(r)): NO_GAP if r["gap_interval"][0] <= 0 <= r["gap_interval"][1] else AWAY
        for r in rows
        if r["recovered"] is None
    }
    notes = [f"{', '.join(place)}: {why}" for place, why in sorted(missing.items())]
    return {"rows": rows, "random": among_random(rows), "notes": [*low_ceilings(rows), *notes]}


def low_ceilings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the whole site, put into the instruct model, closes little of the KL: sets of latents can do no more."""
    notes = []
    for row in rows:
        whole = (row["kind"], row["measure"], row["direction"]) == ("ceiling", "divergence", "sufficiency")
        if whole and row["none"] > 0 and 0 <= (closed := 1 - row["ceiling"] / row["none"]) < LOW_CEILING:
            place = ", ".join((row["group"], *_where(row)))
            little = f"the whole site closes {closed:.0%} of the KL, under {LOW_CEILING:.0%}"
            notes.append(
                f"{place}: {little}, and shares are of that; the residual stream (--site residual) carries more"
            )
    return notes


def kind_of(cell: Cell) -> str:
    return cell.addition.label["kind"]


def values_of(measured: Measured, replies: dict[str, list[int]] | None) -> dict[str, list[float]]:
    """Measure to a number for each question."""
    values: dict[str, list[float]] = {"divergence": measured.divergence, "exact": [float(e) for e in measured.exact]}
    if replies is not None:
        values["accuracy"] = [float(right) for right in replies["right"]]
        values["share_runs"] = [float(ran) for ran in replies["runs"]]
    return values


def groups_of(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Indices of the questions of all, of each kind, and of each family."""
    groups: dict[str, list[int]] = {"all": list(range(len(asked)))}
    for attribute in ("kind", "family"):
        for number, one in enumerate(asked):
            if name := getattr(one, attribute):
                groups.setdefault(name, []).append(number)
    return groups


def among_random(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each ranked set the spread of its matched random sets, and of random directions, with a one-sided p."""
    bands: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] in ("ranked", "random sets", "random directions") and row["recovered"] is not None:
            bands[(row["n_latents"], row["group"], row["measure"], *_where(row))][row["kind"]].append(row["recovered"])
    found = []
    for (n, group, measure, *where), values in bands.items():
        for control in ("random sets", "random directions"):
            if values["ranked"] and values[control]:
                spread = {"lowest": min(values[control]), "highest": max(values[control])}
                spread |= {"mean": sum(values[control]) / len(values[control]), "n_sets": len(values[control])}
                place = dict(zip(("direction", "carrier", "positions"), where, strict=True))
                p = p_above(values["ranked"][0], values[control])
                found.append({"control": control, "n_latents": n, "group": group, "measure": measure, **place,
                              "ranked": values["ranked"][0], **spread, "p": p})  # fmt: skip
    return found


def _row(
    cell: Cell, measured: Measured, group: str, measure: str, picked: list[list[float]], weights: Tensor
) -> dict[str, Any]:
    share = share_recovered(picked[0], picked[1], picked[2], weights)
    label = cell.label
    rises = (cell.direction == "necessity") == (measure == "divergence")
    if (share.ceiling > share.none) != rises:
        share = share._replace(recovered=None, interval=None)
    row: dict[str, Any] = {
        "kind": label["kind"],
        "n_latents": label["n"],
        "seed": label.get("seed", 0),
        "direction": cell.direction,
        "carrier": cell.carrier,
        "positions": label["positions"],
        "group": group,
        "measure": measure,
        **share._asdict(),
        "injected_norm": measured.injected,
    }
    if measure in VERDICTS:
        row["mcnemar_p"] = mcnemar_of([v > 0 for v in picked[0]], [v > 0 for v in picked[1]])
    return row


def _where(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["direction"], row["carrier"], row["positions"]


class Share(NamedTuple):
    """What a patch recovers of one measure: the part of a report's row that the questions' numbers decide."""

    n: int
    """Questions."""
    value: float
    """Mean of the measure with the patch; `none` is that without one, `ceiling` that with the whole site."""
    none: float
    ceiling: float
    gap_interval: list[float]
    """95% interval of m(ceiling) - m(none): its two ends."""
    recovered: float | None
    """Share of the gap that the patch closes; None where there is no gap."""
    interval: list[float] | None
    """95% interval of that share."""


def resamples(n: int, seed: int = 0, count: int = RESAMPLES) -> Tensor:
    """[count, n] fp64: how often each of n questions is drawn, over n; a mean is a product with it."""
    return draws(n, seed, count) / n


def draws(n: int, seed: int = 0, count: int = RESAMPLES) -> Tensor:
    """[count, n] fp64: how often each of n is drawn in each of `count` resamples."""
    drawn = torch.randint(n, (count, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(count, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def share_recovered(
    patched: Sequence[float], none: Sequence[float], ceiling: Sequence[float], weights: Tensor
) -> Share:
    """What a patch recovers, from a number for each question and the `resamples` of these questions."""
    table = torch.tensor([list(patched), list(none), list(ceiling)], dtype=torch.float64)
    m_patched, m_none, m_ceiling = table.mean(dim=1).tolist()
    drawn = table @ weights.T
    low, high = (drawn[2] - drawn[1]).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    recovered = interval = None
    if not low <= 0 <= high:
        recovered = (m_patched - m_none) / (m_ceiling - m_none) + 0.0  # no minus before a 0
        # A few resamples of few questions have no gap; they say nothing of the share.
        has_gap = drawn[2] != drawn[1]
        ratios = ((drawn[0] - drawn[1]) / (drawn[2] - drawn[1]))[has_gap]
        interval = ratios.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return Share(table.shape[1], m_patched, m_none, m_ceiling, [low, high], recovered, interval)


def mcnemar_of(patched: Sequence[bool], none: Sequence[bool]) -> float:
    """Exact two-sided p that a patch changes how many questions are right."""
    pairs = list(zip(patched, none, strict=True))
    return mcnemar(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def p_above(value: float, null: Sequence[float]) -> float:
    """One-sided p of a value among draws of a null: (1 + draws at least as large) / (1 + draws)."""
    return (1 + sum(draw >= value for draw in null)) / (1 + len(null))
