"""Each metric against the other fifteen on the same page: which item tells it, on pages that did not choose it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from study.invented.files import Item
from study.invented.verdicts import FALSE_ALARMS, is_hit


@dataclass(frozen=True)
class Board:
    """The scores of items on the questions of invented metrics, page by page."""

    scores: Tensor
    """[pages, metrics, items] fp64."""
    metrics: tuple[tuple[str, str], ...]
    """Name and set (A or B)."""
    choose: Tensor
    """[pages] bool: pages that choose; the others score."""

    def half(self, choose: bool) -> Tensor:
        """[pages of that half, metrics, items]."""
        return self.scores[self.choose if choose else ~self.choose]

    def place(self, metric: str) -> int:
        return [name for name, _ in self.metrics].index(metric)


def question_means(values: Iterable[Tensor], question: Tensor, n: int) -> Tensor:
    """[n, items] fp64, on the CPU: each question's mean over its tokens, from `values` [some tokens, items] one after
    another, of which none is kept. `question` [tokens]: whose token it is."""
    sums: Tensor | None = None
    start = 0
    for part in values:
        sums = torch.zeros(n, part.shape[1], dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, question[start : start + len(part)], part.cpu().double())
        start += len(part)
    assert sums is not None and start == len(question), (start, len(question))
    return sums / torch.bincount(question, minlength=n)[:, None]


def board(scores: Tensor, asked: Sequence[Item]) -> Board:
    """`scores` [questions, items] of `asked`, where every page has every metric once."""
    metrics = tuple(dict.fromkeys((item.family, item.kind) for item in asked))
    pages = sorted({item.page for item in asked})
    where = {(item.page, item.family): number for number, item in enumerate(asked)}
    order = torch.tensor([[where[page, name] for name, _ in metrics] for page in pages])
    halves = {item.page: item.half for item in asked}
    return Board(scores[order], metrics, torch.tensor([halves[page] == "choose" for page in pages]))


def within_page_auroc(scores: Tensor) -> Tensor:
    """[pages, metrics, items] -> [metrics, items]: the chance that the metric's question has a larger value than
    another metric's on the same page, ties by half."""
    n = scores.shape[1]
    if not len(scores):
        return torch.full(scores.shape[1:], math.nan, dtype=torch.float64)
    varying = (scores != scores[:, :1]).any(dim=1).any(dim=0)  # the others are all ties
    areas = torch.full(scores.shape[1:], 0.5, dtype=torch.float64)
    scores = scores[:, :, varying]
    found = []
    for metric in range(n):
        own, others = scores[:, metric, None], scores[:, [other for other in range(n) if other != metric]]
        found.append(((own > others).double() + (own == others).double() / 2).mean(dim=(0, 1)))
    areas[:, varying] = torch.stack(found)
    return areas


def recall_at(scores: Tensor, false_alarms: float = FALSE_ALARMS) -> Tensor:
    """[pages, metrics, items] -> [metrics, items]: share of the metric's questions above the value that at most this
    share of the other metrics' questions, of all pages together, is above."""
    n = scores.shape[1]
    if not len(scores):
        return torch.full(scores.shape[1:], math.nan, dtype=torch.float64)
    found = []
    for metric in range(n):
        others = scores[:, [other for other in range(n) if other != metric]].flatten(0, 1)
        allowed = math.floor(false_alarms * len(others) + 1e-9)
        threshold = others.topk(allowed + 1, dim=0).values[allowed]
        found.append((scores[:, metric] > threshold).double().mean(dim=0))
    return torch.stack(found)


def item_rows(
    found: Board, signed: bool, names: Sequence[Any], false_alarms: float = FALSE_ALARMS, by_recall: bool = False
) -> list[dict[str, Any]]:
    """A row a metric: the item that tells it best on the pages that choose, and how well it does on the others.

    Args:
        signed: An item may count with its sign turned, where that tells more on the pages that choose.
        names: Of the items. With none of them the rows have no item and no hit.
        by_recall: The item is chosen by recall, among equals by AUROC; else by AUROC alone.
    """
    rows = []
    if not names:
        return [_row(metric, None, 1, math.nan, math.nan, math.nan) for metric in found.metrics]
    both = _choosing(found, signed)
    told = both + _recalls(found, len(both)) if by_recall else both
    picks = [divmod(int(told[:, place].flatten().argmax()), len(names)) for place in range(len(found.metrics))]
    picked = found.half(choose=False)[:, :, [item for _, item in picks]]  # one for each metric
    upright = within_page_auroc(picked)
    recalls = torch.stack([recall_at(sign * picked, false_alarms) for sign in (1, -1)[: len(both)]])
    for place, (metric, (side, item)) in enumerate(zip(found.metrics, picks, strict=True)):
        area = float(upright[place, place])
        rows.append(
            _row(
                metric,
                names[item],
                -1 if side else 1,
                float(both[side, place, item]),
                1 - area if side else area,
                float(recalls[side, place, place]),
            )
            | {"place": item}
        )
    return rows


def best_items(found: Board) -> list[int]:
    """The items that `item_rows` would choose by recall for some metric, ascending: of these alone it gives what it
    gives of all, and only these need be read in other pairs. (By AUROC alone many of thousands are the best.)"""
    return sorted(set((_choosing(found, signed=False) + _recalls(found, 1))[0].argmax(dim=1).tolist()))


def _recalls(found: Board, signs: int) -> Tensor:
    """[signs, metrics, items]: recall on the pages that choose, times so much that one question less counts for more
    than an AUROC, which is at most 1."""
    chosen = found.half(choose=True)
    return torch.stack([2 * len(chosen) * recall_at(sign * chosen) for sign in (1, -1)[:signs]])


def _choosing(found: Board, signed: bool) -> Tensor:
    """[signs, metrics, items]: AUROC on the pages that choose, upright and, of signed items, turned."""
    areas = within_page_auroc(found.half(choose=True))
    return torch.stack([areas, 1 - areas]) if signed else areas[None]


def auroc_elsewhere(found: Board, metric: str, item: int, sign: int) -> float:
    """On the scoring pages of another pair of models: how well the item tells a metric there."""
    return float(within_page_auroc(sign * found.half(choose=False)[:, :, [item]])[found.place(metric), 0])


def read_elsewhere(
    rows: Sequence[dict[str, Any]], boards: Mapping[str, Board], metrics: Sequence[Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    """The rows of `item_rows` with what their items do in other pairs; empty where that is not read.

    For metrics of A: `permuted_name`, the AUROC in A' for the same name; `permuted_formula`, for the name that has its
    formula there; `look_up`, in N for the same name, which has no formula there.

    Args:
        boards: Of arm A' (`A-permuted`) and of control N (`N`), for a pair of A; none for any other.
        metrics: The lines of metrics.csv.
    """
    formulas = {line["name"]: line["formula"] for line in metrics}
    heirs = {line["formula_permuted"]: line["name"] for line in metrics if line["formula_permuted"]}
    for row in rows:
        told: dict[str, float | None] = dict.fromkeys(("permuted_name", "permuted_formula", "look_up"))
        place = row.get("place")
        if boards and place is not None and row["kind"] == "A":
            name, sign = row["metric"], row["sign"]
            told = {
                "permuted_name": auroc_elsewhere(boards["A-permuted"], name, place, sign),
                "permuted_formula": auroc_elsewhere(boards["A-permuted"], heirs[formulas[name]], place, sign),
                "look_up": auroc_elsewhere(boards["N"], name, place, sign),
            }
        yield {key: value for key, value in row.items() if key != "place"} | told


def _row(metric: tuple[str, str], item: Any, sign: int, chosen: float, auroc: float, recall: float) -> dict[str, Any]:
    return {
        "metric": metric[0],
        "kind": metric[1],
        "item": item,
        "sign": sign,
        "auroc_choose": chosen,
        "auroc": auroc,
        "recall": recall,
        "hit": is_hit(auroc, recall),
    }
